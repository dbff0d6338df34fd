"""Ranks that do not run a tower take part in its collectives all the same."""

from modaldummy._shadow.handle import ShadowHandle, shadow_inactive

__all__ = ["ShadowHandle", "shadow_inactive"]
