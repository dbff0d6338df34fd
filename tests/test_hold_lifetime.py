"""What lives as long as what: copies, optimizers that are gone, losses that are not."""

import copy
import gc
import pickle
import weakref

import torch
from torch.optim import AdamW

from modaldummy import hold_inactive
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


def test_a_loss_may_be_backwarded_after_its_optimizer_is_gone() -> None:
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
