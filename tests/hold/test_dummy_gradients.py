"""Hold warns where it holds what was trained after all, as behind a misspelt name."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from modaldummy import DummyLossWrapper, HoldHandle, hold_inactive
from tests.holding import NAMES, Towers, train


class Case:
    """A model that runs on T1 and dMRI, the batch it ran on, and a hold."""

    def __init__(self, name: str = "dMRI", scale: float | None = 1e-7) -> None:
        self.model = Towers()
        paths = {"T1": "towers.T1", "rsfMRI": "towers.rsfMRI", name: "towers.dMRI"}
        self.wrapper = DummyLossWrapper(self.model, paths, scale)
        self.optimizer = AdamW(self.model.parameters(), lr=0.1)
        self.handle: HoldHandle = hold_inactive(self.wrapper, self.optimizer)

    def step(self, real: Tensor, *names: str) -> list[str]:
        """The warnings of a step whose batch is keyed by modality."""
        batch = {name: torch.ones(2, 3) for name in names}
        self.wrapper.total(real, batch).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.step()
        self.optimizer.zero_grad()
        return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_a_misspelt_name_is_warned_of_once(scale: float | None) -> None:
    case = Case("dmri", scale)
    both = ("T1", "dMRI")
    (message,) = case.step(case.model.loss(both), *both)
    for part in ("holds dmri,", "'towers.dMRI.weight'", "misspelt"):
        assert part in message
    assert "towers.dMRI.weight" in case.handle.held
    assert [case.step(case.model.loss(both), *both) for _ in range(8)] == [[]] * 8


def test_a_loss_without_the_wrapper_is_warned_of() -> None:
    case = Case()
    case.model.loss(["dMRI"]).backward()
    (message,) = case.step(case.model.loss(["T1"]), "T1")
    assert "holds dMRI," in message
    assert "A loss without the wrapper" in message


def test_gradients_are_looked_at_more_than_once() -> None:
    """At steps that hold a modality for the 1st, 2nd, 4th, 8th... time."""
    case = Case()
    seen = [case.step(case.model.loss(["T1"]), "T1") for _ in range(5)]
    seen += [case.step(case.model.loss(["T1", "dMRI"]), "T1") for _ in range(4)]
    assert [len(messages) for messages in seen] == [0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_each_modality_is_warned_of() -> None:
    case = Case()
    messages = case.step(case.model.loss(NAMES), "T1")
    assert ["holds rsfMRI," in messages[0], "holds dMRI," in messages[1]] == [True, True]
    assert len(messages) == 2


def clip(model: Towers) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def multiply(model: Towers) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(2.0**16)


@pytest.mark.parametrize("change", [clip, multiply, lambda model: None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_dummies_are_not_warned_of(
    scale: float | None, dtype: torch.dtype, change: Callable[[Towers], None]
) -> None:
    """Added up, clipped or multiplied; any warning fails a test."""
    model = Towers().to(dtype)
    wrapper = model.wrapper(scale)
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    for _ in range(4):
        for _ in range(3):
            real = model.towers["T1"](torch.ones(2, 3, dtype=dtype)).square().mean()
            wrapper.total(real / 3, "T1").backward()
        change(model)
        optimizer.step()
        assert "towers.dMRI.weight" in handle.held
        optimizer.zero_grad()


@pytest.mark.parametrize(("spread", "warns"), [(2**-8, False), (1 / 17, False), (1 / 15, True)])
def test_rounding_is_not_warned_of(spread: float, warns: bool) -> None:
    """As where the dummies of several ranks differ, and are added up in another order."""
    case = Case()
    bias = case.model.towers["dMRI"].bias
    bias.register_hook(lambda gradient: gradient * torch.tensor([1.0, 1.0, 1.0, 1 + spread]))
    assert bool(case.step(case.model.loss(["T1"]), "T1")) == warns


def test_what_is_left_of_real_gradients_is_not_warned_of() -> None:
    """`zero_grad(set_to_none=False)` leaves zeros, which may be those of dummies."""
    model = Towers()
    wrapper, optimizer = model.wrapper(), SGD(model.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    train(model, optimizer, wrapper, [NAMES])
    for _ in range(3):
        wrapper.total(model.loss(["T1"]), "T1").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
