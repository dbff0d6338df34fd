"""DeepSpeed engines for the oracle, on CPUs, each made on every rank."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from modaldummy import DummyLossWrapper
from tests.distributed.engines import EveryTower, shadowed
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
    held_against_truth,
)

LR = 0.1


def deepspeed_on_cpus() -> Any:
    """The package, told where it runs, without the operators that it would compile at first use."""
    os.environ.update({"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"})
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class Narrow(Model):
    """Each part gets data in its own dtype."""

    def run(self, part: nn.Module, data: Tensor) -> Tensor:
        output: Tensor = part(data.to(next(part.parameters()).dtype))
        return output


class Parts(nn.Module):
    """All that is of modalities, in one module that gets tensors with a gradient or None."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.towers, self.fusion = model.towers, model.fusion

    def forward(self, hidden: Tensor, *data: Tensor | None) -> Tensor:
        for tower, own in zip(self.towers.values(), data, strict=True):
            if own is not None:
                hidden = hidden + tower(own).tanh()
        both = data[0] is not None and data[2] is not None
        return hidden + self.fusion(hidden) if both else hidden


class Leafy(nn.Module):
    """The same model, for ZeRO-3 to gather all that is of modalities at once."""

    def __init__(self) -> None:
        super().__init__()
        model = Model()
        self.parts, self.trunk = Parts(model), model.trunk
        deepspeed_on_cpus().utils.set_z3_leaf_modules(self, [Parts])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        text, *data = (
            batch[name].clone().requires_grad_() if name in batch else None
            for name in ("text", *NAMES)
        )
        output: Tensor = self.trunk(self.parts(text, *data))
        return output


class Zero(Run):
    """Attributes: as those of `Run`; `call` is the engine."""

    call: Any

    def values(self) -> dict[str, Tensor]:
        return self._read("safe_get_full_fp32_param")

    def gradients(self) -> dict[str, Tensor | None]:
        return {**self._read("safe_get_full_grad")}

    def backward(self, total: Tensor, count: int) -> None:
        assert self.call.gradient_accumulation_steps() == count
        self.call.backward(total)  # which divides by the count
        if not self.call.is_gradient_accumulation_boundary():
            self.call.step()  # which counts micro-batches

    def step(self) -> None:
        """Step, and see that parameters move by what the gradients said."""
        gradients, before = self._read("safe_get_full_grad"), self.values()
        self.call.step()
        for name, after in self.values().items():
            expected = before[name] - LR * gradients[name]
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-6, msg=f"step of {name}")

    def _read(self, function: str) -> dict[str, Tensor]:
        """Trained parameters or gradients, put together from all ranks, in float64."""
        read = getattr(deepspeed_on_cpus().utils, function)
        named = [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]
        return {name.removeprefix("parts."): read(p).detach().double() for name, p in named}


class LateZero(Zero):
    reference = Late
    relative = 2**-18  # more sums cancel


class Rough(Zero):
    """Forward and backward run in bfloat16."""

    relative, absolute = 2**-4, 2**-7


class Coalescing(Zero):
    """Reduces once a step, after its last backward, in the order of the parameters."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._block = ExitStack()
        self._inside = False

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        if not self._inside:
            self._block.enter_context(self.call.coalesce_grad_reduction())
        self._inside = not last
        return self._block if last else nullcontext()

    def backward(self, total: Tensor, count: int) -> None:
        self.call.backward(total / count)


class Gathered(Zero):
    """ZeRO-3 has gathered the parameters of all modalities for the total and its backward pass."""

    def learn(self, real: Tensor, active: Active, count: int) -> None:
        parameters = [owned.parameter for owned in self.wrapper.parameters.all().values()]
        with deepspeed_on_cpus().zero.GatheredParameters(parameters):
            super().learn(real, active, count)


class RoughGathered(Gathered, Rough):
    pass


class Complete(Zero):
    """Takes all modalities for active: forward or DeepSpeed sees to those that are not."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.wrapper.scale:
            self.absolute = 1.01 * self.wrapper.scale  # the truth has dummies, and there are none

    def running(self, active: Active) -> Active:
        return NAMES

    def learn(self, real: Tensor, active: Active, count: int) -> None:
        super().learn(real, self.running(active), count)


def zero(
    stage: int,
    *,
    kind: type[Run] = Zero,
    model: Callable[[], nn.Module] = Model,
    early: bool = False,
    prefix: str = "",
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Make:
    """An engine of a ZeRO stage.

    Args:
        stage: 0 to 3.
        kind: The `Run` that it makes.
        model: Makes the model.
        early: Make the wrapper first, with the bare model.
        prefix: What paths of modalities begin with.
        config: More of DeepSpeed's configuration.
        options: Of its `zero_optimization`.
    """
    paths = {key: prefix + path for key, path in MAP.items()}

    def make(scale: float | None) -> Run:
        bare = model()
        wrapper = DummyLossWrapper(bare, paths, scale) if early else None
        engine = initialized(bare, stage, config or {}, **options)
        return kind(engine, bare, wrapper or DummyLossWrapper(engine, paths, scale))

    return make


def initialized(model: nn.Module, stage: int, config: dict[str, Any], **options: Any) -> Any:
    """DeepSpeed's engine around a model; the arguments are as for `zero`."""
    common = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # the default is 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **options},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed_on_cpus().initialize(
        model=model, optimizer=SGD(trained, LR), config=common | config
    )
    return engine


