"""Many ranks: what they must agree on, where, and batches on which they do."""
