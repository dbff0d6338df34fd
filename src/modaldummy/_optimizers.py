"""What an optimizer contains."""

from collections.abc import Iterator

from torch.nn import Parameter
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """All parameters that an optimizer has now."""
    for group in optimizer.param_groups:
        yield from group["params"]


def parameter_ids_of(optimizer: Optimizer) -> set[int]:
    """`id` of each parameter that an optimizer has now."""
    return set(map(id, parameters_of(optimizer)))