TWICE = {"gradient_accumulation_steps": 2}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
WIDE_SUMS: dict[str, Any] = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOADED: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
FOR_ALL: dict[str, Any] = {"kind": Complete, "model": Leafy, "prefix": "parts."}

# Under which ranks may differ in what is active, with a scale that is a number.
DIFFERING: dict[str, Make] = {
    "ZeRO-1": zero(1),
    "ZeRO-1, wrapped early": zero(1, early=True),
    "ZeRO-1, two micro-batches": zero(1, config=TWICE),
    "ZeRO-1, small buckets": zero(1, reduce_bucket_size=20),
    "ZeRO-1, gradients apart": zero(1, contiguous_gradients=False),
    "ZeRO-1, offloaded": zero(1, config={"zero_force_ds_cpu_optimizer": False}, **OFFLOADED),
    "ZeRO-1, bfloat16": zero(1, kind=Rough, model=Narrow, config=BF16),
    "ZeRO-1, bfloat16, two micro-batches in float32": zero(
        1, kind=Rough, model=Narrow, config=TWICE | WIDE_SUMS
    ),
    "ZeRO-1, coalescing": zero(1, kind=Coalescing),
    "ZeRO-1, overlapping, coalescing": zero(1, kind=Coalescing, overlap_comm=True),
    "ZeRO-2, coalescing": zero(2, kind=Coalescing),
    "ZeRO-2, overlapping, coalescing": zero(2, kind=Coalescing, overlap_comm=True),
    "ZeRO-2, small buckets, coalescing": zero(2, kind=Coalescing, reduce_bucket_size=20),
}
# Under which they may differ since all towers count as active.
COMPLETE: dict[str, Make] = {
    "ZeRO-3, every tower runs": zero(3, kind=Complete, model=EveryTower),
    "ZeRO-3, leaf": zero(3, **FOR_ALL),
    "ZeRO-3, leaf, two micro-batches": zero(3, config=TWICE, **FOR_ALL),
    "ZeRO-3, leaf, nothing persists": zero(3, stage3_param_persistence_threshold=0, **FOR_ALL),
}
# Under which they have to agree.
AGREEING: dict[str, Make] = {
    "ZeRO-1, overlapping": zero(1, overlap_comm=True),
    "ZeRO-2": zero(2),
    "ZeRO-2, two micro-batches": zero(2, config=TWICE),
    "ZeRO-2, small buckets": zero(2, reduce_bucket_size=20),
    "ZeRO-2, overlapping": zero(2, overlap_comm=True),
    "ZeRO-2, bfloat16": zero(2, kind=Rough, model=Narrow, config=BF16),
    "ZeRO-3, gathered": zero(3, kind=Gathered),
    "ZeRO-3, gathered, two micro-batches": zero(3, kind=Gathered, config=TWICE),
    "ZeRO-3, gathered, nothing persists": zero(
        3, kind=Gathered, stage3_param_persistence_threshold=0
    ),
    "ZeRO-3, gathered, bfloat16": zero(3, kind=RoughGathered, model=Narrow, config=BF16),
}
# Which stop where modalities come and go.
STOPPING: dict[str, Make] = {
    "ZeRO-1, overlapping, two micro-batches": zero(1, config=TWICE, overlap_comm=True),
    "ZeRO-3": zero(3),
}
NOTHING_PERSISTS: dict[str, Any] = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 20,
}
# Under which ranks may differ with a shadow.
SHADOWED: dict[str, Make] = {
    **{name: make for name, make in AGREEING.items() if "gathered" not in name},
    **STOPPING,
    "ZeRO-3, two micro-batches": zero(3, config=TWICE),
    "ZeRO-3, nothing persists": zero(3, **NOTHING_PERSISTS),
    "ZeRO-3, overlapping": zero(3, overlap_comm=True, **NOTHING_PERSISTS),
    "ZeRO-3, bfloat16": zero(3, kind=Rough, model=Narrow, config=BF16),
    "ZeRO-2, towers last": zero(2, kind=LateZero, model=Late),
    "ZeRO-3, towers last": zero(3, kind=LateZero, model=Late, **NOTHING_PERSISTS),
}
ENGINES = DIFFERING | COMPLETE | AGREEING | STOPPING


def num_micros(engine: str) -> tuple[int, int]:
    """The least and the most micro-batches that a step of an engine has."""
    if "coalescing" in engine:
        return 1, 2
    return (2, 2) if "two micro-batches" in engine else (1, 1)


def outcome(
    rank: int, engine: str, scale: float | None, schedule: Schedule, agree: bool = False
) -> Outcome:
    """What the oracle says of a schedule under an engine."""
    return held_against_truth(rank, ENGINES[engine], scale, schedule, agree)


def outcome_with_shadow(
    rank: int, engine: str, scale: float | None, schedule: Schedule, agree: bool = False
) -> Outcome:
    """The same with a shadow."""
    return held_against_truth(rank, shadowed(SHADOWED[engine]), scale, schedule, agree)
