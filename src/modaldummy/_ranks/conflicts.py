"""Which parameters do not support ranks with different modalities under their engine, and why."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter, slot_of
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import (
    ZERO3_REMEDY,
    EngineConflict,
    child_modules,
    fsdp2_reduces_unused,
    fsdp2_reshards,
    is_deepspeed_engine,
    is_fsdp1_unit,
    is_fsdp2_unit,
    is_sharded,
    is_zero3_parameter,
    is_zero_parameter,
    zero_overlaps_communication,
    zero_reduces_once,
    zero_stage,
)


def _one_of(*remedies: str) -> str:
    """Join clauses to sentences such as `Do this. Or do that.`."""
    text = ". Or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."


# What the user sees.
_GATHERS_MISMATCH = (
    "If ranks have different modalities, their all-gathers do not match: the result is silently "
    "wrong or the job hangs."
)
_GRADIENTS_MIX = (
    "If ranks have different modalities, the engine adds up gradients of different parameters: "
    "the result is silently wrong"
)

# What the user can do, as clauses for `_one_of`.
_SAME_MODALITIES = (
    "give all ranks the same modalities at each step, for instance with `ModalityBatchSampler`"
)
_WRAP_ALL = "wrap only the whole model in `FullyShardedDataParallel`, without `auto_wrap_policy`"
_SHARD_ALL = "call `fully_shard` only on the whole model, with its default `reshard_after_forward`"
_REDUCE_ZEROS = "call `set_reduce_scatter_unused_params(True)`, which needs torch 2.13"
_REDUCE_ONCE = "run `check_ranks`, forward and backward in `with engine.coalesce_grad_reduction():`"
_RUN_ALL_TOWERS = (
    "run all towers on every rank, inactive ones on an empty batch, and pass `wrapper.modalities`"
)

FSDP1_TOWER_UNIT = EngineConflict(
    f"These parameters are in their own FSDP1 unit. {_GATHERS_MISMATCH}",
    _one_of(_SAME_MODALITIES, _WRAP_ALL, f"{_RUN_ALL_TOWERS} to `check_ranks`"),
)
FSDP2_TOWER_UNIT = EngineConflict(
    f"These parameters are in their own FSDP2 unit. {_GATHERS_MISMATCH}",
    _one_of(_SAME_MODALITIES, _SHARD_ALL, f"{_RUN_ALL_TOWERS} to `check_ranks`"),
)
FSDP2_RESHARDED = EngineConflict(
    "FSDP2 has resharded these parameters before the dummy term is computed. Its reduce-scatter "
    f"leaves out parameters that forward did not use. {_GRADIENTS_MIX} or the job hangs.",
    _one_of(_SAME_MODALITIES, _SHARD_ALL, _REDUCE_ZEROS),
)
FSDP2_SCALE_NONE = EngineConflict(
    "With scale=None, FSDP2 leaves inactive parameters out of its reduce-scatter. "
    f"{_GRADIENTS_MIX} or the job hangs.",
    _one_of("use scale=0.0", _REDUCE_ZEROS, _SAME_MODALITIES),
)
ZERO1_SCALE_NONE = EngineConflict(
    "With scale=None, ZeRO-1 leaves inactive parameters out of its buckets. "
    f"{_GRADIENTS_MIX} or the job hangs.",
    _one_of("use scale=0.0", _SAME_MODALITIES),
)
ZERO2_BUCKET_ORDER = EngineConflict(
    "ZeRO-2, like ZeRO-1 with `overlap_comm`, fills its buckets in the order in which gradients "
    f"arrive. {_GRADIENTS_MIX}.",
    _one_of(_SAME_MODALITIES, "use ZeRO-1 without `overlap_comm`", _REDUCE_ONCE),
)
ZERO2_SCALE_NONE = EngineConflict(
    "With scale=None, backward under ZeRO-2, as under ZeRO-1 with `overlap_comm`, stops at the "
    "first inactive parameter, even if all ranks have the same modalities.",
    _one_of(f"use scale=0.0, and {_SAME_MODALITIES}", "use ZeRO-1 without `overlap_comm`"),
)
ZERO_STAGE_UNKNOWN = EngineConflict(
    "DeepSpeed has partitioned these parameters, and only its engine knows the ZeRO stage. Under "
    "ZeRO-2, ranks with different modalities silently add up gradients of different parameters.",
    "Pass `model=engine`.",
)
ZERO3 = EngineConflict(
    f"ZeRO-3 gathers each parameter when forward needs it. {_GATHERS_MISMATCH} Outside of forward "
    "the parameters are empty, and backward stops at a dummy term.",
    ZERO3_REMEDY,
)
DTENSOR = EngineConflict(
    "These parameters are DTensors, which the ranks of a mesh share. If these ranks have different "
    "modalities, the result is silently wrong or the job hangs.",
    "Give all ranks of a mesh the same batch. If only these ranks have to agree, pass `group=`. If "
    "FSDP2 shards a module around the model of the wrapper, pass that module as `model=`.",
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
        if wrapper.interceptor is not None and wrapper.interceptor.covers(slot_of(owned)):
            continue
        around = surroundings[owned.module]
        trainable = owned.parameter.requires_grad
        engine = next((m for m in reversed(around) if is_deepspeed_engine(type(m))), None)
        if engine is not None:
            conflict = _zero_conflict(engine, trainable, wrapper.scale)
        elif around:
            conflict = _fsdp_conflict(around, trainable, wrapper.scale, always_run)
        else:
            conflict = _conflict_without_engine(owned.parameter)
        if conflict is not None:
            conflicting.setdefault((conflict, engine), []).append(owned)
    return [ConflictingParameters(*group, owned) for group, owned in conflicting.items()]


def _find_surroundings(models: Iterable[nn.Module]) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """The FSDP units and DeepSpeed engines around each module of the models, outermost first.

    A module that is one itself is the last of them.
    """
    surroundings: dict[nn.Module, tuple[nn.Module, ...]] = {}
    # The check takes long if the answer is no, so each class is checked once.
    is_engine: Callable[[Any], bool] = functools.cache(is_deepspeed_engine)

    def visit(module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        if is_engine(type(module)) or is_fsdp1_unit(module) or is_fsdp2_unit(module):
            around = (*around, module)
        # The second model may be around the first, and then knows more of what is around it.
        if module not in surroundings or len(around) > len(surroundings[module]):
            surroundings[module] = around
            for child in child_modules(module).values():
                if child is not None:
                    visit(child, around)

    for model in models:
        visit(model, ())
    return surroundings


def _units_that_always_run(
    wrapper: DummyLossWrapper, surroundings: Mapping[nn.Module, tuple[nn.Module, ...]]
) -> set[nn.Module]:
    """FSDP units that forward runs on every rank, whatever modalities its batch contains.

    A unit around the whole model does. So does a unit that contains all modalities and something
    else. A unit that contains only modalities need not run for a batch without modalities.
    """
    owned = wrapper.parameters.all()
    around_all = set.intersection(*(set(surroundings[one.module]) for one in owned.values()))
    with_trunk = {u for u in around_all if any(id(p) not in owned for p in u.parameters())}
    return with_trunk | set(surroundings[wrapper.parameters.model])


def _fsdp_conflict(
    units: tuple[nn.Module, ...],
    trainable: bool,
    scale: float | None,
    always_run: Collection[nn.Module],
) -> EngineConflict | None:
    """The conflict of a parameter in FSDP units, or None."""
    unit = units[-1]  # The innermost unit manages the parameter.
    is_fsdp1 = is_fsdp1_unit(unit)
    if unit not in always_run:
        return FSDP1_TOWER_UNIT if is_fsdp1 else FSDP2_TOWER_UNIT
    if is_fsdp1 or not trainable or fsdp2_reduces_unused(unit):
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


def fills_buckets_on_arrival(model: nn.Module) -> bool:
    """Whether DeepSpeed reduces gradients in the order in which they arrive, or may do so.

    Without an engine in the model, its parameters do not say which stage has partitioned them.
    """
    engines: list[Any] = [m for m in model.modules() if is_deepspeed_engine(type(m))]
    if not engines:
        return any(map(is_zero_parameter, model.parameters()))
    return any(zero_stage(e) > 1 or zero_overlaps_communication(e) for e in engines)


def _conflict_without_engine(parameter: nn.Parameter) -> EngineConflict | None:
    """The conflict that the parameter itself shows, or None.

    A parameter shows that ZeRO-3 shards it. ZeRO-1 and ZeRO-2 look alike on it.
    """
    if is_zero3_parameter(parameter):
        return ZERO3
    if is_zero_parameter(parameter) and parameter.requires_grad:
        return ZERO_STAGE_UNKNOWN
    return DTENSOR if is_sharded(parameter) else None
