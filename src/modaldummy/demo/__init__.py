"""The demo: trains a model of three modalities on real scans, mostly one modality per batch."""
