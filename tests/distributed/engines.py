"""The engines that the oracle is run on, each made on every rank."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper, attach_to_outputs, shadow_inactive
from modaldummy._core.paths import strip_wrappers
from tests.distributed.oracle import (
    MAP,
    NAMES,
    Active,
    Late,
    Make,
    Model,
    Outcome,
    Run,
    Schedule,
    batch_of,
    held_against_truth,
)

needs_averages = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="on gloo, FSDP2 of torch 2.8 sums gradients instead of averaging them",
)

# So small that a few parameters fill a bucket.
SMALL: dict[str, Any] = {"bucket_cap_mb": 1e-4}


class Checkpointed(Model):
    """Runs each part again during backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def run(self, part: nn.Module, data: Tensor) -> Tensor:
        # A reentrant checkpoint asks for data with a gradient.
        data = data if data.requires_grad else data.clone().requires_grad_()
        output: Tensor = checkpoint(part, data, use_reentrant=self.reentrant)
        return output


class EveryTower(Model):
    """Runs each part in the same order, whatever the batch holds: absent ones on no samples."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = batch["text"]
        for name in NAMES:
            data = batch.get(name, hidden.new_empty(0, 3))
            output = self.towers[name](data).tanh()
            hidden = hidden + (output if name in batch else output.sum())
        both = {"T1", "dMRI"} <= batch.keys()
        output = self.fusion(hidden if both else hidden[:0])
        logits: Tensor = self.trunk(hidden + (output if both else output.sum()))
        return logits


class Exact(Run):
    """In float64, so that no rounding hides the share of a dummy in a gradient."""

    dtype = torch.float64
    relative = 2**-40


class DDP(Exact):
    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        engine: Any = getattr(self.call, "_orig_mod", self.call)
        return nullcontext() if last else engine.no_sync()


class Compressed(DDP):
    """A dummy of 1e-7 is below the normal numbers of float16."""

    dtype = torch.float32
    relative, absolute = 2**-8, 2**-23


class Rough(DDP):
    dtype = torch.float32
    relative = 2**-6


class FSDP(Exact):
    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        model: Any = self.bare
        model.set_requires_gradient_sync(last)
        return nullcontext()


class ShardedDummies(FSDP):
    """The dummy is that of this rank's shard, and no average over ranks."""

    absolute = 1.01e-7


class EveryTowerRuns(ShardedDummies):
    def running(self, active: Active) -> Active:
        return NAMES


class FSDP1(Exact):
    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        model: Any = self.bare
        return nullcontext() if last else model.no_sync()

    def values(self) -> dict[str, Tensor]:
        return self.whole(lambda parameter: parameter.detach().double().clone())

    def gradients(self) -> dict[str, Tensor | None]:
        return self.whole(lambda p: None if p.grad is None else p.grad.clone(), with_grads=True)

    def whole(self, read: Callable[[Tensor], Any], *, with_grads: bool = False) -> dict[str, Any]:
        """What `read` finds in each parameter, while it is whole."""
        model: Any = self.bare
        with model.summon_full_params(model, writeback=False, with_grads=with_grads):
            return {strip_wrappers(name): read(p) for name, p in model.named_parameters()}


class LateFSDP(FSDP):
    reference = Late


class LateFSDP1(FSDP1):
    reference = Late


class FSDP1WithoutDummies(FSDP1):
    """FSDP1 itself gives inactive parameters gradients, of zero."""

    absolute = 1.01e-7


class RoughFSDP(FSDP):
    """Forward and backward run in bfloat16."""

    dtype = torch.float32
    relative, absolute = 2**-4, 2**-7


def ddp(
    model: Callable[[], Model] = Model,
    *,
    kind: type[Run] = DDP,
    attached: bool = False,
    compiled: bool = False,
    hook: Any = None,
    **options: Any,
) -> Make:
    def make(scale: float | None) -> Run:
        bare = model().to(kind.dtype)
        engine = DistributedDataParallel(bare, **options)
        if hook is not None:
            engine.register_comm_hook(None, hook)
        wrapper = DummyLossWrapper(bare if attached else engine, MAP, scale)
        if attached:
            attach_to_outputs(wrapper, engine)
        call: Any = torch.compile(engine, backend="aot_eager") if compiled else engine
        return kind(call, bare, wrapper)

    return make


def fsdp(
    *parts: str,
    model: Callable[[], Any] = Model,
    zeros: bool = False,
    early: bool = False,
    kind: type[Run] = FSDP,
    **options: Any,
) -> Make:
    """`fully_shard` of parts, one by one, and of the whole.

    Args:
        parts: Paths; none for a single group.
        model: Makes the model.
        zeros: Let FSDP2 reduce zeros for what had no gradient.
        early: Make the wrapper first.
        kind: The `Run` that it makes.
        options: Of `fully_shard` for the whole.
    """

    def make(scale: float | None) -> Run:
        bare = model().to(kind.dtype)
        wrapper = DummyLossWrapper(bare, MAP, scale) if early else None
        for part in parts:
            fully_shard(bare.get_submodule(part))
        fully_shard(bare, **options)
        if zeros:
            bare.set_reduce_scatter_unused_params(True)
        return kind(bare, bare, wrapper or DummyLossWrapper(bare, MAP, scale))

    return make


