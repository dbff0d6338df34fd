"""Finds what will go wrong in training before it starts."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.loss_function import check_loss
from modaldummy._errors import describe
from modaldummy._findings import Finding, by_severity
from modaldummy._numbers import check_int, check_number, check_number_or_none
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
    scaler: GradScaler | float | None = None,
    max_norm: float | None = None,
    accumulation_steps: int = 1,
) -> list[Finding]:
    """Find what will go wrong in a training, before it starts.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> for finding in preflight(wrapper, optimizer):
    ...     print(finding.code, finding.severity)
    MD141 warning

    Call it once per run, on any rank or on all ranks: it does not communicate. Each argument that
    you leave out skips the checks that need it. The model, its gradients, the optimizers, random
    number generators, the graph of ``loss`` and ``wrapper.last`` do not change.
    ``docs/reference/preflight.md`` explains each code.

    Args:
        wrapper: The wrapper that training uses.
        optimizer: The optimizer, or all optimizers of the model together, with or without a hold.
            Under DeepSpeed's ZeRO leave it out: the engine, passed as ``model``, has it.
        model: The module that training calls: DDP, FSDP2, an engine, a compiled model. By default
            the model that the wrapper was made with.
        loss: The total of one batch as the wrapper returned it, before backward.
        scaler: The ``torch.amp.GradScaler``, or the number that the loss is multiplied by.
        max_norm: The maximum norm that training passes to ``torch.nn.utils.clip_grad_norm_``.
        accumulation_steps: The number that the loss is divided by.

    Returns:
        Errors first, then warnings, then infos; within each by code. Empty if nothing was found.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``optimizer`` is empty, ``model`` shares no parameter with that of the wrapper,
            or a number is not positive.
        ParameterMapError: A path of the map matches nothing in the model any more, or matches a
            parameter that no gradient fits, such as that of a lazy module before its first use.
    """
    check_wrapper(wrapper, optimizer)
    check_model(model)
    if loss is not None:
        check_loss(loss, "`loss`")
    if scaler is not None and not isinstance(scaler, GradScaler):
        alternative = ", a torch.amp.GradScaler or None"
        scaler = check_number("scaler", scaler, positive=True, alternative=alternative)
    if max_norm == math.inf:  # This clips nothing.
        max_norm = None
    setup = Setup(
        wrapper=wrapper,
        model=called_model(wrapper, model),
        optimizers=_check_optimizers(optimizer),
        loss=loss,
        scaler=scaler,
        max_norm=check_number_or_none("max_norm", max_norm, positive=True),
        accumulation_steps=check_int("accumulation_steps", accumulation_steps, 1),
    )
    # A trial of an optimizer may draw random numbers.
    devices = {parameter.device for parameter in setup.names if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        return by_severity(finding for check in _CHECKS for finding in check(setup))


def findings_of_total(wrapper: DummyLossWrapper, model: nn.Module, total: Tensor) -> list[Finding]:
    """The findings of `preflight` that need a loss, sorted in the same way.

    Args:
        wrapper: The wrapper.
        model: The module that training calls.
        total: What the wrapper returned, before backward.
    """
    setup = Setup(wrapper, called_model(wrapper, model), None, total, None, None, 1)
    return by_severity(check_graph(setup))


def _check_optimizers(optimizer: Any) -> tuple[Optimizer, ...] | None:
    if optimizer is None:
        return None
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, (str, Tensor))
    optimizers = tuple(optimizer) if several else (optimizer,)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(
                "`optimizer` must be a torch.optim.Optimizer, an iterable of them or None, got "
                f"{describe(each)}. Under DeepSpeed's ZeRO leave it out and pass `model=engine`."
            )
    if not optimizers:
        raise ValueError("`optimizer` is empty. Leave it out if there is no optimizer yet.")
    return optimizers
