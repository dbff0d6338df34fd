"""Whether an optimizer skips parameters without a gradient is found on copies, and is true."""

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from modaldummy import DummyLossWrapper, UnsupportedEngineError, hold_inactive, preflight
from modaldummy._optimizers import why_not_held
from tests.holding import NAMES, Towers, assert_untouched, snapshot, train
from tests.optimizers import OPTIMIZERS, Make

Parameters = Iterable[nn.Parameter]


class Custom(Optimizer):
    """Steps along `direction`, which subclasses define for each parameter."""

    def __init__(self, params: Parameters, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(self.direction(p, self.state[p]), alpha=group["lr"])

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        raise NotImplementedError


class Zeros(Custom):
    """Writes zeros in place of None; momentum then goes on."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        state["momentum"] = state.get("momentum", 0.0) * 0.9 + p.grad
        return state["momentum"]


class Decay(Custom):
    """Decays weights first, and through `data`, which counts no version."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        return 0.1 * p.data + (0.0 if p.grad is None else p.grad)


class Impatient(Decay):
    """Decays weights only in steps that have a gradient."""

    def step(self, closure: Any = None) -> Any:
        if any(p.grad is not None for p in self.param_groups[0]["params"]):
            super().step()


class Matrices(Decay):
    """Decays matrices only."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        return super().direction(p, state) if p.ndim == 2 else torch.zeros_like(p)


class Raw(Custom):
    """Fails at None, after two lines of words."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        if p.grad is None:
            raise TypeError("no lerp_\nof NoneType")
        return p.grad


class Listed(Custom):
    """Steps a list of its own."""

    def __init__(self, params: Parameters, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.listed = self.param_groups[0]["params"]
        self.num_steps = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        for p in self.listed:
            p.data.add_(1)
        super().step()

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        return torch.rand_like(p)


class Communicating(Custom):
    """Needs the other ranks."""

    def direction(self, p: Tensor, state: dict[str, Any]) -> Any:
        return torch.ones_like(p) / dist.get_world_size()


class Locked(Raw):
    """Cannot be copied."""

    def __init__(self, params: Parameters, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.lock = threading.Lock()


def late_first_gradient(params: Parameters) -> Optimizer:
    """All parameters but the first have momentum."""
    params = list(params)
    optimizer = SGD(params, lr=0.1, momentum=0.9, fused=True)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def warm_up(params: Parameters) -> Optimizer:
    """Begins with a learning rate of 0."""
    optimizer = Decay(params)
    LambdaLR(optimizer, lambda epoch: epoch / 10)
    return optimizer


REFUSED: dict[str, tuple[Callable[[Parameters], Optimizer], str]] = {
    "zeros": (Zeros, "Zeros changes parameters that have no gradient"),
    "decay": (Decay, "Decay changes"),
    "decay in steps with gradients": (Impatient, "Impatient changes"),
    "decay of matrices": (Matrices, "Matrices changes"),
    "warm-up": (warm_up, "Decay changes"),
    "error": (Raw, r"Raw fails if a parameter has no gradient \(TypeError: no lerp_\)\. Give"),
    "fused SGD": (partial(SGD, lr=0.1, momentum=0.9, fused=True), "SGD fails.*`foreach=True`"),
    "fused SGD, trained": (late_first_gradient, "SGD fails"),
    "one group": (
        lambda params: SGD(
            [{"params": [p]} | ({"momentum": 0.9} if p.ndim == 1 else {}) for p in params],
            fused=True,
        ),
        "SGD fails",
    ),
    "L-BFGS": (LBFGS, "LBFGS moves all of its parameters along one direction.*except LBFGS"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_an_optimizer_that_does_not_skip_is_refused_before_a_step(make: Any, words: str) -> None:
    model = Towers()
    wrapper, optimizer = model.wrapper(), make(model.towers.parameters())
    parameters = dict(model.named_parameters())
    before = snapshot(parameters.values(), optimizer)
    with pytest.raises(UnsupportedEngineError, match=f"cannot be held: {words}") as error:
        hold_inactive(wrapper, optimizer)
    assert "\n" not in str(error.value)
    assert_untouched(parameters, optimizer, before)
    assert not wrapper._observers


def test_preflight_does_not_recommend_what_is_refused() -> None:
    model = Towers()
    remedies = [
        next(
            f.remedy
            for f in preflight(model.wrapper(), kind(model.parameters(), lr=0.1))
            if f.code == "MD141"
        )
        for kind in (AdamW, Decay)
    ]
    assert "Call `hold_inactive" in remedies[0]
    assert "`hold_inactive` refuses this optimizer: Decay changes" in remedies[1]


ACCEPTED: dict[str, Make] = OPTIMIZERS | {
    "fused": lambda params, lr: AdamW(params, lr=lr, fused=True),
    "foreach": lambda params, lr: AdamW(params, lr=lr, foreach=True),
    "rate in a tensor": lambda params, lr: AdamW(params, lr=torch.tensor(lr), foreach=False),
    "state from the start": lambda params, lr: Adagrad(params, lr=lr),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", ACCEPTED)
def test_an_optimizer_that_skips_is_accepted_and_does_not_change(kind: str, warm: bool) -> None:
    """Hooks for the steps of all optimizers are not called."""
    model = Towers()
    optimizer = ACCEPTED[kind](list(model.parameters()), 0.01)
    wrapper = model.wrapper()
    train(model, optimizer, wrapper, [NAMES] * 2 if warm else [])
    model.zero_grad()
    parameters = dict(model.named_parameters())
    before = snapshot(parameters.values(), optimizer)
    called: list[Any] = []
    hook = register_optimizer_step_post_hook(lambda *_: called.append(0))
    assert why_not_held(optimizer, wrapper.parameters.all()) is None
    hook.remove()
    assert not called
    assert_untouched(parameters, optimizer, before)
    assert all(p.grad is None for p in parameters.values())


UNKNOWN: dict[str, tuple[Callable[[Parameters], Any], str]] = {
    "a lock": (Locked, "pickle"),
    "other ranks": (Communicating, "process group has not been initialized"),
    "no step": (Custom, ""),
    "parameters in an attribute": (Listed, ""),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("make", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_tried_is_unknown_and_may_be_held(make: Any, words: str) -> None:
    """Its steps are checked. The trial changes and reaches nothing."""
    model = Towers()
    wrapper, optimizer = model.wrapper(), make(model.parameters())
    before = snapshot(model.parameters(), optimizer)
    random, world = torch.get_rng_state(), dist.group.WORLD
    if words:
        (finding,) = preflight(wrapper, optimizer)
        assert finding.code == "MD142"
        assert words in finding.evidence["error"]
    with pytest.raises(UnsupportedEngineError) if make is Listed else nullcontext():
        hold_inactive(wrapper, optimizer)
    assert_untouched(dict(model.named_parameters()), optimizer, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert dist.group.WORLD is world
    assert getattr(optimizer, "num_steps", 0) == 0


def test_what_cannot_get_a_dense_gradient_is_not_tried() -> None:
    """An embedding with sparse gradients, and a parameter without elements."""
    model = nn.ModuleDict({"T1": nn.Embedding(3, 2, sparse=True), "dMRI": nn.Linear(2, 2)})
    model["dMRI"].weight = nn.Parameter(torch.empty(0, 2))
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI.weight"})
    owned = wrapper.parameters.all()
    assert why_not_held(SparseAdam([model.get_parameter("T1.weight")]), owned) is None
    assert why_not_held(Raw([model.get_parameter("dMRI.weight")]), owned) is None
