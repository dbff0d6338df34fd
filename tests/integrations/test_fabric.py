"""Lightning Fabric needs nothing of ours but the wrapper and the hold."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from modaldummy import (
    DummyLossWrapper,
    attach_to_outputs,
    gradient_norms,
    hold_inactive,
    preflight,
)
from tests.asserts import assert_same_bits
from tests.holding import NAMES, Towers

pytestmark = pytest.mark.usefixtures("one_thread")

TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI never
MAP = {name: f"towers.{name}" for name in NAMES}
DUMMY = 1e-7 * 16**0.5  # the norm of a tower's dummy gradient


class Called(Towers):
    """Towers whose loss is their forward, as Fabric wants it."""

    def forward(self, active: Sequence[str]) -> Tensor:
        return self.loss(active)


class Run:
    """A model and an AdamW set up by Fabric, with a wrapper of one of them."""

    def __init__(self, wrapped: str = "bare", held: str | None = "inner", **options: Any) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, **options)
        self.fabric.launch()
        self.bare = Called()
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.1)
        self.model, self.optimizer = self.fabric.setup(self.bare, optimizer)
        owners = {"bare": self.bare, "inside": self.model.module, "set up": self.model}
        owner = owners.get(wrapped)
        self.wrapper: Any = None if owner is None else DummyLossWrapper(owner, MAP)
        if self.wrapper is not None and held is not None:
            hold_inactive(self.wrapper, optimizer if held == "inner" else self.optimizer)

    def backward(self, active: Sequence[str], accumulated: int = 1, last: bool = True) -> None:
        with self.fabric.no_backward_sync(self.model, enabled=not last):
            loss = self.model(active)
            total = loss if self.wrapper is None else self.wrapper.total(loss, active)
            self.fabric.backward(total / accumulated)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor | None]:
        named = self.bare.named_parameters()
        return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def fp16() -> MixedPrecision:
    # The default factor of 65,536 is infinite in float16, in which the loss of `Towers` is.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


@pytest.mark.parametrize("held", ["inner", "of Fabric"])
@pytest.mark.parametrize("wrapped", ["bare", "inside", "set up"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_training_that_is_held_is_that_without_the_wrapper(
    wrapped: str, held: str, precision: str
) -> None:
    """Whichever of model and optimizer wrapper and hold are given; dummies are exactly `scale`."""
    factor = 2.0**8 if precision == "fp16" else 1.0
    runs = []
    for own in (wrapped, "none"):
        options: dict[str, Any] = (
            {"plugins": fp16()} if precision == "fp16" else {"precision": precision}
        )
        runs.append(Run(own, held, **options))
    ours, without = runs
    for active in TURNS:
        for run in runs:
            run.backward(active)
        expected = without.gradients()
        for name, gradient in ours.gradients().items():
            bare = expected[name]
            if bare is None:
                assert gradient is not None, name
                bare = torch.full_like(gradient, 1e-7 * factor)
            assert_same_bits(gradient, bare, name)
        for run in runs:
            run.step()
    for name, parameter in without.bare.named_parameters():
        assert_same_bits(ours.bare.get_parameter(name), parameter, name)


def test_accumulated_and_clipped() -> None:
    """What is inactive in all batches gets `scale` before clipping; labels are those of all."""
    run = Run()
    start = {name: p.detach().clone() for name, p in run.bare.named_parameters()}
    run.backward(["T1"], 2, last=False)
    run.backward(["rsfMRI"], 2)
    norms = gradient_norms(run.wrapper, active=["T1", "rsfMRI"])
    assert norms["grad_norm/dMRI"] == pytest.approx(DUMMY)
    assert "grad/[rsfMRI]/towers.rsfMRI.weight" in norms
    total = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=1e-3)
    assert total is not None
    assert total > 1e-3
    clipped = gradient_norms(run.wrapper, active=["T1", "rsfMRI"])
    assert clipped["grad_norm/dMRI"] == pytest.approx(DUMMY * 1e-3 / float(total), rel=1e-3)
    run.step()
    moved = {n for n, p in run.bare.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {name for name in start if "dMRI" not in name}


@pytest.mark.usefixtures("a_group")
def test_ddp() -> None:
    run = Run(strategy=DDPStrategy(process_group_backend="gloo"))
    assert preflight(run.wrapper, run.optimizer.optimizer, run.model) == []
    start = run.bare.towers["dMRI"].weight.detach().clone()
    for active in TURNS:
        run.backward(active, 2, last=False)
        run.backward(active, 2)
        norms = gradient_norms(run.wrapper)
        assert norms["grad_norm/dMRI"] == pytest.approx(DUMMY)
        run.step()
    assert torch.equal(run.bare.towers["dMRI"].weight, start)


@pytest.mark.usefixtures("a_group")
def test_ddp_that_finds_unused_parameters_takes_an_attachment() -> None:
    """Here, unlike in Lightning's Trainer, the loss is computed outside of DDP's forward."""
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    run = Run(strategy=strategy)
    found = preflight(run.wrapper, run.optimizer.optimizer, run.model)
    assert [finding.code for finding in found] == ["MD101"]
    with attach_to_outputs(run.wrapper, run.model):
        for active in TURNS:
            run.backward(active)
            assert None not in run.gradients().values()
            run.step()
