"""The ranks that have to agree: whether there are others, and where their tensors go."""

import torch
import torch.distributed as dist

from modaldummy._errors import describe


def check_group(group: object) -> None:
    """Refuse what is no group of ranks, or one that this rank is not in.

    Raises:
        TypeError: It is neither a process group nor None.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` must be a torch.distributed.ProcessGroup that this rank belongs to, or None "
            f"for all ranks, got {describe(group)}."
        )


def num_ranks(group: "dist.ProcessGroup | None") -> int:
    """How many ranks `group` has, None for all; 1 where `torch.distributed` is not in use."""
    in_use = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if in_use else 1


def tensor_device(group: "dist.ProcessGroup | None", device: torch.device) -> torch.device:
    """Where the backend of `group` takes tensors: on the CPU if it can, since nothing waits there.

    Else on the `device` of the parameters, which need not be the current one of its type.
    """
    # Such as "cpu:gloo,cuda:nccl".
    types = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    return device if device.type in types else torch.device(types[0])
