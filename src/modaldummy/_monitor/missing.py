"""Which parameters have no usable gradient after a backward pass."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import text_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._engines import is_fsdp1_parameter, is_zero_parameter
from modaldummy._errors import MissingGradientError, first_few
from modaldummy._monitor.gradients import ParameterTable, local_elements, table_of

_NONE = "No gradient"
_ZERO = "A gradient that is zero everywhere"
_NOT_FINITE = "NaN or infinity in the gradient"


class Problem(NamedTuple):
    """What is wrong with the gradient of a parameter.

    Attributes:
        description: One of the three texts above.
        is_active: Whether an active key of the map owns the parameter.
    """

    description: str
    is_active: bool


_NO_LOSS = (
    "no loss has gone through the wrapper. Call `backward()` on the tensor that "
    "`wrapper.total(loss, batch)` returns."
)
_DEEPSPEED = (
    "DeepSpeed keeps gradients elsewhere than in `.grad`. After `engine.backward`, call "
    "`deepspeed.utils.safe_get_full_grad(parameter)` on all ranks."
)
_NO_BACKWARD = "`backward()` has not run, or `zero_grad()` has run since."
_CAUSES: dict[Problem, str] = {
    Problem(_NONE, is_active=True): (
        "the loss does not depend on them. Look for `.detach()`, `.item()` or `torch.no_grad()` in "
        "the forward pass, or for a batch that names a modality which the model does not run."
    ),
    Problem(_NONE, is_active=False): (
        "`backward()` ran on another tensor than the total. Call it on the tensor that "
        "`wrapper.total(loss, batch)` returns."
    ),
    Problem(_ZERO, is_active=True): (
        "the loss does not depend on their values, as behind a dead ReLU or behind a weight that "
        "is zero, such as that of a fresh LoRA adapter."
    ),
    Problem(_ZERO, is_active=False): (
        "the total was multiplied by 0, or the gradients were averaged or clipped in float16."
    ),
    Problem(_NOT_FINITE, is_active=True): (
        "an overflow, after which a GradScaler skips the step and recovers, or NaN in the data or "
        "in the parameters."
    ),
    Problem(_NOT_FINITE, is_active=False): "the gradient of the total itself is not finite.",
}
_MAX_LISTED_NAMES = 5
# The key of parameters that no modality owns; names of modalities contain no bracket.
UNMAPPED = "[unmapped]"
_NOT_IN_THE_MAP = (
    "the loss of this batch does not depend on them, and they are in no modality, so that they get "
    "no dummy gradient. Give them to a modality if only some batches use them, else freeze them."
)


def missing_gradients(
    wrapper: DummyLossWrapper, *, strict: bool = False, unmapped: bool = True
) -> dict[str, tuple[str, ...]]:
    """Parameters whose gradient is None, zero everywhere or not finite after ``backward()``.

    Some gradients are meant to be unusable, and are not listed: zeros and None of a modality that
    was inactive in the last loss, for ``scale=0.0`` and ``scale=None``; the empty gradient of an
    inactive sparse embedding; those of parameters that are frozen or have no elements.

    Trainable parameters of the model that the map gives to no modality are listed if they have no
    gradient at all: nothing gives them a dummy gradient.

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
        wrapper: The wrapper of the loss.
        strict: Raise an error if any parameter would be listed.
        unmapped: Whether to look at parameters that no modality owns.

    Returns:
        Modality to names of parameters in the bare model, both in map order. A tuple key of the
        map reads ``T1-dMRI``. A parameter that several keys own is listed for each of them. Those
        that no modality owns come last, under ``[unmapped]``.

    Raises:
        MissingGradientError: With ``strict``; it names the parameters and the likely causes.
        ParameterMapError: A path matches nothing in the model any more.
        TypeError: ``wrapper`` has the wrong type.

    Note:
        If no gradient is missing, the host waits for the device once.
    """
    check_wrapper(wrapper)
    table = table_of(wrapper)
    problems = _find_problems(wrapper, table)
    outside = _unmapped_without_gradient(wrapper, table) if unmapped else ()
    if strict and (problems or outside):
        raise MissingGradientError(_message(wrapper, table, problems, outside))
    missing = {
        text_of(key): tuple(table.names[i] for i in ids if i in problems)
        for key, ids in table.ids.items()
    } | {UNMAPPED: outside}
    return {key: names for key, names in missing.items() if names}


def _find_problems(wrapper: DummyLossWrapper, table: ParameterTable) -> dict[int, Problem]:
    """What is wrong with each parameter without a usable gradient, by its `id`."""
    last = wrapper.last
    # Before the first loss, every parameter counts as active.
    active_keys = table.ids if last is None else wrapper.parameters.active_keys(last.active)
    active_ids = {i for key in active_keys for i in table.ids[key]}
    norms = table.measure()
    problems: dict[int, Problem] = {}
    for i, parameter in table.parameters.items():
        # A finite norm above 0 shows a usable gradient. Otherwise the elements decide, because
        # their squares may have underflowed or overflowed.
        if 0 < norms.get(i, 0) < math.inf:
            continue
        if problem := _problem_of(parameter, i in active_ids, wrapper.scale):
            problems[i] = problem
    return problems


def _unmapped_without_gradient(wrapper: DummyLossWrapper, table: ParameterTable) -> tuple[str, ...]:
    """Names of trainable parameters that are in no modality and have no gradient."""
    model = wrapper.parameters.model
    found = {
        id(parameter)
        for parameter in model.parameters()
        if parameter.grad is None and parameter.requires_grad and parameter.numel()
    } - table.parameters.keys()
    # Names take long to make, and are needed rarely.
    named = model.named_parameters() if found else ()
    return tuple(strip_wrappers(name) for name, parameter in named if id(parameter) in found)


def _problem_of(parameter: nn.Parameter, is_active: bool, scale: float | None) -> Problem | None:
    """What is wrong with the gradient of a parameter; None if it is as the scale asks for."""
    if not parameter.requires_grad or not parameter.numel():
        return None
    if is_fsdp1_parameter(parameter):  # It gets no dummy gradient.
        scale = None
    if parameter.grad is None:
        return Problem(_NONE, is_active) if is_active or scale is not None else None
    elements = local_elements(parameter.grad)
    if not elements.isfinite().all():
        return Problem(_NOT_FINITE, is_active)
    must_be_nonzero = elements.numel() and (is_active or scale)
    return Problem(_ZERO, is_active) if must_be_nonzero and not elements.any() else None


def _message(
    wrapper: DummyLossWrapper,
    table: ParameterTable,
    problems: Mapping[int, Problem],
    outside: Sequence[str],
) -> str:
    parameters = table.parameters.values()
    num_trainable = sum(parameter.requires_grad for parameter in parameters)
    general = None  # why nothing has a gradient
    if wrapper.last is None:
        general = _NO_LOSS
    elif any(map(is_zero_parameter, parameters)):
        general = _DEEPSPEED
    elif len(problems) == num_trainable:
        general = _NO_BACKWARD
    num_all = sum(p.requires_grad for p in wrapper.parameters.model.parameters())
    num_missing = len(problems) + len(outside)
    lines = [f"{num_missing} of {num_all} trainable parameters have no usable gradient."]
    for problem, cause in _CAUSES.items():
        names = [table.names[i] for i, found in problems.items() if found == problem]
        if problem.description == _NONE:
            cause = general or cause
        owner = f"{'active' if problem.is_active else 'inactive'} modality"
        lines += _line(f"{problem.description}, {owner}", names, cause)
    lines += _line(f"{_NONE}, no modality", outside, general or _NOT_IN_THE_MAP)
    return "\n".join(lines)


def _line(what: str, names: Sequence[str], cause: str) -> list[str]:
    """A line of the message; none without names."""
    listed = first_few(map(repr, names), _MAX_LISTED_NAMES)
    return [f"{what}: {listed}. Likely cause: {cause}"] if names else []
