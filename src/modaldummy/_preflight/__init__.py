"""What will go wrong in a training, told before it starts."""

from modaldummy._preflight.preflight import preflight

__all__ = ["preflight"]
