"""Checks of the engines around the model: DDP, FSDP, DeepSpeed and torch.compile."""

from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from modaldummy._arguments import wrappers_in
from modaldummy._core.parameter import is_sparse_table
from modaldummy._core.parameter_map import modalities_of
from modaldummy._engines import (
    DDP_MARKS_TWICE,
    EngineConflict,
    ddp_conflict,
    is_compiled,
    recompile_limit,
    zero_stage,
)
from modaldummy._findings import Finding, Severity
from modaldummy._preflight.setup import Setup
from modaldummy._ranks import conflicts
from modaldummy._ranks.attach import is_attached

_CODES: dict[EngineConflict, tuple[str, Severity]] = {
    conflicts.FSDP1_TOWER_UNIT: ("MD104", "warning"),
    conflicts.FSDP2_TOWER_UNIT: ("MD104", "warning"),
    conflicts.FSDP2_RESHARDED: ("MD104", "warning"),
    conflicts.FSDP2_SCALE_NONE: ("MD104", "warning"),
    conflicts.ZERO2_BUCKET_ORDER: ("MD105", "warning"),
    conflicts.ZERO2_SCALE_NONE: ("MD105", "error"),
    conflicts.ZERO1_SCALE_NONE: ("MD105", "warning"),
    conflicts.ZERO_STAGE_UNKNOWN: ("MD105", "warning"),
    conflicts.ZERO3: ("MD106", "error"),
}


def check_engine(setup: Setup) -> Iterator[Finding]:
    """MD101 to MD107."""
    for ddp in setup.ddps:
        yield from _check_ddp(setup, ddp)
    yield from _check_sharding(setup)
    yield from _check_recompile_limit(setup)


def _check_ddp(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    wrapper, scale, name = setup.wrapper, setup.wrapper.scale, type(ddp.module).__name__
    dummy_inside = wrapper in wrappers_in(ddp) or is_attached(wrapper, ddp.module)
    conflict = ddp_conflict(ddp, scale, dummy_inside=dummy_inside)
    if conflict is DDP_MARKS_TWICE:
        evidence: dict[str, Any] = {"model": name, "find_unused_parameters": True}
        yield Finding("MD101", "error", conflict.message, evidence, conflict.remedy)
    elif conflict is not None:
        evidence = {"model": name, "static_graph": True, "scale": None}
        yield Finding("MD102", "error", conflict.message, evidence, conflict.remedy)
    tables = {i for i, owned in setup.modality_parameters.items() if is_sparse_table(owned)}
    names = setup.names_of(tables.intersection(map(id, ddp.parameters())))
    if names and scale is None:
        yield Finding(
            "MD103",
            "error",
            "With scale=None, DDP stops with 'Expected sparse gradient to be defined' at each "
            "batch without the modality of a sparse embedding.",
            {"parameters": names, "scale": None},
            "Use scale=0.0, or embeddings with sparse=False.",
        )


def _check_sharding(setup: Setup) -> Iterator[Finding]:
    for conflicting in conflicts.find_conflicts(setup.wrapper, setup.model):
        conflict, engine = conflicting.conflict, conflicting.engine
        if conflict not in _CODES:
            continue
        code, severity = _CODES[conflict]
        evidence: dict[str, Any] = {}
        if engine is not None:
            evidence["engine"] = type(engine).__name__
            evidence["zero_optimization_stage"] = zero_stage(engine)
        evidence["parameters"] = [owned.name for owned in conflicting.parameters]
        yield Finding(code, severity, conflict.message, evidence, conflict.remedy)


def _check_recompile_limit(setup: Setup) -> Iterator[Finding]:
    for module in filter(is_compiled, setup.modules):
        keys = setup.keys_of([id(parameter) for parameter in module.parameters()])
        names = {name for key in keys for name in modalities_of(key)}
        num_sets, limit = 2 ** len(names) - 1, recompile_limit(module)
        if num_sets > limit:
            yield Finding(
                "MD107",
                "warning",
                f"The compiled model needs a graph for each of {num_sets} sets of active "
                f"modalities, but Dynamo gives up after {limit} graphs.",
                {"modalities": len(names), "active_sets": num_sets, "recompile_limit": limit},
                f"Set `torch._dynamo.config.recompile_limit = {num_sets}`. Or compile the parts of "
                "the model that run for one modality, and keep the wrapper out of compiled code.",
            )
