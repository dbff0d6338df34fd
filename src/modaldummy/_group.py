"""The ranks of a process group: how many there are, and where their tensors have to be."""

import torch
import torch.distributed as dist

from modaldummy._errors import describe


def check_group(group: object) -> None:
    """Refuse an argument that is not a process group of this rank.

    Raises:
        TypeError: It is neither a process group that contains this rank nor None.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` must be a torch.distributed.ProcessGroup that this rank belongs to, or None "
            f"for all ranks, got {describe(group)}."
        )


def num_ranks(group: "dist.ProcessGroup | None") -> int:
    """Number of ranks of `group`, None for all; 1 if `torch.distributed` is not initialized."""
    is_initialized = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if is_initialized else 1


def tensor_device(group: "dist.ProcessGroup | None", device: torch.device) -> torch.device:
    """A device from which the backend of `group` can send tensors.

    The CPU if the backend supports it, because that needs no synchronization with a device. Else
    the `device` of the parameters, which need not be the current device of its type.
    """
    # Such as "cpu:gloo,cuda:nccl".
    types = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    return device if device.type in types else torch.device(types[0])
