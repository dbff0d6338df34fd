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
    """Training that is saved and loaded elsewhere continues as if it had not been interrupted."""
    steps = [NAMES, ["T1"], ["rsfMRI"]]
    through, first, second = Training(), Training(), Training()
    through.train(steps * 2)
    first.train(steps)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(pickle.loads(pickle.dumps(first.optimizer.state_dict())))
    second.train(steps)
    assert_same_training(second.model, second.optimizer, through.model, through.optimizer)


def test_copies_are_not_held() -> None:
    """The handle has no effect on copies of the model, the wrapper and the optimizer."""
    training = Training()
    training.backward("T1")
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
    training.backward("dMRI")
    assert training.step() == {"T1", "rsfMRI"}


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copied_handle_has_no_effect(duplicate: Callable[[HoldHandle], HoldHandle]) -> None:
    """As where a module with the handle as an attribute is copied to be averaged."""
    training = Training()
    training.backward("T1")
    training.step()
    handle = duplicate(training.handle)
    assert handle.removed
    assert handle.held == training.handle.held
    handle.remove()
    assert not training.handle.removed
    training.backward("dMRI")
    assert training.step() == {"T1", "rsfMRI"}


def test_an_optimizer_is_freed_while_its_wrapper_is_in_use() -> None:
    """Each phase of a training may have its own optimizer."""
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
        assert not wrapper._observers


def test_an_optimizer_is_freed_with_a_model_that_refers_to_it() -> None:
    """Models of Lightning do, through their trainer."""
    training = Training()
    model: Any = training.model
    model.optimizer = training.optimizer
    alive = weakref.ref(training.optimizer)
    del training, model
    gc.collect()
    assert alive() is None


def test_a_handle_does_not_keep_its_optimizer_alive() -> None:
    training = Training()
    handle, alive = training.handle, weakref.ref(training.optimizer)
    del training.optimizer
    gc.collect()
    assert alive() is None
    handle.remove()
    assert handle.held == ()


def test_backward_may_run_after_the_optimizer_was_freed() -> None:
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
