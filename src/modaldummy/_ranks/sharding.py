"""Finds sharded parameters that do not support ranks with different modalities."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from modaldummy._ranks.conflicts import (
    DTENSOR,
    FSDP2_RESHARDED,
    FSDP2_SCALE_NONE,
    FSDP2_TOWER_UNIT,
    ZERO1_SCALE_NONE,
    ZERO2_BUCKET_ORDER,
    ZERO2_SCALE_NONE,
    ZERO3,
    ZERO_STAGE_UNKNOWN,
    EngineConflict,
)


@dataclass(frozen=True)
class ConflictingParameters:
    """Parameters of the map to which one conflict applies.

    Attributes:
        conflict: What goes wrong.
        engine: The DeepSpeed engine around the parameters, or None.
        parameters: At least one parameter.
    """

    conflict: EngineConflict
    engine: Any
    parameters: list[OwnedParameter]


class _Surroundings(NamedTuple):
    """What is around a module. Each of these may be the module itself.

    Attributes:
        units: FSDP2 units, from the outermost to the innermost.
        engine: The DeepSpeed engine, or None.
    """

    units: tuple[nn.Module, ...] = ()
    engine: Any = None

    @property
    def depth(self) -> int:
        return len(self.units) + (self.engine is not None)


def find_conflicts(
    wrapper: DummyLossWrapper, model: nn.Module, keys: Collection[ModalityKey] | None = None
) -> list[ConflictingParameters]:
    """Find parameters that go wrong if ranks have different modalities, as the model is now.

    Args:
        wrapper: Its map says which modalities own which parameters.
        model: The module that training calls, such as a DeepSpeed engine.
        keys: Keys of the map whose parameters to check; all by default.
    """
    parameters = wrapper.parameters
    surroundings = _find_surroundings([model, parameters.model])
    always_run = _units_that_always_run(wrapper, surroundings)
    conflicting: dict[tuple[EngineConflict, Any], list[OwnedParameter]] = {}
    for owned in parameters.of_keys(parameters.paths if keys is None else keys).values():
        units, engine = surroundings[owned.module]
        trainable = owned.parameter.requires_grad
        if engine is not None:
            conflict = _zero_conflict(engine, trainable, wrapper.scale)
        elif units:
            conflict = _fsdp2_conflict(units, trainable, wrapper.scale, always_run)
        else:
            conflict = _conflict_without_engine(owned.parameter)
        if conflict is not None:
            conflicting.setdefault((conflict, engine), []).append(owned)
    return [ConflictingParameters(*group, owned) for group, owned in conflicting.items()]


def _find_surroundings(models: Iterable[nn.Module]) -> dict[nn.Module, _Surroundings]:
    """What is around each module of the models."""
    surroundings: dict[nn.Module, _Surroundings] = {}
    # The check takes long if the answer is no, so each class is checked once.
    is_engine: Callable[[Any], bool] = functools.cache(is_deepspeed_engine)

    def visit(module: nn.Module, around: _Surroundings) -> None:
        if is_engine(type(module)):
            around = _Surroundings(around.units, module)
        elif is_fsdp2_unit(module):
            around = _Surroundings((*around.units, module), around.engine)
        # The second model may be around the first, and then knows more of what is around it.
        if module not in surroundings or around.depth > surroundings[module].depth:
            surroundings[module] = around
            for child in child_modules(module).values():
                if child is not None:
                    visit(child, around)

    for model in models:
        visit(model, _Surroundings())
    return surroundings


def _units_that_always_run(
    wrapper: DummyLossWrapper, surroundings: Mapping[nn.Module, _Surroundings]
) -> set[nn.Module]:
    """FSDP2 units that forward runs on every rank, whatever modalities its batch contains.

    A unit around the whole model does. So does a unit that contains all modalities and something
    else. A unit that contains only modalities need not run for a batch without modalities.
    """
    owned = wrapper.parameters.all()
    around_owned = {surroundings[one.module].units for one in owned.values()}
    around_all = set.intersection(*map(set, around_owned))
    with_trunk = {u for u in around_all if any(id(p) not in owned for p in u.parameters())}
    return with_trunk | set(surroundings[wrapper.parameters.model].units)


def _fsdp2_conflict(
    units: tuple[nn.Module, ...],
    trainable: bool,
    scale: float | None,
    always_run: Collection[nn.Module],
) -> EngineConflict | None:
    """The conflict of a parameter in FSDP2 units, or None."""
    unit = units[-1]  # The innermost unit manages the parameter.
    if unit not in always_run:
        return FSDP2_TOWER_UNIT
    if not trainable or fsdp2_reduces_unused(unit):
        return None
    if fsdp2_reshards(unit, outermost=len(units) == 1):
        return FSDP2_RESHARDED
    return FSDP2_SCALE_NONE if scale is None else None


def _zero_conflict(engine: Any, trainable: bool, scale: float | None) -> EngineConflict | None:
    """The conflict of a parameter in a DeepSpeed engine, or None."""
    stage = zero_stage(engine)
    if stage == 3:
        return ZERO3
    if stage == 0 or not trainable:
        return None
    if (stage == 2 or zero_overlaps_communication(engine)) and not zero_reduces_once(engine):
        return ZERO2_BUCKET_ORDER if scale is not None else ZERO2_SCALE_NONE
    return ZERO1_SCALE_NONE if scale is None else None


def _conflict_without_engine(parameter: nn.Parameter) -> EngineConflict | None:
    """The conflict that the parameter itself shows, or None.

    A parameter shows that ZeRO-3 shards it. ZeRO-1 and ZeRO-2 look alike on it.
    """
    if is_zero3_parameter(parameter):
        return ZERO3
    if is_zero_parameter(parameter) and parameter.requires_grad:
        return ZERO_STAGE_UNKNOWN
    return DTENSOR if is_sharded(parameter) else None
