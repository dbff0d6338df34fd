"""How far an optimizer would move a modality on nothing but dummy gradients."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._core.term import nonzero_product
from modaldummy._engines import local_shard
from modaldummy._errors import UnsupportedEngineError

# In place of a rate of 0, as at the start of a warm-up; the result is in units of it.
_RATE = 1e-3
_SMALL = 2**12  # elements of a parameter that is carried out, with others of its kind
_MOST = 100  # such parameters, of one key and parameter group


class Drift(NamedTuple):
    """What steps without a hold would do to the parameters of an inactive modality.

    Attributes:
        rates: Displacement per step in learning rates: the root mean square over the elements of a
            parameter, the largest of the parameters.
        relative: Displacement per step in units of the parameter's own root mean square, the
            largest; infinite where a parameter that is 0 moves.
    """

    rates: float
    relative: float


def expected_drift(
    wrapper: DummyLossWrapper, optimizer: Optimizer, *, steps: int = 100
) -> dict[ModalityKey, Drift]:
    """Mean displacement over the next `steps` steps of each key, were it inactive in them all.

    The optimizer's own rule is carried out, from its present state, on copies: of parameters up to
    4,096 elements, of 100 of these or so where there are more, and of the smallest of each number
    of dimensions. So it tells what becomes of parameters that were never active and, once training
    has begun, of those that were. Weight decay and momentum move too, and are counted. Optimizer
    and model stay as they are.

    Returns:
        For each key of which the optimizer has a parameter that gets dummy gradients.

    Raises:
        UnsupportedEngineError: The optimizer steps another one, or has no learning rate.
        Exception: What the optimizer raises when it is stepped without a closure.
    """
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner or not all("lr" in group for group in optimizer.param_groups):
        raise UnsupportedEngineError(
            f"Of {type(optimizer).__name__} no drift can be told, since it "
            + (f"steps another optimizer; ask of its `{inner[0]}`." if inner else "has no `lr`.")
        )
    found = {}
    for key in wrapper.parameters.paths:
        owned = wrapper.parameters.of_keys([key])
        drifts = [
            drift
            for group in optimizer.param_groups
            if (samples := _samples(group["params"], owned))
            for drift in _drifts(optimizer, group, samples, wrapper.scale, steps)
        ]
        if drifts:
            found[key] = Drift(*(max(column) for column in zip(*drifts, strict=True)))
    return found


def _samples(
    params: Iterable[nn.Parameter], owned: Mapping[int, OwnedParameter]
) -> list[nn.Parameter]:
    """Of `params` that are owned and get a dummy of their size, small ones of every kind."""
    eligible = [
        parameter
        for parameter in params
        if (located := owned.get(id(parameter))) is not None
        and parameter.requires_grad
        and parameter.numel()
        and not located.is_sparse_table
    ]
    # Some rules go by the shape: a matrix, however large, says what a vector does not.
    least = {
        ndim: min((p for p in eligible if p.ndim == ndim), key=Tensor.numel)
        for ndim in {parameter.ndim for parameter in eligible}
    }
    small = [p for p in eligible if p.numel() <= _SMALL and p is not least[p.ndim]]
    return [*least.values(), *small[:: len(small) // _MOST + 1]]


def _drifts(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    samples: Sequence[nn.Parameter],
    scale: float | None,
    steps: int,
) -> list[Drift]:
    """What `steps` steps do to each of the samples, which are of one parameter group."""
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in samples]
    options = {name: copy.deepcopy(group[name]) for name in group if name != "params"}
    rate = float(options["lr"]) or float(options.get("initial_lr", 0.0)) or _RATE
    if not float(options["lr"]):
        options["lr"] = rate
    stepper = _twin(optimizer)
    stepper.param_groups = [options | {"params": twins}]
    for twin, parameter in zip(twins, samples, strict=True):
        if parameter in optimizer.state:
            stepper.state[twin] = copy.deepcopy(optimizer.state[parameter])
    for _ in range(steps):
        for twin in twins:
            twin.grad = None if scale is None else _gradient(twin, scale)
        stepper.step()
    drifts = []
    for twin, parameter in zip(twins, samples, strict=True):
        length = _rms(twin.detach() - parameter.detach()) / steps
        size = _rms(parameter.detach())
        drifts.append(Drift(length / rate, length / size if size else math.inf if length else 0.0))
    return drifts


def _gradient(parameter: Tensor, scale: float) -> Tensor:
    value = nonzero_product(torch.ones((), device=parameter.device), scale, parameter.dtype)
    return torch.zeros_like(parameter) + value


def _twin(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the settings of another, without its parameters, state and hooks."""
    twin = object.__new__(type(optimizer))
    kept = {
        name: value
        for name, value in vars(optimizer).items()
        # A learning rate schedule puts a `step` there that is bound to the optimizer itself.
        if name not in ("step", "state", "param_groups") and not name.startswith("_optimizer_")
    }
    twin.__setstate__(kept | {"state": defaultdict(dict), "param_groups": []})
    return twin


def _rms(tensor: Tensor) -> float:
    """Root mean square of all elements that are here."""
    # In float64: the square of what SGD makes of a small scale is below all float32.
    return local_shard(tensor).abs().double().square().mean().sqrt().item()
