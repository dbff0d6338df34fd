"""Models for the tests of `preflight`, and stand-ins for engines and optimizers around them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper
from tests.holding import NAMES, Towers

FOUR = (*NAMES, "PET")


class Model(Towers):
    """Runs the towers that a batch names."""

    def __init__(self, names: Iterable[str] = NAMES) -> None:
        super().__init__()
        self.trunk: Any = self.trunk
        self.towers = nn.ModuleDict({name: nn.Linear(3, 4) for name in names})

    def forward(self, active: Iterable[str]) -> Tensor:
        return self.loss(active)

    def total(self, wrapper: DummyLossWrapper, *active: str) -> Tensor:
        return wrapper.total(self(active), active)


class Inside(nn.Module):
    """A model that returns the total."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.wrapper = self.model.wrapper()

    def forward(self, active: Iterable[str]) -> Tensor:
        return self.wrapper.total(self.model(active), active)


class Engine(nn.Module):
    """Stands in for a DeepSpeed engine: it has the methods that tell how gradients are reduced."""

    def __init__(self, module: nn.Module, stage: int, overlap: bool = False) -> None:
        super().__init__()
        self.module = module
        self._stage = stage
        self._overlap = overlap

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def zero_optimization_stage(self) -> int:
        return self._stage

    def zero_overlap_comm(self) -> bool:
        return self._overlap


def partition(model: nn.Module, attribute: str) -> None:
    """Mark parameters as DeepSpeed does: `ds_id` is of ZeRO-3, `_hp_mapping` of ZeRO-1 and 2."""
    for parameter in model.parameters():
        setattr(parameter, attribute, None)


class Ranks:
    """Stands in for a process group that is only asked for its size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


class Around(Optimizer):
    """An optimizer that wraps others, like that of Accelerate."""

    def __init__(self, optimizer: Optimizer, other: Optimizer | None = None) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.other = optimizer, other


def mapped(model: nn.Module, scale: float | None = 1e-7, **options: Any) -> DummyLossWrapper:
    """A wrapper for models with a tower for each name."""
    names = model.get_submodule("towers")._modules
    return DummyLossWrapper(model, {name: f"towers.{name}" for name in names}, scale, **options)


def with_towers(make: Callable[[], nn.Module], *names: str) -> Model:
    """A model with other towers: those of `names`, or all."""
    model = Model()
    for name in names or NAMES:
        model.towers[name] = make()
    return model


def sparse_table() -> Model:
    return with_towers(lambda: nn.Embedding(5, 4, sparse=True), "dMRI")


def sharded(*parts: str, **options: Any) -> Model:
    """FSDP2 for towers that are named, and for the whole model (`""`)."""
    mesh = init_device_mesh("cpu", (1,))
    model = Model()
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh, **(options if not part else {}))
    return model


def with_head() -> Model:
    """A model with a head that no batch uses."""
    model = Model()
    model.head = nn.Linear(4, 4)
    return model


def with_extra() -> Model:
    """A model with a part of a tower that forward leaves out."""
    model = Model()
    model.towers["T1"].extra = nn.Linear(2, 2)
    return model


def with_two_layers() -> Model:
    """A model with two layers in the trunk."""
    model = Model()
    model.trunk = nn.Sequential(nn.Linear(4, 4), model.trunk)
    return model


def tied(first: str, second: str) -> Model:
    """Two linear layers have one weight."""
    model = Model()
    model.trunk = nn.Linear(3, 4)
    model.get_submodule(second).weight = model.get_submodule(first).weight
    return model


class Checkpointed(Model):
    """Builds the graph of the trunk only during backward."""

    def forward(self, active: Iterable[str]) -> Tensor:
        hidden = torch.stack([self.towers[name](torch.ones(2, 3)) for name in active]).mean(0)
        output: Any = checkpoint(self.trunk, hidden, use_reentrant=True)
        loss: Tensor = output.square().mean()
        return loss
