"""The hold recognizes dummy gradients by their values, and warns if it holds others."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from modaldummy import DummyLossWrapper, HoldHandle, hold_inactive
from modaldummy._hold.dummy_gradients import may_be_dummy_gradient
from tests.holding import NAMES, Towers, Training


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
def test_a_misspelt_name_gives_one_warning(scale: float | None) -> None:
    case = Case("dmri", scale)
    both = ("T1", "dMRI")
    (message,) = case.step(case.model.loss(both), *both)
    for part in ("holds dmri,", "'towers.dMRI.weight'", "misspelt"):
        assert part in message
    assert "towers.dMRI.weight" in case.handle.held
    assert [case.step(case.model.loss(both), *both) for _ in range(8)] == [[]] * 8


def test_a_loss_without_the_wrapper_gives_a_warning() -> None:
    case = Case()
    case.model.loss(["dMRI"]).backward()
    (message,) = case.step(case.model.loss(["T1"]), "T1")
    assert "holds dMRI," in message
    assert "A loss without the wrapper" in message


def test_gradients_are_checked_more_than_once() -> None:
    """In steps that hold a modality for the 1st, 2nd, 4th, 8th... time."""
    case = Case()
    seen = [case.step(case.model.loss(["T1"]), "T1") for _ in range(5)]
    seen += [case.step(case.model.loss(["T1", "dMRI"]), "T1") for _ in range(4)]
    assert [len(messages) for messages in seen] == [0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_each_modality_gives_a_warning() -> None:
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
def test_dummy_gradients_give_no_warning(
    scale: float | None, dtype: torch.dtype, change: Callable[[Towers], None]
) -> None:
    """Also if they are added up, clipped or multiplied. Warnings are errors."""
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
def test_rounding_gives_no_warning(spread: float, warns: bool) -> None:
    """As where several ranks have different dummy gradients, and add them up in another order."""
    case = Case()
    bias = case.model.towers["dMRI"].bias
    bias.register_hook(lambda gradient: gradient * torch.tensor([1.0, 1.0, 1.0, 1 + spread]))
    assert bool(case.step(case.model.loss(["T1"]), "T1")) == warns


def test_zeros_in_place_of_real_gradients_give_no_warning() -> None:
    """`zero_grad(set_to_none=False)` leaves zeros, which may be those of dummy gradients."""
    training = Training(partial(SGD, lr=0.1))
    for active in (NAMES, ["T1"], ["T1"]):
        training.backward(*active)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("gradient", "uniform"),
    [
        (torch.full((2, 3), 1e-7), True),
        (torch.full((), 1e-7).expand(3, 2), True),
        (torch.zeros(0), True),
        (torch.tensor([1e-7, 2e-7]), False),
        (torch.tensor([1e-7, 1.0000001e-7]), False),
        (torch.full((2,), float("nan")), False),
        (torch.full((2,), 1e-7, dtype=torch.complex64), True),
    ],
)
def test_dummy_gradients_are_the_same_everywhere(gradient: Tensor, uniform: bool) -> None:
    assert may_be_dummy_gradient(gradient) == uniform


@pytest.mark.parametrize("rows", [0, 1])
def test_a_sparse_dummy_gradient_is_empty(rows: int) -> None:
    indices = torch.zeros(1, rows, dtype=torch.long)
    gradient = torch.sparse_coo_tensor(indices, torch.ones(rows, 2), (3, 2), check_invariants=True)
    assert may_be_dummy_gradient(gradient) == (rows == 0)
