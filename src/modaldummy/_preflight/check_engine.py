"""Checks of what is around the model: DDP, FSDP2, DeepSpeed, torch.compile."""

from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

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
from modaldummy._ranks.attach import is_attached
from modaldummy._ranks.limits import (
    BY_ARRIVAL,
    GATHERED,
    LEFT_OUT,
    RESHARDED,
    SKIPPED,
    STOPPING,
    UNTOLD,
    ZERO_3,
    Limit,
)
from modaldummy._ranks.sharding import limits

_LIMITS: dict[Limit, tuple[str, Severity]] = {
    GATHERED: ("MD104", "warning"),
    RESHARDED: ("MD104", "warning"),
    SKIPPED: ("MD104", "warning"),
    BY_ARRIVAL: ("MD105", "warning"),
    STOPPING: ("MD105", "error"),
    LEFT_OUT: ("MD105", "warning"),
    UNTOLD: ("MD105", "warning"),
    ZERO_3: ("MD106", "error"),
}


def check_engine(setup: Setup) -> Iterator[Finding]:
    """MD101 to MD107."""
    for ddp in setup.ddps:
        yield from _unused_parameters(setup, ddp)
        yield from _unreduced_gradients(setup, ddp)
        yield from _undefined_sparse_gradients(setup, ddp)
    yield from _limits(setup)
    yield from _too_many_graphs(setup)


def _unused_parameters(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    values = (value for module in ddp.modules() for value in vars(module).values())
    inside = any(
        setup.wrapper is value or setup.wrapper is getattr(value, "modaldummy_wrapper", None)
        for value in values
    )
    if ddp_marks_twice(ddp) and not inside and not is_attached(setup.wrapper, ddp.module):
        evidence = {"model": type(ddp.module).__name__, "find_unused_parameters": True}
        yield Finding("MD101", "error", DDP_MARKS_TWICE, evidence, DDP_MARKS_TWICE_REMEDY)


def _unreduced_gradients(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    if ddp_never_reduces(ddp, setup.scale):
        evidence = {"model": type(ddp.module).__name__, "static_graph": True, "scale": None}
        yield Finding("MD102", "error", DDP_NEVER_REDUCES, evidence, DDP_NEVER_REDUCES_REMEDY)


def _undefined_sparse_gradients(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    inside = set(map(id, ddp.parameters()))
    tables = [name for name, parameter, _ in setup.tables if id(parameter) in inside]
    if tables and setup.scale is None:
        yield Finding(
            "MD103",
            "error",
            "With scale=None, DDP stops with 'Expected sparse gradient to be defined' where the "
            "modality of a sparse embedding is inactive.",
            {"parameters": tables, "scale": None},
            "Use scale=0.0, or embeddings with sparse=False.",
        )


def _limits(setup: Setup) -> Iterator[Finding]:
    for found in limits(setup.wrapper, setup.model):
        if found.limit not in _LIMITS:
            continue
        code, severity = _LIMITS[found.limit]
        evidence: dict[str, Any] = {"parameters": [name for name, _, _ in found.parameters]}
        if found.engine is not None:
            stage = zero_stage(found.engine)
            engine = {"engine": type(found.engine).__name__, "zero_optimization_stage": stage}
            evidence = engine | evidence
        yield Finding(code, severity, found.limit.message, evidence, found.limit.remedy)


def _too_many_graphs(setup: Setup) -> Iterator[Finding]:
    for module in setup.modules:
        if not is_compiled(module):
            continue
        inside = {id(parameter) for parameter in module.parameters()}
        keys = [key for key, own in setup.owned.items() if not inside.isdisjoint(own)]
        names = {name for key in keys for name in ([key] if isinstance(key, str) else key)}
        sets, limit = 2 ** len(names) - 1, recompile_limit(module)
        if sets > limit:
            yield Finding(
                "MD107",
                "warning",
                f"The compiled model can see {sets} different sets of modalities, each of which "
                f"takes a graph of its own, and Dynamo gives up after {limit}.",
                {"modalities": len(names), "active_sets": sets, "recompile_limit": limit},
                f"Set `torch._dynamo.config.recompile_limit = {sets}`, or compile the parts of the "
                "model that have one modality each, and leave the wrapper out of compiled code.",
            )
