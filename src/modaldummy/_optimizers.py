"""What an optimizer contains, and what a copy of it does with copies of parameters."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from modaldummy._core.parameter import OwnedParameter, is_sparse_table
from modaldummy._engines import copy_settings, local_shard, step_alone
from modaldummy._errors import UnsupportedEngineError

_Group: TypeAlias = Mapping[str, Any]  # the options and parameters of a parameter group

# Replaces a learning rate of 0, as at the start of a warm-up.
_ASSUMED_RATE = 1e-3
_REMEDY = (
    "Give the modalities an optimizer that skips them. Those of `torch.optim` do, except LBFGS and "
    "SGD with momentum and `fused=True`; with SGD pass `foreach=True`."
)


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """All parameters that an optimizer has now."""
    for group in optimizer.param_groups:
        yield from group["params"]


def parameter_ids_of(optimizer: Optimizer) -> set[int]:
    """`id` of each parameter that an optimizer has now."""
    return set(map(id, parameters_of(optimizer)))


def optimizers_inside(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer wraps: those among its attributes."""
    return [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]


def parameters_to_try(owned: Iterable[OwnedParameter]) -> list[Parameter]:
    """Those of the parameters that get a dense gradient with elements."""
    trainable = [each for each in owned if each.parameter.requires_grad and each.parameter.numel()]
    return [each.parameter for each in trainable if not is_sparse_table(each)]


def optimizer_of_copies(
    optimizer: Optimizer, group: _Group, parameters: Sequence[Parameter]
) -> Optimizer:
    """A copy of an optimizer that has copies of some parameters of one of its groups.

    It has the options of the group and the present state of the parameters. Its steps change
    neither the optimizer nor the model.

    Raises:
        UnsupportedEngineError: The optimizer steps another one, or has no learning rate.
    """
    wraps_others = bool(optimizers_inside(optimizer))
    if wraps_others or "lr" not in group:
        reason = "steps other optimizers" if wraps_others else "has no `lr`"
        raise UnsupportedEngineError(f"{type(optimizer).__name__} cannot be copied: it {reason}.")
    options = {name: copy.deepcopy(group[name]) for name in group if name != "params"}
    options["lr"] = options["lr"] or options.get("initial_lr") or _ASSUMED_RATE
    copies = [Parameter(parameter.detach().clone()) for parameter in parameters]
    copied = copy_settings(optimizer)
    copied.param_groups = [options | {"params": copies}]
    for parameter, its_copy in zip(parameters, copies, strict=True):
        if parameter in optimizer.state:
            copied.state[its_copy] = copy.deepcopy(optimizer.state[parameter])
    return copied


def why_not_held(optimizer: Optimizer, owned: Mapping[int, OwnedParameter]) -> str | None:
    """What an optimizer does to parameters without a gradient, and a remedy.

    A copy of the optimizer steps copies of the smallest parameter of each number of dimensions in
    each of its groups, because some optimizers treat matrices differently from vectors.

    Args:
        optimizer: The optimizer.
        owned: The parameters of the map, by `id`.

    Returns:
        None if it skips them, or cannot be tried, for instance because it needs a closure.
    """
    if isinstance(optimizer, LBFGS):
        return f"LBFGS moves all of its parameters along one direction. {_REMEDY}"
    for group in optimizer.param_groups:
        parameters = parameters_to_try(owned[id(p)] for p in group["params"] if id(p) in owned)
        # Those without a state first: some optimizers fail only at a late first gradient.
        parameters.sort(key=lambda p: (bool(optimizer.state.get(p)), p.numel()), reverse=True)
        for parameter in {p.ndim: p for p in parameters}.values():
            fault = _fault(optimizer, group, parameter, (False, True, False))
            # What also fails with all gradients cannot be tried.
            if fault and not _fault(optimizer, group, parameter, (True, True, True)):
                return f"{type(optimizer).__name__} {fault}. {_REMEDY}"
    return None


def _fault(
    optimizer: Optimizer, group: _Group, parameter: Parameter, gradients: Sequence[bool]
) -> str | None:
    """What steps of a copy of an optimizer do wrong with a copy of a parameter, or None.

    Another copy gets a gradient at each step, because some optimizers skip steps without any.

    Args:
        optimizer: The optimizer.
        group: The group of the parameter.
        parameter: The parameter.
        gradients: For each step, whether the copy gets a gradient.
    """
    try:
        stepper = optimizer_of_copies(optimizer, group, [parameter] * 2)
        other, copied = stepper.param_groups[0]["params"]
        with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
            for has_gradient in gradients:
                copied.data.fill_(1)  # weight decay does not change zeros
                other.grad = torch.ones_like(other)
                copied.grad = torch.ones_like(other) if has_gradient else None
                step_alone(stepper)
                if not has_gradient and local_shard(copied.detach()).ne(1).any():
                    return "changes parameters that have no gradient"
    except Exception as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"fails if a parameter has no gradient ({what})"
    return None
