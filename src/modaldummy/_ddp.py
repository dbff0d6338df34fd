"""Where DistributedDataParallel cannot bear a dummy term that is added outside of its forward."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modaldummy._errors import UnsupportedEngineError

TWICE = (
    "DDP with find_unused_parameters=True marks absent parameters as ready after forward, and "
    "stops with 'Expected to mark a variable ready only once' when the dummy term, which is added "
    "outside of its forward, does so again."
)
TWICE_REMEDY = (
    "Pass find_unused_parameters=False, which the dummy makes unnecessary; or static_graph=True, "
    "with a scale that is not None; or compute the loss inside of the module that DDP wraps, with "
    "the wrapper as an attribute of it; or make the wrapper with the module inside, `ddp.module`, "
    "and call `attach_to_outputs(wrapper, ddp)`."
)
UNREDUCED = (
    "With scale=None, DDP with static_graph=True never reduces the gradients of a modality that no "
    "rank had at the first step, so that ranks train apart without a word."
)
UNREDUCED_REMEDY = "Use scale=0.0."


def ddps_around(
    modules: Iterable[nn.Module], owned: Iterable[int]
) -> Iterator[DistributedDataParallel]:
    """Those of `modules` that are DDP around a parameter whose `id` is in `owned`."""
    mine = set(owned)
    for module in modules:
        if isinstance(module, DistributedDataParallel) and not mine.isdisjoint(
            map(id, module.parameters())
        ):
            yield module


def marks_twice(ddp: DistributedDataParallel) -> bool:
    """Whether it stops at a term outside of its forward."""
    return bool(ddp.find_unused_parameters and not ddp.static_graph)


def leaves_unreduced(ddp: DistributedDataParallel, scale: float | None) -> bool:
    """Whether ranks train apart without a word."""
    return bool(ddp.static_graph and scale is None)


def check_ddps(ddps: Iterable[DistributedDataParallel], scale: float | None) -> None:
    """Refuse a wrapper around DDP that stops at its term, or goes wrong without a word.

    Raises:
        UnsupportedEngineError: DDP looks for unused parameters, or its graph is static and the
            scale None.
    """
    for ddp in ddps:
        if marks_twice(ddp):
            raise UnsupportedEngineError(f"{TWICE} {TWICE_REMEDY}")
        check_reduced(ddp, scale)


def check_reduced(ddp: DistributedDataParallel, scale: float | None) -> None:
    """Refuse DDP that leaves gradients unreduced without a word.

    Raises:
        UnsupportedEngineError: Its graph is static and the scale None.
    """
    if leaves_unreduced(ddp, scale):
        raise UnsupportedEngineError(f"{UNREDUCED} {UNREDUCED_REMEDY}")
