"""Which parameters a backward pass left without a usable gradient."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import text_of
from modaldummy._engines import is_zero_parameter
from modaldummy._errors import MissingGradientError
from modaldummy._monitor.gradients import Stock, dense, stock_of

Kind = Literal["none", "zero", "not finite"]

_WORDS: dict[Kind, str] = {
    "none": "No gradient",
    "zero": "A gradient that is zero everywhere",
    "not finite": "NaN or infinity in the gradient",
}
_NOT_WRAPPED = (
    "no loss has gone through the wrapper; backward what `wrapper.total(loss, batch)` returns"
)
_PARTITIONED = (
    "DeepSpeed keeps gradients to itself; after `engine.backward` ask all ranks for "
    "`deepspeed.utils.safe_get_full_grad(parameter)`"
)
_NO_BACKWARD = "`backward()` has not run, or `zero_grad()` has run since"
_CAUSES: dict[tuple[Kind, bool], str] = {
    ("none", True): (
        "the loss does not reach them; look for `.detach()`, `.item()` or `torch.no_grad()` on the "
        "way, or for a batch that names a modality which forward leaves out"
    ),
    ("none", False): (
        "something else was backwarded than what `wrapper.total(loss, batch)` returned"
    ),
    ("zero", True): (
        "the loss does not depend on them, as behind a ReLU that is dead or a weight that is zero, "
        "such as that of a fresh LoRA adapter"
    ),
    ("zero", False): (
        "the loss was multiplied by 0, or the gradients were averaged or clipped in float16"
    ),
    ("not finite", True): (
        "an overflow, which a GradScaler skips and recovers from, or NaN in data or parameters"
    ),
    ("not finite", False): "the gradient of the loss itself is not finite",
}
_SHOWN = 5  # names in a message


def missing_gradients(
    wrapper: DummyLossWrapper, *, strict: bool = False
) -> dict[str, tuple[str, ...]]:
    """Parameters that have no gradient after ``backward()``, an exactly zero, or a non-finite one.

    What is meant to be so is not listed: with ``scale=0.0`` zeros, with ``scale=None`` none, where
    the modality was inactive in the last loss; the empty gradient of a sparse embedding that was
    inactive; parameters that are frozen, or have no elements. Zero means every element, however
    small the others are. If nothing is missing, the host waits for the device once.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> loss = model["T1"](torch.ones(3, 4)).square().mean()
    >>> total = wrapper.total(loss, ["T1"])
    >>> loss.backward()  # not the total
    >>> missing_gradients(wrapper)
    {'dMRI': ('dMRI.weight', 'dMRI.bias')}

    Args:
        wrapper: The wrapper whose loss was backwarded.
        strict: Raise if there are any.

    Returns:
        Modality to names of parameters as in the bare model, both in map order; tuple keys of the
        map read ``T1-dMRI``, and a parameter that several own stands at each.

    Raises:
        MissingGradientError: ``strict``, and there are any; it names them and the likely cause.
        ParameterMapError: A path matches nothing in the model any more.
        TypeError: ``wrapper`` is of another kind.
    """
    check_wrapper(wrapper)
    stock = stock_of(wrapper)
    kinds = _kinds(wrapper, stock)
    found: dict[str, tuple[str, ...]] = {}
    for key, members in stock.members.items():
        if names := tuple(stock.bare[index] for index in members if index in kinds):
            found[text_of(key)] = names
    if strict and found:
        raise MissingGradientError(_message(wrapper, stock, kinds))
    return found


def _kinds(wrapper: DummyLossWrapper, stock: Stock) -> dict[int, tuple[Kind, bool]]:
    """Place of each parameter that misses a gradient to how it does, and whether it is active."""
    last, scale = wrapper.last, wrapper.scale
    keys = stock.members if last is None else wrapper.parameters.active_keys(last.active)
    active = {index for key in keys for index in stock.members[key]}
    norm, _ = stock.measure(None, False)
    kinds: dict[int, tuple[Kind, bool]] = {}
    # A norm that is a number above 0 says enough. Of others, squares may be out of range.
    for index in np.flatnonzero(~(np.isfinite(norm) & (norm > 0))):
        parameter, taught = stock.parameters[index], index in active
        if not parameter.requires_grad or not parameter.numel():
            continue
        if parameter.grad is None:
            kind: Kind | None = "none" if taught or scale is not None else None
        else:
            kind = _kind(dense(parameter.grad), taught or bool(scale))
        if kind is not None:
            kinds[int(index)] = (kind, taught)
    return kinds


def _kind(gradient: Tensor, nonzero: bool) -> Kind | None:
    """What is wrong with a gradient that may have to be nonzero; of nothing, nothing is."""
    if not gradient.isfinite().all():
        return "not finite"
    return "zero" if nonzero and gradient.numel() and not gradient.any() else None


def _message(
    wrapper: DummyLossWrapper, stock: Stock, kinds: Mapping[int, tuple[Kind, bool]]
) -> str:
    trainable = sum(parameter.requires_grad for parameter in stock.parameters)
    lines = [f"{len(kinds)} of {trainable} trainable parameters of the map miss a gradient."]
    for group, cause in _CAUSES.items():
        names = [stock.bare[index] for index in sorted(kinds) if kinds[index] == group]
        if not names:
            continue
        kind, active = group
        if kind == "none" and wrapper.last is None:
            cause = _NOT_WRAPPED
        elif kind == "none" and any(map(is_zero_parameter, stock.parameters)):
            cause = _PARTITIONED
        elif kind == "none" and len(kinds) == trainable:
            cause = _NO_BACKWARD
        shown = ", ".join(map(repr, names[:_SHOWN]))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        who = "of an active" if active else "of an inactive"
        lines.append(f"{_WORDS[kind]}: {shown}{more} {who} modality. Likely: {cause}.")
    return "\n".join(lines)
