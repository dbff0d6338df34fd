"""Loops with Lightning Fabric and Accelerate need only the wrapper and the hold."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
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

MAP = {name: f"towers.{name}" for name in NAMES}
TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI is never active
DUMMY = 1e-7 * 16**0.5  # the norm of a tower's dummy gradient


def reset_accelerate() -> None:
    """Accelerate keeps one state for the whole process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def state_of_accelerate(one_thread: None) -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


class Called(Towers):
    """Towers whose loss is their forward."""

    def forward(self, active: Sequence[str]) -> Tensor:
        return self.loss(active)


class Run:
    """A model and an AdamW that a framework has set up.

    Attributes:
        bare: The model.
        model: The model, set up.
        inner: The optimizer.
        optimizer: The optimizer, set up.
    """

    def __init__(self, framework: str, **options: Any) -> None:
        self.bare = Called()
        self.inner = torch.optim.AdamW(self.bare.parameters(), lr=0.1)
        if framework == "fabric":
            engine: Any = Fabric(accelerator="cpu", devices=1, **options)
            engine.launch()
            self.model, self.optimizer = engine.setup(self.bare, self.inner)
        else:
            engine = Accelerator(cpu=True, **options)
            self.model, self.optimizer = engine.prepare(self.bare, self.inner)
        self.engine = engine
        self.wrapper: DummyLossWrapper | None = None

    def backward(self, active: Sequence[str], num_batches: int = 1) -> None:
        loss = self.model(active)
        total = loss if self.wrapper is None else self.wrapper.total(loss, active)
        self.engine.backward(total / num_batches)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def fp16() -> MixedPrecision:
    # The default factor of 65,536 is infinite in float16, in which the loss of `Towers` is.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


# Framework, its options, which model the wrapper gets, and which optimizer the hold gets.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "fabric": ("fabric", {}, "bare", "inner"),
    "fabric, bfloat16": ("fabric", {"precision": "bf16-mixed"}, "model", "inner"),
    "fabric, float16": ("fabric", {"plugins": fp16}, "model", "optimizer"),
    "accelerate": ("accelerate", {}, "bare", "inner"),
    "accelerate, bfloat16": ("accelerate", {"mixed_precision": "bf16"}, "model", "inner"),
}


@pytest.mark.parametrize(
    ("framework", "options", "wrapped", "held"), CASES.values(), ids=CASES.keys()
)
def test_held_training_is_that_without_the_wrapper(
    framework: str, options: dict[str, Any], wrapped: str, held: str
) -> None:
    """Bit for bit; dummy gradients are exactly the scale, and there are no findings."""
    factor = 2.0**8 if "plugins" in options else 1.0
    runs = []
    for _ in range(2):
        made = {k: value() if callable(value) else value for k, value in options.items()}
        runs.append(Run(framework, **made))
    ours, bare = runs
    ours.wrapper = DummyLossWrapper(getattr(ours, wrapped), MAP)
    hold_inactive(ours.wrapper, getattr(ours, held))
    assert preflight(ours.wrapper, getattr(ours, held), ours.model) == []
    for active in TURNS:
        for run in runs:
            run.backward(active)
        for name, parameter in bare.bare.named_parameters():
            found, expected = ours.bare.get_parameter(name).grad, parameter.grad
            if expected is None:
                expected = torch.full_like(parameter, 1e-7 * factor).detach()
            assert_same_bits(found, expected, name)
        for run in runs:
            run.step()
        for name, parameter in bare.bare.named_parameters():
            assert_same_bits(ours.bare.get_parameter(name), parameter, name)


