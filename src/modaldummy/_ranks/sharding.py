"""Engines that split parameters among ranks, and where they cannot bear ranks that differ."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import (
    child_modules,
    fsdp2_reduces_unused,
    fsdp2_reshards,
    is_deepspeed_engine,
    is_fsdp2_unit,
    is_sharded,
    is_zero3_parameter,
    is_zero_parameter,
    zero_overlaps_communication,
    zero_reduces_once,
    zero_stage,
)
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
    parameters: list[OwnedParameter]


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
    own = wrapper.parameters
    around = _surroundings([model, own.model])
    fsdp2 = _fsdp2_limit(wrapper, around)
    found: dict[tuple[Limit, Any], list[OwnedParameter]] = {}
    for located in own.of_keys(own.paths if keys is None else keys).values():
        _, parameter, owner = located
        units, engine = around[owner]
        if engine is not None:
            limit = _zero_limit(engine, parameter.requires_grad, wrapper.scale)
        elif units:
            limit = fsdp2(units, parameter.requires_grad)
        else:
            limit = _limit_of(parameter)
        if limit is not None:
            found.setdefault((limit, engine), []).append(located)
    return [Limited(limit, engine, parameters) for (limit, engine), parameters in found.items()]


def _surroundings(models: Iterable[nn.Module]) -> dict[nn.Module, _Around]:
    """Every module, and what is around it."""
    found: dict[nn.Module, _Around] = {}
    # To ask takes long where the answer is no, so that each class is asked once.
    engines: dict[type[nn.Module], bool] = {}

    def visit(module: nn.Module, around: _Around) -> None:
        kind = type(module)
        if kind not in engines:
            engines[kind] = is_deepspeed_engine(kind)
        if engines[kind]:
            around = around[0], module
        elif is_fsdp2_unit(module):
            around = (*around[0], module), around[1]
        # A model may come after a part of it.
        if module not in found or _depth(around) > _depth(found[module]):
            found[module] = around
            for child in child_modules(module).values():
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
    if is_zero3_parameter(parameter):
        return ZERO_3
    if is_zero_parameter(parameter) and parameter.requires_grad:
        return UNTOLD
    return SPLIT if is_sharded(parameter) else None


def _zero_limit(engine: Any, trainable: bool, scale: float | None) -> Limit | None:
    stage = zero_stage(engine)
    if stage == 3:
        return ZERO_3
    if stage == 0 or not trainable:
        return None
    if (stage == 2 or zero_overlaps_communication(engine)) and not zero_reduces_once(engine):
        return BY_ARRIVAL if scale is not None else STOPPING
    return LEFT_OUT if scale is None else None


def _fsdp2_limit(
    wrapper: DummyLossWrapper, around: Mapping[nn.Module, _Around]
) -> Callable[[tuple[nn.Module, ...], bool], Limit | None]:
    """What FSDP2 cannot bear for a parameter in these units that is trainable or not, or None."""
    own = wrapper.parameters

    @functools.cache
    def runs_always(unit: nn.Module) -> bool:
        if unit in around[own.model][0]:
            return True
        # Beside all modalities it must have something else, or it need not run without any.
        owned = own.all()
        return all(unit in around[owner][0] for _, _, owner in owned.values()) and any(
            id(parameter) not in owned for parameter in unit.parameters()
        )

    @functools.cache
    def limit(units: tuple[nn.Module, ...], trainable: bool) -> Limit | None:
        unit = units[-1]  # the innermost one manages it
        if not runs_always(unit):
            return GATHERED
        if not trainable or fsdp2_reduces_unused(unit):
            return None
        if fsdp2_reshards(unit, outermost=len(units) == 1):
            return RESHARDED
        return SKIPPED if wrapper.scale is None else None

    return limit
