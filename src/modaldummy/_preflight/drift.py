"""How far an optimizer moves the parameters of a modality that gets only dummy gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._core.term import dummy_term
from modaldummy._engines import (
    local_shard,
    step_alone,
    zero_elements,
    zero_flat_parameters,
    zero_optimizer,
    zero_options,
)
from modaldummy._optimizers import optimizer_of_copies, parameters_to_try

# Larger parameters are left out, except for the smallest of each number of dimensions.
_MAX_SAMPLE_ELEMENTS = 2**12
_MAX_SAMPLES = 100  # of one key and parameter group

# The options of a parameter group, and its parameters by `id`.
_Group: TypeAlias = tuple[Mapping[str, Any], Mapping[int, nn.Parameter]]


def expected_drift(
    wrapper: DummyLossWrapper, optimizer: Optimizer, steps: int
) -> dict[ModalityKey, float]:
    """Measure the drift of each key over the next `steps` steps, if it is inactive in all of them.

    Drift is the root mean square displacement of a parameter per step, in learning rates.

    The optimizer steps copies of parameters from its present state, so the drift includes weight
    decay and momentum. Parameters that were trained before drift in another way than parameters
    that were never active. Optimizer and model do not change.

    The copies are of about 100 parameters with at most 4,096 elements, and of the smallest
    parameter of each number of dimensions.

    Returns:
        For each key of which the optimizer has a parameter that gets dummy gradients, the largest
        drift among its parameters.

    Raises:
        UnsupportedEngineError: The optimizer steps another one, or has no learning rate.
        Exception: What the optimizer raises when it steps without a closure.
    """
    groups = [(group, {id(p): p for p in group["params"]}) for group in optimizer.param_groups]
    return _largest_drifts(wrapper, optimizer, groups, steps)


def expected_zero_drift(
    wrapper: DummyLossWrapper, engine: Any, steps: int
) -> dict[ModalityKey, float]:
    """The drift under the optimizer inside ZeRO, as `expected_drift` has it.

    The copies are of the first elements that this rank has of each parameter, without the state of
    the optimizer.
    """

    def first_elements(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(zero_elements(parameter)[:_MAX_SAMPLE_ELEMENTS].float())

    groups = [
        (options, {id(parameter): first_elements(parameter) for parameter in flat.parameters})
        for options, flat in zip(zero_options(engine), zero_flat_parameters(engine), strict=True)
    ]
    return _largest_drifts(wrapper, zero_optimizer(engine), groups, steps)


def _largest_drifts(
    wrapper: DummyLossWrapper, optimizer: Optimizer, groups: Iterable[_Group], steps: int
) -> dict[ModalityKey, float]:
    expected = {}
    for key in wrapper.parameters.paths:
        owned = wrapper.parameters.of_keys([key])
        drifts: list[float] = []
        for options, its in groups:
            in_group = (owned[i]._replace(parameter=its[i]) for i in owned if i in its)
            if samples := _sample_parameters(in_group):
                drifts += _measure_drifts(optimizer, options, samples, wrapper.scale, steps)
        if drifts:
            expected[key] = max(drifts)
    return expected


def _sample_parameters(owned: Iterable[OwnedParameter]) -> list[nn.Parameter]:
    """Some of the parameters that get a dummy gradient, of all shapes."""
    eligible = sorted(parameters_to_try(owned), key=Tensor.numel, reverse=True)
    # Some optimizers treat matrices differently from vectors, so one of each is always tried.
    smallest = {parameter.ndim: parameter for parameter in eligible}
    others = [
        p for p in eligible if p.numel() <= _MAX_SAMPLE_ELEMENTS and p is not smallest[p.ndim]
    ]
    return [*smallest.values(), *others[:: len(others) // _MAX_SAMPLES + 1]]


def _measure_drifts(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    samples: Sequence[nn.Parameter],
    scale: float | None,
    steps: int,
) -> list[float]:
    """The drift of each of the samples, which are all of one parameter group."""
    stepper = optimizer_of_copies(optimizer, group, samples)
    copies, rate = stepper.param_groups[0]["params"], float(stepper.param_groups[0]["lr"])
    for _ in range(steps):
        _set_dummy_gradients(copies, scale)
        step_alone(stepper)
    return [
        _root_mean_square(copied.detach() - parameter.detach()) / steps / rate
        for copied, parameter in zip(copies, samples, strict=True)
    ]


def _set_dummy_gradients(parameters: Sequence[nn.Parameter], scale: float | None) -> None:
    """Give parameters the gradients that backward from their dummy term gives them."""
    for parameter in parameters:
        parameter.grad = None
    with torch.enable_grad():
        shards = list(map(local_shard, parameters))
        dummy_term(shards, scale, read_values=False).connected.backward()


def _root_mean_square(tensor: Tensor) -> float:
    """Root mean square of all elements, or of those in the local shard of a DTensor."""
    # In float64: SGD with a small scale moves a parameter so little that the square underflows in
    # float32.
    return local_shard(tensor).abs().double().square().mean().sqrt().item()
