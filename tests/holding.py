"""A model to hold, steps to train it, and what it means to be held."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from modaldummy import DummyLossWrapper, HoldHandle, hold_inactive
from tests.asserts import assert_same_bits

NAMES = ("T1", "rsfMRI", "dMRI")
ADAMW = partial(AdamW, lr=0.1)


class Towers(nn.Module):
    """A tower for each modality, and a trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers: Any = nn.ModuleDict({name: nn.Linear(3, 4) for name in NAMES})
        self.trunk = nn.Linear(4, 2)

    def loss(self, active: Iterable[str]) -> Tensor:
        outputs = [self.trunk(self.towers[name](torch.ones(2, 3))) for name in active]
        return torch.stack([output.square().mean() for output in outputs]).mean()

    def wrapper(self, scale: float | None = 1e-7, names: Sequence[str] = NAMES) -> DummyLossWrapper:
        return DummyLossWrapper(self, {name: f"towers.{name}" for name in names}, scale)


class Training:
    """A model, its wrapper and optimizer, and which towers the last step held."""

    def __init__(
        self,
        make: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAMW,
        scale: float | None = 1e-7,
    ) -> None:
        self.model = Towers()
        self.optimizer: Any = make(self.model.parameters())
        self.wrapper = self.model.wrapper(scale)
        self.handle = hold_inactive(self.wrapper, self.optimizer)

    def total(self, *active: str) -> Tensor:
        return self.wrapper.total(self.model.loss(active), active)

    def backward(self, *active: str) -> None:
        self.total(*active).backward()

    def step(self) -> set[str]:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return towers(self.handle)

    def train(self, steps: Iterable[Iterable[str]]) -> None:
        """One step for each active set."""
        train(self.model, self.optimizer, self.wrapper, steps)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """The parameters of a tower stay as they are, and so does their optimizer state."""
        parameters = dict(self.model.towers[name].named_parameters())
        before = snapshot(parameters.values(), self.optimizer)
        yield
        assert_untouched(parameters, self.optimizer, before)


def towers(handle: HoldHandle) -> set[str]:
    return {name.split(".")[1] for name in handle.held}


def train(
    model: Towers, optimizer: Optimizer, wrapper: DummyLossWrapper | None, steps: Iterable[Any]
) -> None:
    """One step for each active set, with the total of `wrapper` or the loss alone."""
    for active in steps:
        loss = model.loss(active)
        (wrapper.total(loss, active) if wrapper else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(parameters: Iterable[Tensor], optimizer: Optimizer) -> list[tuple[Tensor, Any]]:
    return [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p))) for p in parameters]


def assert_same_state(actual: Any, expected: Any, name: str) -> None:
    """Both are absent, or have the same entries, tensors bit for bit."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_same_state(actual[key], expected[key], f"{name}, {key}")
    elif isinstance(expected, Tensor):
        assert_same_bits(actual, expected, name)
    else:
        assert actual == expected, name


def assert_untouched(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, before: list[tuple[Tensor, Any]]
) -> None:
    """Values and optimizer states are still those of an earlier `snapshot`."""
    for (name, parameter), (value, state) in zip(parameters.items(), before, strict=True):
        assert_same_bits(parameter.detach(), value, name)
        assert_same_state(optimizer.state.get(parameter), state, name)


def assert_same_training(
    model: nn.Module, optimizer: Optimizer, other: nn.Module, other_optimizer: Optimizer
) -> None:
    """Values and optimizer states of two models agree."""
    named = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, parameter), twin in named:
        assert torch.equal(parameter, twin), name
        assert_same_state(optimizer.state.get(parameter), other_optimizer.state.get(twin), name)
