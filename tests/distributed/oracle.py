"""What every engine is held against: the average over ranks, made by one process in float64."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from modaldummy import (
    DummyLossWrapper,
    RankDisagreementError,
    UnsupportedEngineError,
    check_ranks,
)

NAMES = ("T1", "rsfMRI", "dMRI")
MAP: dict[Any, str] = {name: f"towers.{name}" for name in NAMES} | {("T1", "dMRI"): "fusion"}

Active: TypeAlias = tuple[str, ...]
# The micro-batches of a step, each with what the ranks have in it.
Step: TypeAlias = tuple[tuple[Active, ...], ...]
Schedule: TypeAlias = tuple[Step, ...]


class Model(nn.Module):
    """A tower for each modality, a module for a pair of them, and a trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({name: nn.Linear(3, 4) for name in NAMES})
        self.fusion = nn.Linear(4, 4)
        self.trunk = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def run(self, part: nn.Module, data: Tensor) -> Tensor:
        """What subclasses checkpoint."""
        output: Tensor = part(data)
        return output

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        modalities = [name for name in NAMES if name in batch]
        hidden = batch["text"]
        for name in modalities:
            hidden = hidden + self.run(self.towers[name], batch[name]).tanh()
        if {"T1", "dMRI"} <= batch.keys():
            hidden = hidden + self.run(self.fusion, hidden)
        return self.run(self.trunk, hidden)


class Late(Model):
    """All towers run after the trunk."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = self.run(self.trunk, batch["text"])
        for name in NAMES:
            if name in batch:
                hidden = hidden + self.run(self.towers[name], batch[name])[:, :2].tanh()
        if {"T1", "dMRI"} <= batch.keys():
            hidden = hidden + self.run(self.fusion, hidden.repeat(1, 2))[:, :2]
        return hidden


def batch_of(active: Active, *place: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The data of a rank, the same whoever asks."""
    generator = torch.Generator().manual_seed(sum(n * 100**i for i, n in enumerate(place)))
    # All are drawn, so that a modality does not change what others are.
    drawn = {name: torch.randn(2, 3, generator=generator) for name in NAMES}
    text = torch.randn(2, 4, generator=generator)
    kept = {"text": text} | {name: drawn[name] for name in active}
    return {name: data.to(dtype) for name, data in kept.items()}


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


class Run:
    """A model as an engine has it; what is special about an engine is overridden.

    Attributes:
        call: What forward calls.
        bare: The model itself, as the engine has left it.
        wrapper: Its total goes through backward.
        dtype: Of parameters and data.
        relative: By what part of its size, as of `Expected`, a gradient may be wrong.
        absolute: By how much more.
        reference: What one process trains instead.
    """

    dtype = torch.float32
    relative = 2**-20
    absolute = 0.0
    reference: type[Model] = Model

    def __init__(self, call: nn.Module, bare: nn.Module, wrapper: DummyLossWrapper) -> None:
        self.call, self.bare, self.wrapper = call, bare, wrapper

    def running(self, active: Active) -> Active:
        """The modalities whose towers run, which the ranks have to agree on."""
        return active

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """What stands around a micro-batch, the last of a step or not."""
        return nullcontext()

    def values(self) -> dict[str, Tensor]:
        """Whole parameters by name, in float64."""
        return {name: whole(p).detach().double() for name, p in self.bare.named_parameters()}

    def learn(self, real: Tensor, active: Active, count: int) -> None:
        """Add the dummy term and backward, for one of `count` micro-batches."""
        self.backward(self.wrapper.total(real, active), count)

    def backward(self, total: Tensor, count: int) -> None:
        """Backward for one of `count` micro-batches."""
        (total / count).backward()

    def gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients by name, once a step's backward is over."""
        return {
            name: None if p.grad is None else whole(p.grad).detach()
            for name, p in self.bare.named_parameters()
        }

    def step(self) -> None:
        """Move the parameters and clear the gradients."""
        with torch.no_grad():
            for parameter in self.bare.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
        self.bare.zero_grad()


