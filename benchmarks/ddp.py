"""Training under DistributedDataParallel that `bench_ddp.py` times: models, contenders, check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from measure import Contender, clear
from modaldummy import DummyLossWrapper, attach_to_outputs
from shapes import layer_norms

NAMES = ("T1", "rsfMRI", "dMRI")
SCALE = 1e-7
FIND_UNUSED = "find_unused_parameters"
NAIVE = "naive line"

# From a loss and the modality that the rank has to the loss with a dummy term.
Add = Callable[[Tensor, str], Tensor]


def blocks(count: int, width: int) -> nn.Module:
    """Transformer layers like those of a ViT-B, if the width is 768."""
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                width, 12, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(count)
        )
    )


@dataclass(frozen=True)
class Shape:
    """What each of the three towers is, and the trunk too.

    Attributes:
        part: Makes one of them.
        what: The same in words.
        size: Of what goes into a tower, `[B, tokens, width]`.
        rounds: How many, where it is not said.
    """

    part: Callable[[], nn.Module]
    what: str
    size: tuple[int, int, int]
    rounds: int


SHAPES = {
    "vit": Shape(lambda: blocks(2, 768), "2 layers of a ViT-B", (2, 16, 768), 10),
    "norms": Shape(layer_norms, "150 LayerNorms of width 768", (2, 4, 768), 24),
    "tiny": Shape(lambda: blocks(1, 24), "1 layer of width 24", (2, 4, 24), 1),
}


class Model(nn.Module):
    """A tower for each modality, and a trunk with a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: shape.part() for name in NAMES})
        self.trunk = nn.Sequential(shape.part(), nn.Linear(shape.size[-1], 10))

    def forward(self, name: str, data: Tensor) -> Tensor:
        """Logits `[B, 10]`, averaged over tokens."""
        logits: Tensor = self.trunk(self.towers[name](data)).mean(1)
        return logits


@dataclass(frozen=True)
class Way:
    """How a contender deals with absent towers.

    Attributes:
        make: The way to add a dummy term, for a model and the DDP around it.
        scale: What it hands each element of an absent tower.
        find_unused: Whether DDP looks for unused parameters.
    """

    make: Callable[[Model, DistributedDataParallel], Add]
    scale: float = SCALE
    find_unused: bool = False


def line(scale: float) -> Way:
    """The line that everybody copies."""

    def make(model: Model, ddp: DistributedDataParallel) -> Add:
        def add(loss: Tensor, name: str) -> Tensor:
            absent = [tower for other, tower in model.towers.items() if other != name]
            return loss + scale * sum(p.sum() for tower in absent for p in tower.parameters())

        return add

    return Way(make, scale)


def wrapper(model: Model, **options: Any) -> DummyLossWrapper:
    """The library's, for the towers of the model."""
    return DummyLossWrapper(model, {name: f"towers.{name}" for name in NAMES}, **options)


def attached(model: Model, ddp: DistributedDataParallel) -> Add:
    """The library's, where DDP looks for unused parameters all the same."""
    own = wrapper(model)
    attach_to_outputs(own, ddp)
    return own.total


WAYS: dict[str, Way] = {
    FIND_UNUSED: Way(lambda model, ddp: lambda loss, name: loss, 0.0, find_unused=True),
    NAIVE: line(SCALE),
    "0 * sum": line(0.0),
    "ours": Way(lambda model, ddp: wrapper(model).total),
    "ours, gradient_only": Way(lambda model, ddp: wrapper(model, gradient_only=True).total),
    "ours, scale=0.0": Way(lambda model, ddp: wrapper(model, scale=0.0).total, 0.0),
    "ours, scale=None": Way(lambda model, ddp: wrapper(model, scale=None).total, 0.0),
    "ours, attach_to_outputs": Way(attached, find_unused=True),
}


def modality(rank: int, step: int) -> str:
    """What a rank has at a step: never what its neighbour has."""
    return NAMES[(rank + step) % len(NAMES)]


class Training:
    """Steps of one contender on its rank, as `contender`; `model` has the gradients."""

    def __init__(self, way: Way, base: Model, shape: Shape, device: torch.device) -> None:
        with torch.device("meta"):
            self.model = Model(shape)
        # The parameters of all contenders are the same memory.
        self.model.load_state_dict(base.state_dict(), assign=True)
        self._ddp = DistributedDataParallel(
            self.model, find_unused_parameters=way.find_unused, **_place(device)
        )
        self._add = way.make(self.model, self._ddp)
        # The work of a step, which leaves the parameters as they are for the next contender.
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        draw = torch.Generator().manual_seed(dist.get_rank())
        self._data = {n: torch.randn(shape.size, generator=draw).to(device) for n in NAMES}
        self._labels = torch.randint(10, shape.size[:1], generator=draw).to(device)
        self._num_steps = 0
        self.contender = Contender(self._forward, self._backward, self._reset)

    def _reset(self) -> None:
        clear(self.model.parameters())
        dist.barrier()

    def _forward(self) -> Tensor:
        name = modality(dist.get_rank(), self._num_steps)
        self._num_steps += 1
        logits = self._ddp(name, self._data[name])
        return self._add(nn.functional.cross_entropy(logits, self._labels), name)

    def _backward(self, total: Tensor) -> None:
        total.backward()
        self._optimizer.step()

    def step(self) -> None:
        """One step that is not timed."""
        self._reset()
        self._backward(self._forward())


def _place(device: torch.device) -> dict[str, Any]:
    return {"device_ids": [device.index]} if device.type == "cuda" else {}


def trainings(names: tuple[str, ...], shape: Shape, device: torch.device) -> dict[str, Training]:
    """Contenders by name, each with a DDP and so with buckets of its own."""
    torch.manual_seed(0)
    base = Model(shape).to(device)
    return {name: Training(WAYS[name], base, shape, device) for name in names}


def check(found: Mapping[str, Training]) -> None:
    """Refuse contenders that leave other gradients than DDP finds by itself, plus their dummy.

    Each modality has its turn, so that DDP rebuilds its buckets in between.

    Raises:
        RuntimeError: A gradient differs, on this rank.
    """
    for step in range(len(NAMES)):
        found[FIND_UNUSED].step()
        expected = {n: _gradient(p).clone() for n, p in found[FIND_UNUSED].model.named_parameters()}
        clear(found[FIND_UNUSED].model.parameters())
        active = [modality(rank, step) for rank in range(dist.get_world_size())]
        for name in [name for name in found if name != FIND_UNUSED]:
            found[name].step()
            compare(name, WAYS[name].scale, active, expected, found[name].model)
            clear(found[name].model.parameters())


def compare(
    contender: str,
    scale: float,
    active: list[str],
    expected: Mapping[str, Tensor],
    model: Model,
) -> None:
    """Raise if gradients are not `expected` plus the average of what ranks hand absent towers.

    A tensor may differ by 1e-5 of its largest gradient and 1e-3 of a dummy.
    """
    for name, parameter in model.named_parameters():
        owner = next((m for m in NAMES if name.startswith(f"towers.{m}.")), None)
        absent = 0.0 if owner is None else 1 - active.count(owner) / len(active)
        difference = (_gradient(parameter) - expected[name] - scale * absent).abs().max().item()
        if not difference <= 1e-5 * expected[name].abs().max().item() + 1e-3 * SCALE:
            raise RuntimeError(
                f"the gradient of `{name}` with `{contender}` is off by {difference:.2g} where "
                f"ranks have {active}"
            )


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
