"""What will go wrong in training, told before it starts."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.loss_function import check_loss
from modaldummy._errors import describe
from modaldummy._findings import Finding, by_severity
from modaldummy._preflight.check_engine import check_engine
from modaldummy._preflight.check_graph import check_graph
from modaldummy._preflight.check_optimizer import check_optimizers
from modaldummy._preflight.check_parameters import check_parameters
from modaldummy._preflight.check_scale import check_scale
from modaldummy._preflight.setup import Setup

_CHECKS = (check_engine, check_parameters, check_graph, check_scale, check_optimizers)


def preflight(
    wrapper: DummyLossWrapper,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    model: nn.Module | None = None,
    *,
    loss: Tensor | None = None,
    scaler: torch.amp.GradScaler | float | None = None,
    max_norm: float | None = None,
    accumulation_steps: int = 1,
) -> list[Finding]:
    """Findings about a training that is about to start; an empty list if there is nothing to say.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> for finding in preflight(wrapper, optimizer):
    ...     print(finding.code, finding.severity)
    MD141 warning

    Each finding has a code; ``docs/reference/preflight.md`` has a section for each code. What an
    argument would be needed for is not checked without it. Model, optimizers, gradients, random
    number generators, the graph of ``loss`` and ``wrapper.last`` stay as they are, and no rank
    waits for another: call it once per run, on any or all ranks.

    Args:
        wrapper: The wrapper that training uses.
        optimizer: The optimizer, or all optimizers of the model together, held or not.
        model: What is called in training: DDP, FSDP2, an engine, a compiled model. By default the
            model that the wrapper was made with.
        loss: The total of one batch as the wrapper returned it, before backward. Where its graph
            does not tell what backward will reach, in a reentrant checkpoint or of parameters that
            FSDP2 has back in shards, nothing is said about that.
        scaler: The ``torch.amp.GradScaler``, or the number that the loss is multiplied by.
        max_norm: What ``torch.nn.utils.clip_grad_norm_`` will be given.
        accumulation_steps: By how many the loss is divided.

    Returns:
        Errors first, then warnings, then what is good to know; within each by code.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: ``optimizer`` is empty, ``model`` shares no parameter with that of the wrapper,
            or a number is not positive.
        ParameterMapError: A path of the map matches nothing in the model any more, or no gradient
            can reach what it matches, such as the parameter of a lazy module before its first use.
    """
    check_wrapper(wrapper)
    check_model(model)
    if loss is not None:
        check_loss(loss, "`loss`")
    factor, grad_scaler = _check_scaler(scaler)
    setup = Setup(
        wrapper=wrapper,
        model=called_model(wrapper, model),
        optimizers=_check_optimizers(optimizer),
        loss=loss,
        factor=factor,
        grad_scaler=grad_scaler,
        max_norm=None if max_norm is None else _positive("max_norm", max_norm, "a number or None"),
        accumulation_steps=_check_steps(accumulation_steps),
    )
    # An optimizer that is tried may draw random numbers.
    devices = {p.device for _, p in setup.named.values() if p.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        return by_severity(finding for check in _CHECKS for finding in check(setup))


def _check_optimizers(optimizer: Any) -> tuple[Optimizer, ...] | None:
    if optimizer is None:
        return None
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, (str, Tensor))
    given = tuple(optimizer) if several else (optimizer,)
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(
                "`optimizer` must be a torch.optim.Optimizer, several of them, or None, got "
                f"{describe(one)}."
            )
    if not given:
        raise ValueError("`optimizer` is empty; leave it out if there is none yet.")
    return given


def _check_scaler(scaler: Any) -> tuple[float | None, bool]:
    """What the loss is multiplied by, and whether it is a `GradScaler` that does it."""
    if isinstance(scaler, torch.amp.GradScaler):
        return scaler.get_scale(), scaler.is_enabled()
    if scaler is None:
        return None, False
    return _positive("scaler", scaler, "a torch.amp.GradScaler, a number or None"), False


def _positive(name: str, number: Any, kinds: str) -> float:
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"`{name}` must be {kinds}, got {describe(number)}.")
    if not float(number) > 0:
        raise ValueError(f"`{name}` must be positive, got {describe(number)}.")
    return float(number)


def _check_steps(steps: Any) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"`accumulation_steps` must be an int, got {describe(steps)}.")
    if steps < 1:
        raise ValueError(f"`accumulation_steps` must be 1 or more, got {steps}.")
    return steps
