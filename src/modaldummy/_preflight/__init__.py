"""Finds what will go wrong in training before it starts."""

from modaldummy._preflight.preflight import findings_of_total, preflight

__all__ = ["findings_of_total", "preflight"]