def bf16_hook(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # public, but not in the stubs
) -> Future[Tensor]:
    """That of torch asks for NCCL."""
    narrow = bucket.buffer().to(torch.bfloat16) / dist.get_world_size()
    work: Any = dist.all_reduce(narrow, async_op=True)

    def widened(future: Future[Any]) -> Tensor:
        wide: Tensor = bucket.buffer().copy_(future.value()[0])
        return wide

    future: Future[Tensor] = work.get_future().then(widened)
    return future


def fsdp1(
    *parts: str,
    model: Callable[[], Model] = Model,
    early: bool = False,
    kind: type[Run] = FSDP1WithoutDummies,
    **options: Any,
) -> Make:
    """`FullyShardedDataParallel` around parts, one by one, and the whole; see `fsdp`."""

    def make(scale: float | None) -> Run:
        bare: nn.Module = model().to(kind.dtype)
        wrapper = DummyLossWrapper(bare, MAP, scale) if early else None
        options["device_id"] = torch.device("cpu")
        for part in parts:
            unit = FullyShardedDataParallel(bare.get_submodule(part), **options)
            bare.set_submodule(part, unit)
        engine = FullyShardedDataParallel(bare, **options)
        return kind(engine, engine, wrapper or DummyLossWrapper(engine, MAP, scale))

    options.setdefault("use_orig_params", True)
    return make


def shadowed(make: Make) -> Make:
    """The same engine with a shadow, recorded on a batch of each rank's own."""

    def make_with_shadow(scale: float | None) -> Run:
        run = make(scale)
        with shadow_inactive(run.wrapper, run.call).record():
            run.call(batch_of(NAMES, 99, dtype=run.dtype))
        return run

    return make_with_shadow


TOWERS = [f"towers.{name}" for name in NAMES]
NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

# Under which ranks may differ in what is active.
DDPS: dict[str, Make] = {
    "DDP": ddp(),
    "DDP, several buckets": ddp(**SMALL),
    "DDP, bucket views": ddp(gradient_as_bucket_view=True, **SMALL),
    "DDP, static graph": ddp(static_graph=True, **SMALL),
    "DDP, checkpoints": ddp(lambda: Checkpointed(False), **SMALL),
    "DDP, reentrant checkpoints": ddp(lambda: Checkpointed(True), **SMALL),
    "DDP, static graph, reentrant checkpoints": ddp(
        lambda: Checkpointed(True), static_graph=True, **SMALL
    ),
    "DDP, attached": ddp(attached=True, **SMALL),
    "DDP, unused, attached": ddp(attached=True, find_unused_parameters=True, **SMALL),
    "DDP, unused, attached, checkpoints": ddp(
        lambda: Checkpointed(False), attached=True, find_unused_parameters=True, **SMALL
    ),
    "DDP, static graph, attached": ddp(attached=True, static_graph=True, **SMALL),
    "DDP, fp16 hook": ddp(kind=Compressed, hook=default_hooks.fp16_compress_hook, **SMALL),
    "DDP, bf16 hook": ddp(kind=Rough, hook=bf16_hook, **SMALL),
    "DDP, compiled": ddp(compiled=True),
    "DDP, unused, attached, compiled": ddp(
        compiled=True, attached=True, find_unused_parameters=True
    ),
}
FSDPS: dict[str, Make] = {
    "FSDP1, root": fsdp1(),
    "FSDP1, root, wrapped early": fsdp1(early=True),
    "FSDP1, root, no sharding": fsdp1(sharding_strategy=ShardingStrategy.NO_SHARD),
    "FSDP1, root, whole after forward": fsdp1(
        kind=FSDP1, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP
    ),
    "FSDP2, root": fsdp(),
    "FSDP2, root, wrapped early": fsdp(early=True),
    "FSDP2, root, zeros": fsdp(zeros=True),
    "FSDP2, root, resharding, zeros": fsdp(
        zeros=True, kind=ShardedDummies, reshard_after_forward=True
    ),
    "FSDP2, root, bfloat16": fsdp(kind=RoughFSDP, mp_policy=NARROW),
    "FSDP2, towers, every tower runs": fsdp(
        *TOWERS, "fusion", model=EveryTower, kind=EveryTowerRuns
    ),
}
# Under which they have to agree.
AGREEING: dict[str, Make] = {
    "FSDP2, root, resharding": fsdp(reshard_after_forward=True),
    "FSDP2, towers": fsdp(*TOWERS),
    "FSDP2, towers, wrapped early": fsdp(*TOWERS, early=True),
    "FSDP2, towers, zeros": fsdp(*TOWERS, zeros=True),
}
# FSDP1 gives the parameters of a tower that did not run no gradient.
WITHOUT_GRADIENTS: dict[str, Make] = {"FSDP1, towers": fsdp1(*TOWERS, "fusion")}
# These do not support the dummy term.
REFUSED: dict[str, Make] = {
    "DDP, unused": ddp(find_unused_parameters=True),
    "DDP, unused, bucket views": ddp(find_unused_parameters=True, gradient_as_bucket_view=True),
    "DDP, unused, attached, reentrant checkpoints": ddp(
        lambda: Checkpointed(True), attached=True, find_unused_parameters=True
    ),
}
ENGINES = DDPS | FSDPS | AGREEING | WITHOUT_GRADIENTS | REFUSED


def outcome(
    rank: int, engine: str, scale: float | None, schedule: Schedule, agree: bool = False
) -> Outcome:
    """What the oracle says of a schedule under an engine."""
    return held_against_truth(rank, ENGINES[engine], scale, schedule, agree)
