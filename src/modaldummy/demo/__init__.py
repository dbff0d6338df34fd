"""The demo: a three-modality model on real scans, trained from mostly single-modality batches."""