def whole(tensor: Any) -> Tensor:
    """All of a DTensor, for which all ranks have to ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


class Expected(NamedTuple):
    """A true gradient, and the largest element of the average scalar_loss of what it is made of.

    That is what rounding is in proportion to, also where the parts cancel.
    """

    gradient: Tensor
    size: float


def truth(
    model: Model, values: dict[str, Tensor], scale: float | None, step: Step, place: int
) -> dict[str, Expected]:
    """The average over ranks and micro-batches of real gradients plus `scale` where inactive."""
    model = model.double()
    model.load_state_dict(values)
    owned = {name: key for key, path in MAP.items() for name in _below(model, path)}
    parts: dict[str, list[Tensor]] = {
        name: [torch.zeros_like(p)] for name, p in model.named_parameters()
    }
    cases = [(micro, rank) for micro in range(len(step)) for rank in range(len(step[0]))]
    for micro, rank in cases:
        active = step[micro][rank]
        model.zero_grad()
        batch = batch_of(active, place, micro, rank, dtype=torch.float64)
        loss_of(model(batch)).backward()
        for name, parameter in model.named_parameters():
            key = owned.get(name, ())
            members = {key} if isinstance(key, str) else set(key)
            if not members <= set(active):
                assert parameter.grad is None
                parts[name].append(torch.full_like(parameter, scale or 0.0))
            elif parameter.grad is not None:
                parts[name].append(parameter.grad)
    found = {}
    for name, own in parts.items():
        stacked = torch.stack(own) / len(cases)
        found[name] = Expected(stacked.sum(0), float(stacked.abs().sum(0).max()))
    return found


def _below(model: nn.Module, path: str) -> Iterator[str]:
    return (f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters())


@dataclass
class Outcome:
    """How far gradients are from the truth.

    Attributes:
        worst: The largest error, as a multiple of what rounding explains.
        where: Of which parameter in which step.
        missing: Parameters without a gradient, with the step.
        error: The largest error.
        largest: The largest element of a true gradient.
    """

    worst: float = 0.0
    where: str = ""
    missing: tuple[str, ...] = ()
    error: float = 0.0
    largest: float = 0.0


Make: TypeAlias = Callable[[float | None], Run]


def held_against_truth(
    rank: int, make: Make, scale: float | None, schedule: Schedule, agree: bool = False
) -> Outcome:
    """Train for a schedule, and compare all gradients of each step with the truth.

    `agree` has the ranks check each micro-batch before forward.
    """
    run = make(scale)
    found = Outcome()
    for place, step in enumerate(schedule):
        values = run.values()
        for micro, ranks in enumerate(step):
            active = ranks[rank]
            batch = batch_of(active, place, micro, rank, dtype=run.dtype)
            with run.syncing(micro == len(step) - 1):
                if agree:
                    check_ranks(run.wrapper, run.running(active), model=run.call)
                real = loss_of(run.call(batch))
                run.learn(real, active, len(step))
        _compare(found, run, truth(run.reference(), values, run.wrapper.scale, step, place), place)
        run.step()
    return found


def verdict(rank: int, make: Make, scale: float | None, schedule: Schedule) -> str:
    """What a table may say: "correct" or "refused"."""
    try:
        found = held_against_truth(rank, make, scale, schedule, agree=True)
    except (RankDisagreementError, UnsupportedEngineError):
        return "refused"
    return "correct" if found.worst <= 1 else f"wrong: {found}"


def _compare(found: Outcome, run: Run, expected: dict[str, Expected], place: int) -> None:
    actual = run.gradients()
    assert actual.keys() == expected.keys()
    for name, (right, size) in expected.items():
        gradient = actual[name]
        if gradient is None:
            found.missing += (f"{name}, step {place}",)
            gradient = torch.zeros_like(right)
        error = float((gradient.double() - right).abs().max())
        found.error = max(found.error, error)
        found.largest = max(found.largest, float(right.abs().max()))
        tolerance = run.relative * size + run.absolute
        # Where the truth is zero nothing but zero is right.
        multiple = error / tolerance if tolerance else error and math.inf
        if not multiple <= found.worst:
            found.worst, found.where = multiple, f"{name}, step {place}"
