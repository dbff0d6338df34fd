"""Checks of the engines around the model: DDP, FSDP2, DeepSpeed and torch.compile."""

from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from modaldummy._arguments import wrappers_in
from modaldummy._core.parameter import is_sparse_table
from modaldummy._engines import (
    DDP_MARKS_TWICE,
    DDP_MARKS_TWICE_REMEDY,
    DDP_NEVER_REDUCES,
    DDP_NEVER_REDUCES_REMEDY,
    ddp_marks_twice,
    ddp_never_reduces,
    is_compiled,
    recompile_limit,
    zero_stage,
)
from modaldummy._findings import Finding, Severity
from modaldummy._preflight.setup import Setup
from modaldummy._ranks import conflicts
from modaldummy._ranks.attach import is_attached
from modaldummy._ranks.conflicts import find_conflicts

_CODES: dict[conflicts.EngineConflict, tuple[str, Severity]] = {
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
    name, scale = type(ddp.module).__name__, setup.wrapper.scale
    dummy_inside = setup.wrapper in wrappers_in(ddp)
    if ddp_marks_twice(ddp) and not dummy_inside and not is_attached(setup.wrapper, ddp.module):
        evidence: dict[str, Any] = {"model": name, "find_unused_parameters": True}
        yield Finding("MD101", "error", DDP_MARKS_TWICE, evidence, DDP_MARKS_TWICE_REMEDY)
    if ddp_never_reduces(ddp, scale):
        evidence = {"model": name, "static_graph": True, "scale": None}
        yield Finding("MD102", "error", DDP_NEVER_REDUCES, evidence, DDP_NEVER_REDUCES_REMEDY)
    sparse = {i: owned for i, owned in setup.modality_parameters.items() if is_sparse_table(owned)}
    ddp_ids = set(map(id, ddp.parameters()))
    names = [owned.name for i, owned in sparse.items() if i in ddp_ids]
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
    for conflicting in find_conflicts(setup.wrapper, setup.model):
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
        names = {name for key in keys for name in ([key] if isinstance(key, str) else key)}
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
