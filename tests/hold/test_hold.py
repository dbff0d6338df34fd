"""Hold: what no batch has trained stays exactly as it is; all else goes on as without a hold."""

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from modaldummy import attach_to_outputs, hold_inactive
from modaldummy._hold.dummy_gradients import may_be_dummy_gradient
from tests.holding import (
    NAMES,
    Towers,
    assert_same_training,
    assert_untouched,
    snapshot,
    train,
)
from tests.optimizers import OPTIMIZERS, Make

VARIANTS: dict[str, Make] = OPTIMIZERS | {
    "AdamW, fused": lambda params, lr: AdamW(params, lr=lr, fused=True),
    "AdamW, foreach": lambda params, lr: AdamW(params, lr=lr, foreach=True),
    "SGD, fused": lambda params, lr: SGD(params, lr=lr, fused=True),
    "SGD, foreach": lambda params, lr: SGD(params, lr=lr, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_every_optimizer_leaves_an_inactive_modality_alone(kind: str, warm: bool) -> None:
    """Value, state and step counter, whether the optimizer has ever seen it or not."""
    model = Towers()
    optimizer = VARIANTS[kind](list(model.parameters()), 0.01)
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    train(model, optimizer, wrapper, [NAMES] * 3 if warm else [])
    held = {f"towers.dMRI.{name}": p for name, p in model.towers["dMRI"].named_parameters()}
    before = snapshot(held.values(), optimizer)
    others = snapshot(model.trunk.parameters(), optimizer)
    train(model, optimizer, wrapper, [["T1"], ["T1", "rsfMRI"]] * 2)
    assert_untouched(held, optimizer, before)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    expected = {name for name, parameter in held.items() if parameter in owned}
    assert {name for name in handle.held if "rsfMRI" not in name} == expected
    assert not torch.equal(others[0][0], model.trunk.weight)


def test_removing_the_handle_lets_the_optimizer_go() -> None:
    """Adam then makes steps of a learning rate out of 1e-7, as it does without a hold."""
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.01)
    wrapper = model.wrapper()
    before = snapshot(model.towers["dMRI"].parameters(), optimizer)
    with hold_inactive(wrapper, optimizer) as handle:
        train(model, optimizer, wrapper, [["T1"]] * 10)
        assert_untouched(dict(model.towers["dMRI"].named_parameters()), optimizer, before)
    for _ in range(2):
        handle.remove()
    assert wrapper._observers == []
    train(model, optimizer, wrapper, [["T1"]] * 10)
    moved = (before[0][0] - model.towers["dMRI"].weight).abs()
    assert moved.min() > 8 * 0.01


def test_the_repr_of_a_handle_says_what_it_acts_on() -> None:
    model = Towers()
    wrapper = model.wrapper()
    hold = hold_inactive(wrapper, AdamW(model.parameters()))
    attached = attach_to_outputs(wrapper, model)
    assert repr(hold) == "<HoldHandle of AdamW, in effect>"
    assert repr(attached) == "<AttachHandle of Towers, in effect>"
    hold.remove()
    attached.remove()
    assert repr(hold) == "<HoldHandle of AdamW, removed>"
    assert repr(attached) == "<AttachHandle of Towers, removed>"


def test_a_handle_shows_only_what_users_need() -> None:
    model = Towers()
    handle = hold_inactive(model.wrapper(), AdamW(model.parameters()))
    public = {name for name in dir(handle) if not name.startswith("_")}
    assert public == {"held", "remove", "removed"}


@pytest.mark.parametrize("kind", VARIANTS)
def test_training_is_that_without_a_dummy(kind: str) -> None:
    """The optimizer sees the gradients that it would have seen: bit for bit the same parameters."""
    plain, ours = Towers(), Towers()
    steps = [["T1"], NAMES, ["rsfMRI"], ["T1", "dMRI"], ["rsfMRI"], ["T1"]]
    plain_optimizer = VARIANTS[kind](list(plain.parameters()), 0.01)
    optimizer = VARIANTS[kind](list(ours.parameters()), 0.01)
    wrapper = ours.wrapper()
    hold_inactive(wrapper, optimizer)
    train(plain, plain_optimizer, None, steps)
    train(ours, optimizer, wrapper, steps)
    assert_same_training(ours, optimizer, plain, plain_optimizer)


def test_gradients_are_there_for_everyone_but_the_optimizer() -> None:
    """Hooks of backward see them, and after the step they are the same tensors as before."""
    model = Towers()
    optimizer = Adam(model.parameters())
    wrapper = model.wrapper()
    hold_inactive(wrapper, optimizer)
    weight = model.towers["dMRI"].weight
    seen: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad))
    wrapper.total(model.loss(["T1"]), ["T1"]).backward()
    gradient = weight.grad
    optimizer.step()
    assert seen == [gradient, None]
    assert weight.grad is gradient is not None
    assert torch.equal(gradient, torch.full_like(weight, 1e-7))


def test_gradients_are_there_after_a_step_that_held_everything() -> None:
    model = Towers()
    optimizer = Adam(model.towers["dMRI"].parameters())
    wrapper = model.wrapper()
    hold_inactive(wrapper, optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    gradients = [p.grad for p in model.towers["dMRI"].parameters()]
    optimizer.step()
    after = [p.grad for p in model.towers["dMRI"].parameters()]
    assert all(one is other is not None for one, other in zip(gradients, after, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skipped(fused: bool, set_to_none: bool) -> None:
    """What was active only in a step that overflowed is held in the next."""
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    held = []
    for active, factor in ((NAMES, 1.0), (["T1", "rsfMRI"], float("inf")), (["T1"], 1.0)):
        scaler.scale(wrapper.total(model.loss(active) * factor, active)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none)
        held.append({name.split(".")[1] for name in handle.held})
    assert held[0] == set()
    # With zeros in place of None nobody can tell that the gradients were cleared.
    assert held[2] == ({"dMRI"} if not fused and not set_to_none else {"rsfMRI", "dMRI"})


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_overflows_is_that_without_a_dummy(fused: bool) -> None:
    plain, ours = Towers(), Towers()
    wrapper = ours.wrapper()
    optimizers = []
    for model in (plain, ours):
        optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
        optimizers.append(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if model is ours:
            hold_inactive(wrapper, optimizer)
        for active, factor in ((NAMES, 1.0), (["T1", "rsfMRI"], float("inf")), (["T1"], 1.0)):
            loss = model.loss(active) * factor
            total = wrapper.total(loss, active) if model is ours else loss
            optimizer.zero_grad()  # between forward and backward, as many loops have it
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same_training(ours, optimizers[1], plain, optimizers[0])
    assert [int(optimizers[1].state[t.weight]["step"]) for t in ours.towers.values()] == [2, 1, 1]


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
def test_dummies_alone_are_uniform(gradient: torch.Tensor, uniform: bool) -> None:
    assert may_be_dummy_gradient(gradient) == uniform


@pytest.mark.parametrize("rows", [0, 1])
def test_a_sparse_dummy_is_empty(rows: int) -> None:
    indices = torch.zeros(1, rows, dtype=torch.long)
    gradient = torch.sparse_coo_tensor(indices, torch.ones(rows, 2), (3, 2), check_invariants=True)
    assert may_be_dummy_gradient(gradient) == (rows == 0)
