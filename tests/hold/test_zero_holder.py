"""A hold of a DeepSpeed engine, with a stand-in for the engine in one process."""

import copy
import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from modaldummy import DummyLossWrapper, HoldHandle, UnsupportedEngineError, hold_inactive
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import zero_flat_parameters
from modaldummy._hold import is_held
from modaldummy._hold.wrapper_hold import WrapperHold
from tests.holding import NAMES, Towers, towers
from tests.zero_engine import Zero3, Zero12, ZeroEngine, zero_snapshot

ADAMW = partial(AdamW, lr=0.1, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": ADAMW,
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}
# The stage, and the rank where ZeRO-1 and 2 step a half of each flat tensor.
PLACES = {"ZeRO-1, rank 0": (1, 0), "ZeRO-2, rank 1": (2, 1), "ZeRO-3": (3, 0)}
of_places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process group of a `Zero12` is its rank."""
    monkeypatch.setattr(dist, "get_rank", lambda group: group)


class Training:
    """A model in a held engine."""

    def __init__(
        self,
        place: tuple[int, int] = (1, 0),
        make: Callable[..., Optimizer] = ADAMW,
        *,
        has_groups: bool = False,
        num_micros: int = 1,
    ) -> None:
        self.model = Towers()
        stage, rank = place
        parts = [*self.model.towers.values(), self.model.trunk] if has_groups else [self.model]
        groups = [list(part.parameters()) for part in parts]
        zero: Any = Zero3(groups, make) if stage == 3 else Zero12(groups, make, rank)
        self.engine = ZeroEngine(self.model, stage, zero, num_micros)
        self.wrapper = self.model.wrapper()
        self.handle: HoldHandle = hold_inactive(self.wrapper, self.engine)

    def micro(self, *active: str) -> None:
        self.wrapper.total(self.model.loss(active), active).backward()
        self.engine.step()

    def step(self, *active: str) -> set[str]:
        """Train a batch; the towers that are held."""
        self.micro(*active)
        return towers(self.handle)

    def snapshot(self) -> dict[tuple[str, str], Tensor]:
        named = self.model.named_parameters()
        values = {(name, "module"): p.detach().clone() for name, p in named}
        return values | zero_snapshot(self.engine)

    def state(self, name: str) -> dict[str, Any]:
        """The optimizer state of the group of a tower."""
        zero = self.engine.optimizer
        group = next(g for g in zero.groups if g.parameters[0] is self.model.towers[name].weight)
        state: dict[str, Any] = zero.optimizer.state[group.flat]
        return state


def is_of(name: str, keys: Iterable[str]) -> bool:
    """Whether a parameter is of one of the towers."""
    return any(name.startswith(f"towers.{key}.") for key in keys)


@of_places
@pytest.mark.parametrize("has_groups", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@settings(max_examples=20)
@given(steps=st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=5))
def test_what_no_batch_trains_stays_and_the_rest_is_trained_as_without_a_hold(
    place: tuple[int, int],
    has_groups: bool,
    make: Callable[..., Optimizer],
    steps: list[set[str]],
) -> None:
    training = Training(place, make, has_groups=has_groups)
    for active in steps:
        before = training.snapshot()
        free = copy.deepcopy(training)  # a copy of an optimizer holds nothing
        held = training.step(*active)
        assert held == set(NAMES) - active
        free.micro(*active)
        without = free.snapshot()
        for key, new in training.snapshot().items():
            if is_of(key[0], held):
                old = before.get(key, torch.zeros_like(new))
                assert torch.equal(new, old), f"{key} moved"
            elif not has_groups or is_of(key[0], active) or "trunk" in key[0]:
                assert torch.equal(new, without[key]), f"{key} differs"


def test_after_the_hold_has_ended_all_towers_move() -> None:
    training = Training()
    training.step("T1")
    training.handle.remove()
    before = training.snapshot()
    assert training.step("T1") == set()
    after = training.snapshot()
    moved = {name for name, kind in after if not torch.equal(after[name, kind], before[name, kind])}
    assert {"towers.T1.weight", "towers.rsfMRI.weight"} <= moved
    hold: Any = training.handle._hold
    assert hold._holder.holds == []  # no step agrees about it any more


@of_places
def test_a_group_of_which_all_is_held_is_not_stepped(place: tuple[int, int]) -> None:
    training = Training(place, has_groups=True)
    seen: list[list[bool]] = []
    training.engine.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            [p.grad is None for group in optimizer.param_groups for p in group["params"]]
        )
    )
    training.step("T1")
    assert [each for step in seen for each in step] == [False, True, True, False]
    assert not training.state("dMRI")
    training.step("dMRI")
    assert training.state("dMRI")["step"] == 1  # a tower that comes late makes its first step
    assert all(group.flat.grad is not None for group in training.engine.optimizer.groups)


def test_a_group_that_is_held_in_part_counts_its_steps() -> None:
    training = Training((3, 0))
    training.step("T1")
    training.step("T1")
    assert training.state("T1")["step"] == 2


def test_the_whole_group_counts_and_not_the_part_of_the_rank() -> None:
    """Else the counters of the ranks would differ. The first half has T1 and most of rsfMRI."""
    training = Training((1, 0))
    assert training.step("dMRI") == {"T1", "rsfMRI"}
    assert training.state("T1")["step"] == 1


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [(0, 12), (12, 16), (16, 28), (28, 29)]),
        (1, [(0, 3), (3, 15), (15, 19), (19, 27), (27, 29)]),
    ],
)
def test_a_range_ends_with_the_part_of_the_rank(rank: int, expected: list[tuple[int, int]]) -> None:
    (flat,) = zero_flat_parameters(Training((1, rank)).engine)
    assert [(part.start, part.stop) for part in flat.ranges] == expected


def test_ranks_agree_once_for_all_sub_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training((3, 0), has_groups=True)
    calls: list[WrapperHold] = []
    agree = WrapperHold.agree

    def counted(hold: WrapperHold, device: torch.device) -> dict[ModalityKey, bool]:
        calls.append(hold)
        return agree(hold, device)

    monkeypatch.setattr(WrapperHold, "agree", counted)
    for num_steps in (1, 2):
        training.step("T1")
        assert len(calls) == num_steps


def test_a_hold_that_ends_between_backward_and_step_holds_nothing() -> None:
    training = Training()
    training.wrapper.total(training.model.loss(["T1"]), ["T1"]).backward()
    training.handle.remove()
    training.engine.step()
    assert training.handle.held == ()


@of_places
def test_one_micro_batch_is_enough_to_train(place: tuple[int, int]) -> None:
    training = Training(place, num_micros=3)
    for active in ("T1", "rsfMRI", "T1"):
        training.micro(active)
    assert towers(training.handle) == {"dMRI"}
    for _ in range(3):
        training.micro("dMRI")
    assert towers(training.handle) == {"T1", "rsfMRI"}


def test_what_a_skipped_step_would_have_trained_does_not_count_at_the_next() -> None:
    training = Training()
    training.engine.overflows = True
    training.micro("dMRI")
    training.engine.overflows = False
    assert training.step("T1") == {"rsfMRI", "dMRI"}


def test_a_step_without_a_loss_of_the_wrapper_holds_nothing() -> None:
    """The loss may have trained anything."""
    training = Training()
    training.step("T1")
    training.model.loss(["dMRI"]).backward()
    training.engine.step()
    assert training.handle.held == ()


def test_a_checkpoint_of_the_step_before_makes_a_new_decision() -> None:
    """DeepSpeed sets `global_steps` back when it loads one."""
    training = Training()
    assert training.step("T1") == {"rsfMRI", "dMRI"}
    training.engine.global_steps = 0
    assert training.step("dMRI") == {"T1", "rsfMRI"}


def test_frozen_parameters_that_zero_does_not_step_are_not_listed() -> None:
    model = Towers()
    model.towers["dMRI"].requires_grad_(False)
    zero = Zero3([[p for p in model.parameters() if p.requires_grad]], ADAMW)
    engine, wrapper = ZeroEngine(model, 3, zero), model.wrapper()
    handle = hold_inactive(wrapper, engine)
    wrapper.total(model.loss(["T1"]), ["T1"]).backward()
    engine.step()
    assert handle.held == ("towers.rsfMRI.weight", "towers.rsfMRI.bias")


def test_several_wrappers_hold_parameters_of_one_engine() -> None:
    training = Training()
    other = training.model.wrapper(names=["dMRI"])
    second = hold_inactive(other, training.engine)
    loss = training.wrapper.total(training.model.loss(["T1"]), ["T1"])
    other.total(loss, ["dMRI"]).backward()
    training.engine.step()
    assert (towers(training.handle), towers(second)) == ({"rsfMRI"}, set())


def test_a_hold_knows_its_wrapper_and_engine() -> None:
    training = Training()
    assert is_held(training.wrapper, training.engine)
    assert not is_held(training.model.wrapper(), training.engine)
    assert not is_held(training.wrapper, training.engine.optimizer.optimizer)
    assert repr(training.handle) == "<HoldHandle of ZeroEngine, in effect>"
    training.handle.remove()
    assert not is_held(training.wrapper, training.engine)


def test_a_copy_of_the_handle_holds_nothing() -> None:
    training = Training()
    training.step("T1")
    copied = copy.deepcopy(training.handle)
    assert copied.held == training.handle.held
    copied.remove()
    assert is_held(training.wrapper, training.engine)


def test_without_the_engine_nothing_is_held() -> None:
    """The hold does not keep it alive."""
    training = Training()
    inner = training.engine.optimizer.optimizer
    training.engine = None  # type: ignore[assignment]
    gc.collect()
    training.wrapper.total(training.model.loss(["T1"]), ["T1"]).backward()
    inner.step()
    hold: Any = training.handle._hold
    assert list(hold._holder.parameters()) == []


class ChangesAll(SGD):
    """Changes parameters that have no gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


