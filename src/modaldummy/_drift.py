"""How far an optimizer would move a modality on nothing but dummy gradients."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._kinds import is_sparse_table
from modaldummy._modalities import ModalityKey
from modaldummy._paths import Located
from modaldummy._term import nonzero_product
from modaldummy._wrapper import DummyLossWrapper

# In place of a rate of 0, as at the start of a warm-up; the result is in units of it.
_RATE = 1e-3


class Drift(NamedTuple):
    """What steps without a hold would do to the parameters of an inactive modality.

    Attributes:
        rates: Root mean square of the displacement of an element, in learning rates per step.
        relative: The same in units of the root mean square of the parameters, per step; infinite
            where all of them are 0.
    """

    rates: float
    relative: float


def expected_drift(
    wrapper: DummyLossWrapper, optimizer: Optimizer, *, steps: int = 100
) -> dict[ModalityKey, Drift]:
    """Mean displacement over the next `steps` steps of each key, were it inactive in them all.

    The optimizer's own rule is carried out, from its present state, on a copy of the smallest
    parameter of each key and parameter group; the largest result counts. So it tells what becomes
    of parameters that were never active and, once training has begun, of those that were. Weight
    decay and momentum move too, and are counted. Optimizer and model stay as they are.

    Returns:
        For each key of which the optimizer has a parameter that gets dummy gradients.

    Raises:
        Exception: Whatever the optimizer raises when it is stepped without a closure.
    """
    found = {}
    for key in wrapper._map.paths:
        owned = wrapper._map.owned([key])
        drifts = [
            _drift(optimizer, group, smallest, wrapper._scale, steps)
            for group in optimizer.param_groups
            if (smallest := _smallest(group["params"], owned)) is not None
        ]
        if drifts:
            size = _rms([parameter for _, parameter, _ in owned.values()])
            rate, length = (max(column) for column in zip(*drifts, strict=True))
            found[key] = Drift(rate, length / size if size else math.inf if length else 0.0)
    return found


def _smallest(params: Iterable[nn.Parameter], owned: Mapping[int, Located]) -> nn.Parameter | None:
    """The smallest of `params` that is owned and gets a dummy gradient of its own size."""
    candidates = [
        parameter
        for parameter in params
        if (located := owned.get(id(parameter))) is not None
        and parameter.requires_grad
        and parameter.numel()
        and not is_sparse_table(located)
    ]
    return min(candidates, key=Tensor.numel, default=None)


def _drift(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    scale: float | None,
    steps: int,
) -> tuple[float, float]:
    """Displacement per step of one parameter, in learning rates and as it is."""
    twin = nn.Parameter(parameter.detach().clone())
    options = {name: copy.deepcopy(group[name]) for name in group if name != "params"}
    rate = float(options["lr"]) or float(options.get("initial_lr", 0.0)) or _RATE
    if not float(options["lr"]):
        options["lr"] = rate
    stepper = _twin(optimizer)
    stepper.param_groups = [options | {"params": [twin]}]
    if parameter in optimizer.state:
        stepper.state[twin] = copy.deepcopy(optimizer.state[parameter])
    if scale is not None:
        one = torch.ones((), device=twin.device)
        value = nonzero_product(one, scale, twin.dtype)
    for _ in range(steps):
        twin.grad = None if scale is None else torch.zeros_like(twin) + value
        stepper.step()
    length = _rms([twin.detach() - parameter.detach()]) / steps
    return length / rate, length


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


def _rms(tensors: Iterable[Tensor]) -> float:
    """Root mean square of all elements, of the local shard where they are sharded."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    count = sum(map(Tensor.numel, parts))
    squares = sum(part.detach().abs().double().square().sum().item() for part in parts)
    return math.sqrt(squares / count) if count else 0.0