def test_accumulated_and_clipped_with_fabric() -> None:
    """A parameter that is inactive in all batches gets `scale` before clipping."""
    run = Run("fabric")
    run.wrapper = DummyLossWrapper(run.bare, MAP)
    hold_inactive(run.wrapper, run.inner)
    start = {name: p.detach().clone() for name, p in run.bare.named_parameters()}
    for active in (["T1"], ["rsfMRI"]):
        run.backward(active, 2)
    norms = gradient_norms(run.wrapper, active=["T1", "rsfMRI"])
    assert norms["grad_norm/dMRI"] == pytest.approx(DUMMY)
    total = float(run.engine.clip_gradients(run.model, run.optimizer, max_norm=1e-3))
    clipped = gradient_norms(run.wrapper, active=["T1", "rsfMRI"])
    assert clipped["grad_norm/dMRI"] == pytest.approx(DUMMY * 1e-3 / total, rel=1e-3)
    run.step()
    moved = {name for name, p in run.bare.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "dMRI" not in name}


def test_accumulated_with_accelerate() -> None:
    """`backward` divides the total, so that a parameter inactive in all batches gets `scale`."""
    run = Run("accelerate", gradient_accumulation_steps=4)
    run.wrapper = DummyLossWrapper(run.bare, MAP)
    for active in (["T1"], ["T1"], ["rsfMRI"], ["T1"]):
        with run.engine.accumulate(run.model):
            run.backward(active)
    weight = run.bare.towers["dMRI"].weight
    assert_same_bits(weight.grad, torch.full_like(weight, 1e-7).detach(), "dMRI")


def test_a_hold_from_before_prepare_stays() -> None:
    """`prepare` loads the optimizer's own state into it."""
    accelerator, bare = Accelerator(cpu=True), Called()
    inner = torch.optim.AdamW(bare.parameters(), lr=0.1)
    wrapper = DummyLossWrapper(bare, MAP)
    handle = hold_inactive(wrapper, inner)
    model, optimizer = accelerator.prepare(bare, inner)
    accelerator.backward(wrapper.total(model(["T1"]), ["T1"]))
    optimizer.step()
    assert {name.split(".")[1] for name in handle.held} == {"rsfMRI", "dMRI"}


def test_the_optimizer_of_accelerate_is_refused() -> None:
    """The message names the way to the one inside."""
    run = Run("accelerate")
    with pytest.raises(TypeError, match=r"Pass the inner one, often `optimizer\.optimizer`"):
        hold_inactive(DummyLossWrapper(run.model, MAP), run.optimizer)


@pytest.mark.usefixtures("a_group")
def test_ddp_that_looks_for_unused_parameters_needs_an_attachment() -> None:
    """Unlike in Lightning's Trainer, the dummy term is added outside of DDP's forward."""
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    run = Run("fabric", strategy=strategy)
    run.wrapper = DummyLossWrapper(run.bare, MAP)
    hold_inactive(run.wrapper, run.inner)
    found = preflight(run.wrapper, run.inner, run.model)
    assert [finding.code for finding in found] == ["MD101"]
    with attach_to_outputs(run.wrapper, run.model):
        for active in TURNS:
            run.backward(active)
            assert all(p.grad is not None for p in run.bare.parameters())
            run.step()


def train(rank: int) -> tuple[list[str], dict[str, Tensor]]:
    """Codes of findings, and gradients, if Accelerate's DDP looks for unused parameters."""
    reset_accelerate()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (own | {"OMP_NUM_THREADS": 1}).items():
            patch.setenv(name, str(number))
        kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
        run = Run("accelerate", kwargs_handlers=[kwargs])
        run.wrapper = DummyLossWrapper(run.bare, MAP)
        with attach_to_outputs(run.wrapper, run.model):
            codes = [finding.code for finding in preflight(run.wrapper, None, run.model)]
            for _ in range(2):
                run.bare.zero_grad()
                run.backward([["T1"], ["rsfMRI"]][rank])
        assert run.model is not run.bare
    reset_accelerate()
    named = run.bare.named_parameters()
    return codes, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.long
def test_two_ranks_with_accelerate(two: Any) -> None:
    """They average real and dummy gradients."""
    for codes, gradients in two.ask(train):
        assert codes == []
        assert gradients.keys() == dict(Called().named_parameters()).keys()
        weight = gradients["towers.dMRI.weight"]
        torch.testing.assert_close(weight, torch.full_like(weight, 1e-7))
        assert gradients["towers.T1.weight"].norm() > 1e-3
