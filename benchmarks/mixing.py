"""What `show_silent_mixing.py` trains: a model under engines, held against one process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from from_tests import deepspeed_on_cpus
from modaldummy import DummyLossWrapper, check_ranks

NAMES = ("T1", "rsfMRI", "dMRI")
WITHOUT, TOTAL, CHECKED = WAYS = ("no help", "total", "check_ranks")
# What the towers take.
TOWERS = {"one shape": (8, 8, 8), "three shapes": (8, 16, 24)}
# What a rank holds at a step.
HOLDINGS: dict[str, Callable[[int, int], tuple[str, ...]]] = {
    "one each": lambda rank, step: (NAMES[(rank + step) % 3],),
    "one or all": lambda rank, step: NAMES if rank == step % 2 else (NAMES[step % 3],),
    "one or none": lambda rank, step: () if rank == step % 2 else (NAMES[step % 3],),
}
STEPS = 3


class Model(nn.Module):
    """A tower for each modality, and a trunk that all share."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        towers = {name: nn.Linear(width, 8) for name, width in zip(NAMES, widths, strict=True)}
        self.towers = nn.ModuleDict(towers)
        self.trunk = nn.Linear(8, 4)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of shape `[samples, 4]`."""
        hidden = batch["text"]
        for name in NAMES:
            if name in batch:
                hidden = hidden + self.towers[name](batch[name]).tanh()
        output: Tensor = self.trunk(hidden)
        return output


def batch_of(
    widths: Sequence[int], active: tuple[str, ...], *place: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The data of a rank at a step, the same whoever asks."""
    generator = torch.Generator().manual_seed(sum(n * 100**i for i, n in enumerate(place)))
    sizes = {"text": 8} | dict(zip(NAMES, widths, strict=True))
    drawn = {name: torch.randn(2, size, generator=generator) for name, size in sizes.items()}
    return {name: drawn[name].to(dtype) for name in ("text", *active)}


def loss_of(output: Tensor) -> Tensor:
    """A scalar."""
    return (output - 1).square().mean()


def truth(widths: Sequence[int], held: Sequence[tuple[str, ...]], step: int) -> dict[str, Tensor]:
    """Gradients by name, averaged over ranks that hold this."""
    model = Model(widths).double()
    batches = [
        batch_of(widths, active, rank, step, dtype=torch.float64)
        for rank, active in enumerate(held)
    ]
    torch.stack([loss_of(model(batch)) for batch in batches]).mean().backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


@dataclass(frozen=True)
class Engine:
    """A model as an engine has it: what is called, backward, the whole of a gradient, the end."""

    call: Any
    backward: Callable[[Tensor], Any]
    gradient: Callable[[Any], Tensor | None]
    clear: Callable[[], Any]


def ddp(model: Model) -> Engine:
    """DistributedDataParallel as it is by default."""
    return Engine(
        DistributedDataParallel(model), torch.Tensor.backward, lambda p: p.grad, model.zero_grad
    )


def fsdp(*parts: str, **options: Any) -> Callable[[Model], Engine]:
    """`fully_shard` of parts, one by one, and of the whole with these options."""

    def make(model: Model) -> Engine:
        for part in parts:
            fully_shard(model.get_submodule(part))
        fully_shard(model, **options)
        return Engine(model, torch.Tensor.backward, gathered, model.zero_grad)

    return make


def gathered(parameter: Any) -> Tensor:
    """The whole gradient; a rank that has none takes part with zeros."""
    grad = parameter.grad
    own = torch.zeros_like(parameter.to_local()) if grad is None else grad.to_local()
    shards: Any = DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    whole: Tensor = shards.full_tensor()
    return whole


def zero(stage: int) -> Callable[[Model], Engine]:
    """DeepSpeed's ZeRO with its default configuration."""

    def make(model: Model) -> Engine:
        deepspeed = deepspeed_on_cpus()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.0),
            config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}},
        )
        return Engine(engine, engine.backward, deepspeed.utils.safe_get_full_grad, engine.step)

    return make


ENGINES: dict[str, Callable[[Model], Engine]] = {
    "DDP": ddp,
    "FSDP2, the whole": fsdp(),
    "FSDP2, towers one by one": fsdp(*[f"towers.{name}" for name in NAMES]),
    "FSDP2, the whole, resharding": fsdp(reshard_after_forward=True),
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
}


def measured(
    rank: int, num_ranks: int, engine: str, way: str, towers: str, holding: str
) -> tuple[float, float]:
    """The largest error of any gradient at any step on this rank, and the largest true gradient."""
    widths = TOWERS[towers]
    model = Model(widths)
    trained = ENGINES[engine](model)
    wrapper = DummyLossWrapper(model, {name: f"towers.{name}" for name in NAMES})
    error = largest = 0.0
    for step in range(STEPS):
        held = [HOLDINGS[holding](other, step) for other in range(num_ranks)]
        active = held[rank]
        if way == CHECKED:
            check_ranks(wrapper, active, model=trained.call)
        loss = loss_of(trained.call(batch_of(widths, active, rank, step)))
        trained.backward(loss if way == WITHOUT else wrapper.total(loss, active))
        right = truth(widths, held, step)
        for name, parameter in model.named_parameters():
            gradient = trained.gradient(parameter)
            found = torch.zeros_like(right[name]) if gradient is None else gradient.double()
            error = max(error, float((found - right[name]).abs().max()))
            largest = max(largest, float(right[name].abs().max()))
        trained.clear()
    return error, largest