def test_an_optimizer_that_changes_parameters_without_a_gradient_is_found() -> None:
    training = Training(make=partial(ChangesAll, lr=0.1), has_groups=True)
    message = "ChangesAll has changed parameters whose gradient is None"
    with pytest.raises(UnsupportedEngineError, match=message):
        training.step("T1")
    assert training.engine.optimizer.groups[1].flat.grad is not None


def test_gradients_come_back_after_a_step_that_raised() -> None:
    training = Training(has_groups=True)
    inner = training.engine.optimizer.optimizer

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    failing = inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.micro("dMRI")  # holds the first group
    failing.remove()
    assert training.engine.optimizer.groups[0].flat.grad is None
    training.handle.remove()
    assert training.engine.optimizer.groups[0].flat.grad is not None


class WithoutHooks:
    """An optimizer that is none of torch."""

    def __init__(self, groups: Any) -> None:
        self.param_groups = groups


class Infinity(Zero3):
    swap_optimizer = True


def refused(case: str) -> tuple[DummyLossWrapper, Any]:
    model = Towers()
    groups = [list(model.parameters())]
    if case == "stage 0":
        return model.wrapper(), ZeroEngine(model, 0, ADAMW(groups[0]))
    if case == "unknown optimizer":
        return model.wrapper(), ZeroEngine(model, 1, nn.Module())
    if case == "NVMe":
        return model.wrapper(), ZeroEngine(model, 3, Infinity(groups, ADAMW))
    if case == "no hooks":
        make: Any = WithoutHooks
        return model.wrapper(), ZeroEngine(model, 3, Zero3(groups, make))
    return Towers().wrapper(), ZeroEngine(model, 3, Zero3(groups, ADAMW))


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("stage 0", UnsupportedEngineError, "ZeRO stage 0.*Pass `engine.optimizer`"),
        ("unknown optimizer", UnsupportedEngineError, "does not know where Module keeps"),
        ("NVMe", UnsupportedEngineError, "on NVMe.*Offload it to the CPU"),
        ("no hooks", UnsupportedEngineError, "WithoutHooks has no step hooks"),
        ("other model", ValueError, "no parameter of the modalities 'T1', 'rsfMRI', 'dMRI'"),
    ],
)
def test_what_cannot_be_held_is_refused(case: str, kind: type[Exception], message: str) -> None:
    wrapper, engine = refused(case)
    with pytest.raises(kind, match=message):
        hold_inactive(wrapper, engine)


@of_places
def test_for_the_optimizers_of_an_engine_the_remedy_is_the_engine(place: tuple[int, int]) -> None:
    training = Training(place)
    for optimizer in (training.engine.optimizer, training.engine.optimizer.optimizer):
        with pytest.raises((TypeError, ValueError), match="Under DeepSpeed's ZeRO pass the engine"):
            hold_inactive(training.wrapper, optimizer)
