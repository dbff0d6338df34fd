"""What went wrong in a training, read from its log."""

from modaldummy._diagnose.diagnose import diagnose

__all__ = ["diagnose"]
