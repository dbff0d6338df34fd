"""Gradients after backward: their norms, and who has none."""
