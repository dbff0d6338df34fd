"""The optimizer leaves parameters unchanged that no batch has trained."""

from modaldummy._hold.hold import HoldHandle, hold_inactive
from modaldummy._hold.holder import is_held

__all__ = ["HoldHandle", "hold_inactive", "is_held"]
