"""Optimizers of all manners: what they may do in `step`, and what is found out and named."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from modaldummy import DummyLossWrapper, UnsupportedEngineError, hold_inactive
from tests.holding import (
    Towers,
    Training,
    assert_same_training,
    assert_untouched,
    snapshot,
    towers,
    train,
)


class Scaling(SGD):
    """Has a second argument, and calls its closure with one."""

    @torch.no_grad()
    def step(self, closure: Any = None, factor: float = 1.0) -> Any:
        with torch.enable_grad():
            loss = closure(factor=factor)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad)
        return loss


def test_arguments_of_step_and_closure_get_there() -> None:
    training = Training()
    optimizer = Scaling(training.model.parameters())
    handle = hold_inactive(training.wrapper, optimizer)

    def closure(factor: float) -> float:
        training.total("T1").backward()
        return factor

    assert optimizer.step(closure, 2.0) == 2
    assert towers(handle) == {"rsfMRI", "dMRI"}


class Perturbing(Optimizer):
    """As sharpness-aware optimizers do: a move, a second gradient, the way back and the step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        moved = [(p, p.detach().clone()) for p in params if p.grad is not None]
        for p, _ in moved:
            p.add_(p.grad)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, old in moved:
            p.copy_(old)
        for p in params:
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
        self.zero_grad()


def backward(model: Towers, active: list[str], wrapper: DummyLossWrapper | None = None) -> None:
    loss = model.loss(active)
    (wrapper.total(loss, active) if wrapper else loss).backward()


def test_an_optimizer_may_move_before_its_closure_and_clear_after_it() -> None:
    """What it clears stays cleared."""
    plain, ours = Towers(), Towers()
    wrapper = ours.wrapper()
    optimizers = [Perturbing(plain.parameters()), Perturbing(ours.parameters())]
    hold_inactive(wrapper, optimizers[1])
    for active in (["T1"], ["dMRI"], ["T1", "rsfMRI"]):
        plain.loss(active).backward()
        optimizers[0].step(partial(backward, plain, active))
        wrapper.total(ours.loss(active), active).backward()
        optimizers[1].step(partial(backward, ours, active, wrapper))
        assert all(p.grad is None for p in ours.parameters())
    assert_same_training(ours, optimizers[1], plain, optimizers[0])


class Decaying(AdamW):
    """Calls the step of its parent, which has hooks too, and goes on with the gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.mul_(0.9)


def test_a_step_within_a_step_holds_until_the_outer_one_ends() -> None:
    model = Towers()
    AdamW(model.parameters())  # an instance, so that the step of the class has hooks
    optimizer = Decaying(model.parameters(), lr=0.1)
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    held = dict(model.towers["dMRI"].named_parameters())
    before = snapshot(held.values(), optimizer)
    train(model, optimizer, wrapper, [["T1"], ["rsfMRI"]])
    assert_untouched(held, optimizer, before)
    assert towers(handle) == {"T1", "dMRI"}


class Careless(SGD):
    """Decays everything, with or without a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.mul_(0.9)


def test_an_optimizer_that_moves_what_has_no_gradient_is_named() -> None:
    training = Training()
    optimizer = Careless(training.model.parameters())
    hold_inactive(training.wrapper, optimizer)
    training.total("T1").backward()
    words = r"Careless, or.* changed held parameters.*: 'towers.rsfMRI.*, and 1 more"
    with pytest.raises(UnsupportedEngineError, match=words):
        optimizer.step()
    assert training.model.towers["dMRI"].weight.grad is not None


class Storing(SGD):
    """Computes its loss in `step`, with what it was given before."""

    loss: Callable[[], Any]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            self.loss()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad)


def test_an_optimizer_that_computes_losses_by_itself_is_named() -> None:
    training = Training()
    optimizer = Storing(training.model.parameters())
    hold_inactive(training.wrapper, optimizer)
    optimizer.loss = lambda: training.total("T1").backward()
    for accumulated in (False, True):
        if accumulated:
            training.total("T1").backward()
        with pytest.raises(UnsupportedEngineError, match=r"Storing computes losses.*base_optimi"):
            optimizer.step()


class Failing(AdamW):
    """Runs out of memory, say, in the middle of its first step."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise MemoryError
        super().step(closure)


@pytest.mark.parametrize("again", [True, False], ids=["tried again", "given up"])
def test_a_step_that_raised_does_not_disturb_the_next(again: bool) -> None:
    model = Towers()
    optimizer = Failing(model.parameters(), lr=0.1)
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    before = snapshot(model.towers["dMRI"].parameters(), optimizer)
    if again:
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, wrapper, [["rsfMRI"]])
    assert towers(handle) == {"T1", "dMRI"}
    assert_untouched(dict(model.towers["dMRI"].named_parameters()), optimizer, before)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    optimizer.step()
    assert model.towers["dMRI"].weight.grad is not None
