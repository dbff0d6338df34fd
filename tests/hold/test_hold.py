"""Hold: the optimizer leaves untrained parameters exactly as they are, and trains all others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from modaldummy import DummyLossWrapper, hold_inactive
from modaldummy._hold import is_held
from tests.holding import NAMES, Towers, Training, assert_same_training, towers, train
from tests.optimizers import OPTIMIZERS, Make

VARIANTS: dict[str, Make] = OPTIMIZERS | {
    "AdamW, fused": lambda params, lr: AdamW(params, lr=lr, fused=True),
    "AdamW, foreach": lambda params, lr: AdamW(params, lr=lr, foreach=True),
    "SGD, fused": lambda params, lr: SGD(params, lr=lr, fused=True),
    "SGD, foreach": lambda params, lr: SGD(params, lr=lr, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_training_is_that_without_a_dummy_term(kind: str) -> None:
    """Values and optimizer states are bit for bit the same, cold and warm ones."""
    plain, ours = Towers(), Training(lambda parameters: VARIANTS[kind](list(parameters), 0.01))
    optimizer = VARIANTS[kind](list(plain.parameters()), 0.01)
    steps = [["T1"], NAMES, ["rsfMRI"], ["T1", "dMRI"], ["rsfMRI"], ["T1"]]
    train(plain, optimizer, None, steps)
    ours.train(steps)
    assert_same_training(ours.model, ours.optimizer, plain, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_overflows_is_that_without_a_dummy_term(fused: bool) -> None:
    plain, ours = Towers(), Training(lambda parameters: AdamW(parameters, lr=0.1, fused=fused))
    optimizer = AdamW(plain.parameters(), lr=0.1, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for active, factor in ((NAMES, 1.0), (["T1", "rsfMRI"], float("inf")), (["T1"], 1.0)):
        losses = plain.loss(active), ours.total(*active)
        for scaler, one, loss in zip(scalers, (optimizer, ours.optimizer), losses, strict=True):
            one.zero_grad()  # between forward and backward, as in many loops
            scaler.scale(loss * factor).backward()
            scaler.step(one)
            scaler.update()
    assert_same_training(ours.model, ours.optimizer, plain, optimizer)
    states = [ours.optimizer.state[tower.weight] for tower in ours.model.towers.values()]
    assert [int(state["step"]) for state in states] == [2, 1, 1]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skipped(fused: bool, set_to_none: bool) -> None:
    """A modality that was active only in a step with an overflow is held in the next step."""
    training = Training(lambda parameters: AdamW(parameters, lr=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for active, factor in ((NAMES, 1.0), (["T1", "rsfMRI"], float("inf")), (["T1"], 1.0)):
        scaler.scale(training.total(*active) * factor).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad(set_to_none)
    # With zeros in place of None, nobody can tell that the gradients were cleared.
    cleared = fused or set_to_none
    assert towers(training.handle) == ({"rsfMRI", "dMRI"} if cleared else {"dMRI"})


def test_removing_the_handle_ends_the_hold() -> None:
    """Adam then turns a gradient of 1e-7 into steps of a learning rate."""
    training = Training()
    weight = training.model.towers["dMRI"].weight
    before = weight.detach().clone()
    with training.holding("dMRI"), training.handle as handle:
        assert repr(handle) == "<HoldHandle of AdamW, in effect>"
        assert is_held(training.wrapper, training.optimizer)
        training.train([["T1"]] * 10)
    for _ in range(2):
        handle.remove()
    assert repr(handle) == "<HoldHandle of AdamW, removed>"
    assert not training.wrapper._observers
    assert not is_held(training.wrapper, training.optimizer)
    training.train([["T1"]] * 10)
    assert (before - weight).abs().min() > 8 * 0.1


def test_a_handle_shows_only_what_users_need() -> None:
    public = {name for name in dir(Training().handle) if not name.startswith("_")}
    assert public == {"held", "remove", "removed"}


def test_only_the_optimizer_sees_no_gradients() -> None:
    """Hooks of backward see them, and after the step they are the same tensors as before."""
    training = Training()
    weight = training.model.towers["dMRI"].weight
    seen: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    training.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad))
    training.backward("T1")
    gradient = weight.grad
    training.optimizer.step()
    assert seen == [gradient, None]
    assert weight.grad is gradient is not None
    assert torch.equal(gradient, torch.full_like(weight, 1e-7))


def test_gradients_exist_after_a_step_that_held_everything() -> None:
    model = Towers()
    optimizer = Adam(model.towers["dMRI"].parameters())
    wrapper = model.wrapper()
    hold_inactive(wrapper, optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    gradients = [p.grad for p in model.towers["dMRI"].parameters()]
    optimizer.step()
    after = [p.grad for p in model.towers["dMRI"].parameters()]
    assert all(one is other is not None for one, other in zip(gradients, after, strict=True))


# --- the trunk --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["trunk, dMRI", "dMRI, trunk"])
def test_what_the_trunk_shares_is_never_held(order: str) -> None:
    """Such as a norm, whichever of its names comes first in the model."""
    norm = nn.LayerNorm(3)
    model: Any = nn.ModuleDict({"T1": nn.Linear(3, 3)})
    model.update({name: nn.Sequential(nn.Linear(3, 3), norm) for name in order.split(", ")})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    before = norm.weight.detach().clone()
    wrapper.total(model["trunk"](model["T1"](torch.ones(1, 3))).square().mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.0.weight", "dMRI.0.bias")
    assert not torch.equal(before, norm.weight)


def test_a_module_in_two_places_of_a_tower_is_held() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"T1": nn.Linear(3, 3), "dMRI": nn.Sequential(layer, layer)})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model["T1"](torch.ones(1, 3)).mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.0.weight", "dMRI.0.bias")


# --- what is refused --------------------------------------------------------------------------

MODEL = Towers()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "several optimizers": (
        lambda: [AdamW(MODEL.parameters())],
        TypeError,
        ["`optimizer`", "torch.optim.Optimizer", "list", "once for each"],
    ),
    "parameters of another model": (
        lambda: AdamW(Towers().parameters()),
        ValueError,
        ["AdamW", "no parameter", "'T1', 'rsfMRI', 'dMRI'", "moved or sharded"],
    ),
    "an optimizer around another": (
        lambda: Accelerator(cpu=True).prepare(AdamW(MODEL.parameters())),
        TypeError,
        ["AcceleratedOptimizer", "no step hooks", "`optimizer.optimizer`"],
    ),
}


@pytest.mark.parametrize(("make", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do(
    make: Callable[[], Any], kind: type[Exception], words: list[str]
) -> None:
    wrapper, optimizer = MODEL.wrapper(), make()
    with pytest.raises(kind) as error:
        hold_inactive(wrapper, optimizer)
    for word in words:
        assert word in str(error.value)
    assert not wrapper._observers
    assert not is_held(wrapper, optimizer)


def test_the_inner_optimizer_of_accelerate_is_held() -> None:
    """The way out that the message names."""
    model = Towers()
    wrapper = model.wrapper()
    optimizer = Accelerator(cpu=True).prepare(AdamW(model.parameters()))
    handle = hold_inactive(wrapper, optimizer.optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    optimizer.step()
    assert towers(handle) == {"rsfMRI", "dMRI"}


def test_why_fused_sgd_with_momentum_is_refused() -> None:
    """The refusal can go once torch supports this."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([first, second], momentum=0.9, fused=True)
    first.grad = torch.ones(2)
    optimizer.step()
    second.grad = torch.ones(2)
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.step()
