"""Checks of what is around the model: DDP, FSDP2, DeepSpeed, torch.compile."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modaldummy._attach import is_attached
from modaldummy._ddp import (
    TWICE,
    TWICE_REMEDY,
    UNREDUCED,
    UNREDUCED_REMEDY,
    leaves_unreduced,
    marks_twice,
)
from modaldummy._finding import Finding
from modaldummy._setup import Setup


def check_engine(setup: Setup) -> Iterator[Finding]:
    """MD101 to MD107."""
    for ddp in setup.ddps:
        yield from _unused_parameters(setup, ddp)
        yield from _unreduced_gradients(setup, ddp)
        yield from _undefined_sparse_gradients(setup, ddp)
    yield from _sharded_towers(setup)
    yield from _sharded_by_deepspeed(setup)
    yield from _too_many_graphs(setup)


def _unused_parameters(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    values = (value for module in ddp.modules() for value in vars(module).values())
    inside = any(
        setup.wrapper is value or setup.wrapper is getattr(value, "_modaldummy_wrapper", None)
        for value in values
    )
    if marks_twice(ddp) and not inside and not is_attached(setup.wrapper, ddp.module):
        evidence = {"model": type(ddp.module).__name__, "find_unused_parameters": True}
        yield Finding("MD101", "error", TWICE, evidence, TWICE_REMEDY)


def _unreduced_gradients(setup: Setup, ddp: DistributedDataParallel) -> Iterator[Finding]:
    if leaves_unreduced(ddp, setup.scale):
        evidence = {"model": type(ddp.module).__name__, "static_graph": True, "scale": None}
        yield Finding("MD102", "error", UNREDUCED, evidence, UNREDUCED_REMEDY)


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


def _sharded_towers(setup: Setup) -> Iterator[Finding]:
    # The outermost module manages what no other within it does.
    depth = Counter(below for module in setup.sharding for below in module.modules())
    whole = {
        below
        for module in setup.sharding
        if not _reshards(module)
        for below in _if_around_all(module, setup)
        if depth[below] == 1
    }
    sharded = [
        name for name, _, owner in setup.towers.values() if depth[owner] and owner not in whole
    ]
    if sharded:
        yield Finding(
            "MD104",
            "warning",
            "FSDP2 has these modality parameters in shards when the dummy term is computed, and "
            "ranks with different modalities then get wrong gradients, or stop.",
            {"parameters": sharded},
            "Give all ranks the same modalities at each step; or call `fully_shard` on the whole "
            "model alone, with its default of `reshard_after_forward`.",
        )


def _if_around_all(module: nn.Module, setup: Setup) -> set[nn.Module]:
    """All of `module`, if it has all the modalities, so that it runs whichever of them is there."""
    inside = set(module.modules())
    return inside if all(owner in inside for _, _, owner in setup.towers.values()) else set()


def _reshards(module: Any) -> bool:
    """Whether an outermost FSDP2 module puts its parameters back into shards after forward.

    No public attribute tells, so that without the private ones the default is assumed.
    """
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    if getattr(state, "_auto_reshard_after_forward", True):
        return False
    # The singular is that of torch 2.8.
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return any(getattr(group, "post_forward_mesh_info", None) is not None for group in groups)


def _sharded_by_deepspeed(setup: Setup) -> Iterator[Finding]:
    for module in setup.modules:
        stage = getattr(module, "zero_optimization_stage", None)
        number = int(stage()) if callable(stage) else 0
        if number == 2:
            yield Finding(
                "MD105",
                "warning",
                "ZeRO-2 fills its buckets in the order in which gradients arrive, so that ranks "
                "with different modalities mix gradients of different parameters without a word.",
                {"engine": type(module).__name__, "zero_optimization_stage": number},
                "Give all ranks the same modalities at each step, or use ZeRO-1.",
            )
        if number == 3:
            yield Finding(
                "MD106",
                "error",
                "ZeRO-3 leaves parameters empty outside of forward, and backward stops at a dummy "
                "term that is added there.",
                {"engine": type(module).__name__, "zero_optimization_stage": number},
                "Use ZeRO-1; or ZeRO-2 with the same modalities on all ranks at each step.",
            )


def _too_many_graphs(setup: Setup) -> Iterator[Finding]:
    for module in setup.modules:
        # `torch.compile(module)` and `module.compile()`.
        if "_orig_mod" not in module._modules and module._compiled_call_impl is None:
            continue
        inside = {id(parameter) for parameter in module.parameters()}
        keys = [key for key, own in setup.owned.items() if not inside.isdisjoint(own)]
        names = {name for key in keys for name in ([key] if isinstance(key, str) else key)}
        sets, limit = 2 ** len(names) - 1, _recompile_limit(module)
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


def _recompile_limit(module: nn.Module) -> int:
    from torch._dynamo import config

    context = getattr(module, "dynamo_ctx", None)
    own = getattr(getattr(context, "callback", None), "_recompile_limit", None)
    return int(own or config.recompile_limit)
