"""Gradients after backward: their norms, and which parameters have none."""

from modaldummy._monitor.missing import missing_gradients
from modaldummy._monitor.norms import gradient_norms

__all__ = ["gradient_norms", "missing_gradients"]
