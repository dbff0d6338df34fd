"""Engines that split parameters among ranks, and where they cannot bear ranks that differ."""

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from modaldummy._kinds import is_sharded
from modaldummy._modalities import ModalityKey
from modaldummy._paths import Located
from modaldummy._ranks.limits import (
    BY_ARRIVAL,
    GATHERED,
    LEFT_OUT,
    RESHARDED,
    SKIPPED,
    SPLIT,
    STOPPING,
    UNTOLD,
    ZERO_3,
    Limit,
)
from modaldummy._wrapper import DummyLossWrapper


@dataclass(frozen=True)
class Limited:
    """Parameters of the map that a limit is about.

    Attributes:
        limit: The limit.
        engine: The DeepSpeed engine around them, or None.
        parameters: At least one.
    """

    limit: Limit
    engine: Any
    parameters: list[Located]


# The FSDP2 units around a module, the outermost first, and the DeepSpeed engine, or None; either
# may be the module itself.
_Around: TypeAlias = tuple[tuple[nn.Module, ...], Any]
_NOTHING: _Around = ((), None)


def limits(
    wrapper: DummyLossWrapper, model: nn.Module, keys: Collection[ModalityKey] | None = None
) -> list[Limited]:
    """Where ranks whose modalities differ go wrong, as the model is now.

    Args:
        wrapper: Its map says which parameters are of modalities.
        model: The model as it is called, with whatever is around it.
        keys: Keys of the map whose parameters to look at; all by default.
    """
    own = wrapper._map
    around = _surroundings([model, own.model])
    fsdp2 = _fsdp2_limit(wrapper, around)
    found: dict[tuple[Limit, Any], list[Located]] = {}
    for located in own.owned(own.paths if keys is None else keys).values():
        _, parameter, owner = located
        units, engine = around[owner]
        if engine is not None:
            limit = _zero_limit(engine, parameter.requires_grad, wrapper._scale)
        elif units:
            limit = fsdp2(units, parameter.requires_grad)
        else:
            limit = _limit_of(parameter)
        if limit is not None:
            found.setdefault((limit, engine), []).append(located)
    return [Limited(limit, engine, parameters) for (limit, engine), parameters in found.items()]


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was called on it."""
    return isinstance(module, _unit_class())


def _unit_class() -> Any:
    # Who shards has imported it; importing it here would take long.
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def stage_of(engine: Any) -> int:
    """The ZeRO stage of a DeepSpeed engine, 0 for none."""
    return int(engine.zero_optimization_stage())


def _surroundings(models: Iterable[nn.Module]) -> dict[nn.Module, _Around]:
    """Every module, and what is around it."""
    found: dict[nn.Module, _Around] = {}
    unit_class = _unit_class()
    # To ask takes long where the answer is no, so that each class is asked once.
    engines: dict[type[nn.Module], bool] = {}

    def visit(module: nn.Module, around: _Around) -> None:
        kind = type(module)
        if kind not in engines:
            engines[kind] = hasattr(kind, "zero_optimization_stage")
        if engines[kind]:
            around = around[0], module
        elif isinstance(module, unit_class):
            around = (*around[0], module), around[1]
        # A model may come after a part of it.
        if module not in found or _depth(around) > _depth(found[module]):
            found[module] = around
            for child in module._modules.values():
                if child is not None:
                    visit(child, around)

    for model in models:
        visit(model, _NOTHING)
    return found


def _depth(around: _Around) -> int:
    return len(around[0]) + (around[1] is not None)


def _limit_of(parameter: nn.Parameter) -> Limit | None:
    """What a parameter around which no engine is seen cannot bear, or None.

    Of ZeRO-3 it tells by itself, of ZeRO-1 and ZeRO-2 that it is one of them.
    """
    attributes = vars(parameter)
    if "ds_id" in attributes:
        return ZERO_3
    if "_hp_mapping" in attributes and parameter.requires_grad:
        return UNTOLD
    return SPLIT if is_sharded(parameter) else None


def _zero_limit(engine: Any, trainable: bool, scale: float | None) -> Limit | None:
    stage = stage_of(engine)
    if stage == 3:
        return ZERO_3
    if stage == 0 or not trainable:
        return None
    if (stage == 2 or _overlaps(engine)) and not _reduces_once(engine):
        return BY_ARRIVAL if scale is not None else STOPPING
    return LEFT_OUT if scale is None else None


def _overlaps(engine: Any) -> bool:
    return hasattr(engine, "zero_overlap_comm") and bool(engine.zero_overlap_comm())


def _reduces_once(engine: Any) -> bool:
    """Whether this is inside of `with engine.coalesce_grad_reduction():`.

    All gradients are then reduced at its end, in the order of the parameters.
    """
    optimizer = getattr(engine, "optimizer", None)
    return bool(getattr(optimizer, "_coalesce_grad_reduction", False))


def _fsdp2_limit(
    wrapper: DummyLossWrapper, around: Mapping[nn.Module, _Around]
) -> Callable[[tuple[nn.Module, ...], bool], Limit | None]:
    """What FSDP2 cannot bear for a parameter in these units that is trainable or not, or None."""
    own = wrapper._map

    @functools.cache
    def runs_always(unit: nn.Module) -> bool:
        if unit in around[own.model][0]:
            return True
        # Beside all modalities it must have something else, or it need not run without any.
        owned = own.owned(own.paths)
        return all(unit in around[owner][0] for _, _, owner in owned.values()) and any(
            id(parameter) not in owned for parameter in unit.parameters()
        )

    @functools.cache
    def limit(units: tuple[nn.Module, ...], trainable: bool) -> Limit | None:
        unit = units[-1]  # the innermost one manages it
        if not runs_always(unit):
            return GATHERED
        if not trainable or _reduces_zeros(unit):
            return None
        if _reshards(unit, outermost=len(units) == 1):
            return RESHARDED
        return SKIPPED if wrapper._scale is None else None

    return limit


def _reduces_zeros(unit: nn.Module) -> bool:
    """Whether an FSDP2 unit reduces zeros for what got no gradient, which torch 2.13 can do."""
    groups = _groups(_state(unit))
    return bool(groups) and all(
        getattr(group, "reduce_scatter_unused_params", False) for group in groups
    )


def _reshards(unit: nn.Module, *, outermost: bool) -> bool:
    """Whether an FSDP2 unit puts its parameters back into shards after forward.

    No public attribute tells, so that without the private ones the default is assumed.
    """
    state = _state(unit)
    if outermost and getattr(state, "_auto_reshard_after_forward", True):
        return False
    groups = _groups(state)
    if not groups:
        return not outermost
    return any(getattr(group, "post_forward_mesh_info", None) is not None for group in groups)


def _state(unit: Any) -> Any:
    return unit._get_fsdp_state() if hasattr(unit, "_get_fsdp_state") else None


def _groups(state: Any) -> list[Any]:
    # The singular is that of torch 2.8.
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return [group for group in groups if group is not None]
