"""Hold at the step: closures, schedules, groups, errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import (
    DummyLossWrapper,
    ParameterMapError,
    UnsupportedEngineError,
    hold_inactive,
)
from tests.holding import (
    NAMES,
    Towers,
    Training,
    assert_same_training,
    assert_untouched,
    snapshot,
    towers,
    train,
)
from tests.test_host_sync import CountSyncs

Closure = Callable[[], Any]
Step = Callable[[Optimizer, Closure], Any]
STEPS: dict[str, Step] = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("clear", ["inside", "outside"])
def test_a_closure_is_held_after_its_backward_pass(step: Step, clear: str) -> None:
    """The step hook runs before it, when the gradients of the last step may still be there."""
    plain, ours = Towers(), Training()
    optimizer = AdamW(plain.parameters(), lr=0.1)
    for active in (["T1"], ["dMRI"], NAMES, ["T1", "rsfMRI"]):

        def evaluate(owner: Optimizer, total: Closure) -> Closure:
            def closure() -> Any:
                if clear == "inside":
                    owner.zero_grad()
                loss = total()
                loss.backward()
                return loss

            return closure

        expected = step(optimizer, evaluate(optimizer, partial(plain.loss, active)))
        found = step(ours.optimizer, evaluate(ours.optimizer, partial(ours.total, *active)))
        assert torch.allclose(found, expected)
        assert towers(ours.handle) == set(NAMES) - set(active)
        if clear == "outside":
            optimizer.zero_grad()
            ours.optimizer.zero_grad()
    assert_same_training(ours.model, ours.optimizer, plain, optimizer)


def test_micro_batches_before_a_closure_count() -> None:
    """As Lightning does it: all but the last are backwarded before the step."""
    training = Training()
    training.total("T1").backward()
    early = training.model.towers["dMRI"].weight.grad.clone()

    def closure() -> Tensor:
        total = training.total("rsfMRI")
        total.backward()
        return total

    training.optimizer.step(closure)
    assert towers(training.handle) == {"dMRI"}
    assert torch.equal(training.model.towers["dMRI"].weight.grad, 2 * early)


def test_a_hold_that_begins_within_a_step_begins_with_the_next() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    wrapper = model.wrapper()
    handles = []

    def closure() -> None:
        handles.append(hold_inactive(wrapper, optimizer))
        wrapper.total(model.loss(["T1"]), "T1").backward()

    optimizer.step(closure)
    assert towers(handles[0]) == set()
    optimizer.zero_grad()
    train(model, optimizer, wrapper, [["dMRI"]])
    assert towers(handles[0]) == {"T1", "rsfMRI"}


def test_an_error_at_the_step_does_not_let_the_next_one_go() -> None:
    training = Training()
    training.total("T1").backward()
    tower = training.model.towers["dMRI"]
    before = snapshot(tower.parameters(), training.optimizer)
    del training.model.towers["dMRI"]
    with pytest.raises(ParameterMapError, match="matches no parameter"):
        training.optimizer.step()
    training.model.towers["dMRI"] = tower
    assert training.step() == {"rsfMRI", "dMRI"}
    assert_untouched(dict(tower.named_parameters()), training.optimizer, before)


def test_a_closure_that_raised_leaves_all_gradients() -> None:
    training = Training()

    def closure() -> None:
        training.total("T1").backward()
        raise MemoryError

    with pytest.raises(MemoryError):
        training.optimizer.step(closure)
    assert all(p.grad is not None for p in training.model.parameters())
    training.optimizer.zero_grad()
    training.total("dMRI").backward()
    assert training.step() == {"T1", "rsfMRI"}


@pytest.mark.parametrize("first", ["hold", "schedule"])
def test_schedules_go_on(first: str) -> None:
    """A schedule wraps `step`, and warns if it finds it tampered with; warnings are errors here."""
    model = Towers()
    optimizer = SGD(model.parameters(), lr=1.0)
    wrapper = model.wrapper()
    if first == "hold":
        hold_inactive(wrapper, optimizer)
    schedule = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    if first == "schedule":
        hold_inactive(wrapper, optimizer)
    before = snapshot(model.towers["dMRI"].parameters(), optimizer)
    for _ in range(3):
        train(model, optimizer, wrapper, [["T1"]])
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert_untouched(dict(model.towers["dMRI"].named_parameters()), optimizer, before)


def test_parameter_groups_and_those_that_come_later() -> None:
    model = Towers()
    optimizer = Adam([{"params": model.towers["T1"].parameters()}, {"params": model.trunk.weight}])
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    train(model, optimizer, wrapper, [["T1"]])
    assert towers(handle) == set()
    optimizer.add_param_group({"params": model.towers["dMRI"].parameters(), "lr": 0.1})
    train(model, optimizer, wrapper, [["T1"]])
    assert towers(handle) == {"dMRI"}
    assert not optimizer.state[model.towers["dMRI"].weight]


def test_an_optimizer_in_the_backward_pass() -> None:
    """It steps as soon as its one parameter has a gradient, and then takes it away."""
    model = Towers()
    wrapper = model.wrapper()
    weight = model.towers["dMRI"].weight
    optimizer = AdamW([weight], lr=0.1)
    hold_inactive(wrapper, optimizer)

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    weight.register_post_accumulate_grad_hook(step)
    before = snapshot([weight], optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    assert_untouched({"weight": weight}, optimizer, before)
    wrapper.total(model.loss(["dMRI"]), "dMRI").backward()
    assert not torch.equal(weight, before[0][0])


def test_a_sparse_table_is_held() -> None:
    model = nn.ModuleDict(
        {"T1": nn.Embedding(4, 2, sparse=True), "dMRI": nn.Embedding(4, 2, sparse=True)}
    )
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SparseAdam(list(model.parameters()), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model["T1"](torch.tensor([1])).square().mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.weight",)
    assert optimizer.state.keys() == {model["T1"].weight}


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_a_hold_waits_for_no_device(scale: float | None) -> None:
    """But at steps that hold a modality for the 1st, 2nd, 4th, 8th... time, to check gradients."""
    model = Towers()
    wrapper = model.wrapper(scale)
    optimizer = SGD(model.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    waited = []
    for step in range(1, 10):
        with CountSyncs() as counter:
            train(model, optimizer, wrapper, [["rsfMRI", "dMRI"], NAMES])
        waited += [step] if counter.seen else []
    assert waited == ([] if scale is None else [1, 2, 4, 8])


def test_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would run without asking what to hold."""
    training = Training()
    total = training.total("T1")
    total.backward()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for refused in (training.step, lambda: training.total("T1")):
        with pytest.raises(UnsupportedEngineError, match="CUDA graph"):
            refused()
