"""What will go wrong, before training."""
