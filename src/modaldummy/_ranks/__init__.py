"""Several ranks: whether they have to agree, and how DDP gets to know all parameters."""

from modaldummy._ranks.attach import AttachHandle, attach_to_outputs
from modaldummy._ranks.check import check_ranks

__all__ = ["AttachHandle", "attach_to_outputs", "check_ranks"]
