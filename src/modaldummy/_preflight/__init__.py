"""Finds what will go wrong in training before it starts."""

from modaldummy._preflight.preflight import preflight

__all__ = ["preflight"]
