"""How long holds live, and what copies of their parts do."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from modaldummy import HoldHandle, hold_inactive
from tests.holding import NAMES, Towers, Training, assert_same_training, train


def test_state_survives_a_round_trip() -> None:
    """Saved in the middle and loaded elsewhere, training goes on as if nothing had been."""
    steps = [NAMES, ["T1"], ["rsfMRI"]]
    through, first, second = Towers(), Towers(), Towers()
    optimizers = [AdamW(model.parameters(), lr=0.1) for model in (through, first, second)]
    wrappers = [model.wrapper() for model in (through, first, second)]
    for wrapper, optimizer in zip(wrappers, optimizers, strict=True):
        hold_inactive(wrapper, optimizer)
    train(through, optimizers[0], wrappers[0], steps * 2)
    train(first, optimizers[1], wrappers[1], steps)
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(pickle.loads(pickle.dumps(optimizers[1].state_dict())))
    train(second, optimizers[2], wrappers[2], steps)
    assert_same_training(second, optimizers[2], through, optimizers[0])


def test_copies_are_not_held() -> None:
    """A copy of model, wrapper and optimizer is none of the handle's business, and held by none."""
    training = Training()
    training.total("T1").backward()
    gradients = [p.grad for p in training.model.parameters()]
    model, wrapper, optimizer, handle = copy.deepcopy(
        (training.model, training.wrapper, training.optimizer, training.handle)
    )
    before = model.towers["dMRI"].weight.detach().clone()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    wrapper.total(model.loss(["T1"]), "T1").backward()
    optimizer.step()
    assert not torch.equal(before, model.towers["dMRI"].weight)
    handle.remove()
    assert training.step() == {"rsfMRI", "dMRI"}
    training.total("dMRI").backward()
    assert training.step() == {"T1", "rsfMRI"}


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copied_handle_has_no_effect(duplicate: Callable[[HoldHandle], HoldHandle]) -> None:
    """As where an averaged copy of a module is made that keeps the handle as an attribute."""
    training = Training()
    training.total("T1").backward()
    training.step()
    handle = duplicate(training.handle)
    assert handle.removed
    assert handle.held == training.handle.held
    handle.remove()
    assert not training.handle.removed
    training.total("dMRI").backward()
    assert training.step() == {"T1", "rsfMRI"}


def test_an_optimizer_dies_with_its_last_user() -> None:
    """Whoever makes a new one for each phase of training keeps the same wrapper."""
    model = Towers()
    wrapper = model.wrapper()
    for _ in range(3):
        optimizer = AdamW(model.parameters(), lr=0.1)
        hold_inactive(wrapper, optimizer)
        train(model, optimizer, wrapper, [["T1"]])
        alive = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert alive() is None
        assert wrapper._observers == []


def test_an_optimizer_dies_with_a_model_that_refers_to_it() -> None:
    """As models of Lightning do, through their trainer."""
    training = Training()
    model: Any = training.model
    model.optimizer = training.optimizer
    alive = weakref.ref(training.optimizer)
    del training, model
    gc.collect()
    assert alive() is None


def test_a_handle_does_not_keep_its_optimizer() -> None:
    training = Training()
    handle, alive = training.handle, weakref.ref(training.optimizer)
    del training.optimizer
    gc.collect()
    assert alive() is None
    handle.remove()
    assert handle.held == ()


def test_backward_may_run_after_the_optimizer_is_gone() -> None:
    model = Towers()
    wrapper = model.wrapper()
    optimizer = AdamW(model.parameters())
    hold_inactive(wrapper, optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    late = wrapper.total(model.loss(["T1"]), "T1")
    del optimizer
    gc.collect()
    late.backward()
    assert model.towers["dMRI"].weight.grad is not None
