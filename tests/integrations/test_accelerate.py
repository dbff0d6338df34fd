"""Accelerate needs nothing of ours but the wrapper and the hold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from modaldummy import DummyLossWrapper, attach_to_outputs, gradient_norms, hold_inactive, preflight
from tests.asserts import assert_same_bits
from tests.holding import NAMES, Towers

MAP = {name: f"towers.{name}" for name in NAMES}
DUMMY = 1e-7 * 16**0.5  # the norm of a tower's dummy gradient


def forget() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def a_state_of_its_own(one_thread: None) -> Iterator[None]:
    """Accelerate keeps one for the whole process."""
    forget()
    yield
    forget()


class Called(Towers):
    """Towers whose loss is their forward, as Accelerate wants it."""

    def forward(self, active: Sequence[str]) -> Tensor:
        return self.loss(active)


class Kept(GeneralTracker):  # type: ignore[misc]  # it ships no type information
    """Keeps what it is given, as pairs of a step and metrics."""

    name = "kept"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, Mapping[str, float]]] = []

    def log(self, values: Mapping[str, float], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))


class Run:
    """A model and an AdamW that Accelerate prepares, with a wrapper and a hold, or without."""

    def __init__(self, wrapped: bool = True, max_norm: float | None = None, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, **options)
        self.accelerator.init_trackers("test")
        self.bare = Called()
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.wrapper: Any = None
        if wrapped:
            self.wrapper = DummyLossWrapper(self.model, MAP)
            hold_inactive(self.wrapper, self.optimizer.optimizer)
        self.max_norm = max_norm
        self.gradients: list[dict[str, Tensor | None]] = []  # of each step, not clipped
        self.clipped: list[float] = []
        self._seen: set[str] = set()

    def train(self, turns: Sequence[Sequence[str]]) -> None:
        for active in turns:
            with self.accelerator.accumulate(self.model):
                loss = self.model(active)
                total = loss if self.wrapper is None else self.wrapper.total(loss, active)
                self.accelerator.backward(total)
                self._seen.update(active)
                if self.accelerator.sync_gradients:
                    self._before_step()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def _before_step(self) -> None:
        named = self.bare.named_parameters()
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in named})
        if self.wrapper is not None:
            norms = gradient_norms(
                self.wrapper, active=sorted(self._seen), scaler=self.accelerator.scaler
            )
            self.accelerator.log(self.wrapper.last.as_dict() | norms, step=len(self.gradients))
        if self.max_norm is not None:
            parameters = self.model.parameters()
            self.clipped.append(float(self.accelerator.clip_grad_norm_(parameters, self.max_norm)))
        self._seen.clear()


TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI never


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_that_is_held_is_that_without_the_wrapper(precision: str) -> None:
    """Bit for bit, with AdamW; inactive gradients are exactly `scale`."""
    runs = [Run(wrapped, mixed_precision=precision) for wrapped in (True, False)]
    for run in runs:
        run.train(TURNS)
    ours, bare = runs
    assert len(ours.gradients) == len(bare.gradients) == len(TURNS)
    for actual, without in zip(ours.gradients, bare.gradients, strict=True):
        for name, gradient in actual.items():
            assert gradient is not None, name
            expected = without[name]
            if expected is None:
                expected = torch.full_like(gradient, 1e-7)
            assert_same_bits(gradient, expected, name)
    for name, parameter in bare.bare.named_parameters():
        assert_same_bits(ours.bare.get_parameter(name), parameter, name)


def test_accumulated_dummies_are_those_of_one_step() -> None:
    """`backward` divides the total, so that a parameter inactive in all batches gets `scale`."""
    run = Run(gradient_accumulation_steps=4)
    start = {name: p.detach().clone() for name, p in run.bare.named_parameters()}
    run.train([["T1"], ["T1"], ["rsfMRI"], ["T1"]])
    (gradients,) = run.gradients
    weight = gradients["towers.dMRI.weight"]
    assert weight is not None
    assert_same_bits(weight, torch.full_like(weight, 1e-7), "dMRI")
    moved = {n for n, p in run.bare.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {name for name in start if "dMRI" not in name}


def test_a_tracker_gets_report_and_norms_of_each_step() -> None:
    """Norms are those before clipping, labels those of all accumulated batches."""
    tracker = Kept()
    run = Run(log_with=tracker, gradient_accumulation_steps=2, max_norm=1e-3)
    run.train(TURNS)
    assert [step for step, _ in tracker.rows] == [1, 2]
    for _, row in tracker.rows:
        assert row["grad_norm/dMRI"] == pytest.approx(DUMMY)
        assert {"grad/[T1]/towers.T1.bias", "grad/[rsfMRI]/towers.rsfMRI.bias"} <= row.keys()
        assert 0 < row["modaldummy/fraction"] <= 1e-4
    assert min(run.clipped) > 1e-3


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


def test_nothing_is_found() -> None:
    run = Run()
    assert preflight(run.wrapper, run.optimizer.optimizer, run.model, accumulation_steps=2) == []


def test_what_prepare_returned_is_no_optimizer_to_hold() -> None:
    """The message names the way to the one inside."""
    run = Run(wrapped=False)
    with pytest.raises(TypeError, match=r"Pass the inner one, often `optimizer\.optimizer`"):
        hold_inactive(DummyLossWrapper(run.model, MAP), run.optimizer)


def train(rank: int) -> tuple[list[str], dict[str, Tensor]]:
    """What is found, and gradients, where DDP looks for unused parameters on two ranks."""
    forget()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names = {name: str(number) for name, number in own.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator, bare = Accelerator(cpu=True, kwargs_handlers=[kwargs]), Called()
        model = accelerator.prepare(bare)
        wrapper = DummyLossWrapper(bare, MAP)
        with attach_to_outputs(wrapper, model):
            codes = [finding.code for finding in preflight(wrapper, None, model)]
            active = [["T1"], ["rsfMRI"]][rank]
            for _ in range(2):
                bare.zero_grad()
                accelerator.backward(wrapper.total(model(active), active))
        assert model is not bare
    forget()
    return codes, {name: p.grad for name, p in bare.named_parameters() if p.grad is not None}


@pytest.mark.long
def test_ranks_where_ddp_finds_unused_parameters(two: Any) -> None:
    """They average real and dummy gradients."""
    for codes, gradients in two.ask(train):
        assert codes == []
        assert gradients.keys() == dict(Called().named_parameters()).keys()
        weight = gradients["towers.dMRI.weight"]
        torch.testing.assert_close(weight, torch.full_like(weight, 1e-7))
        assert gradients["towers.T1.weight"].norm() > 1e-3
