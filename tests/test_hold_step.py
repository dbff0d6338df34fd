"""Hold at the step: closures, optimizers of all manners, errors, copies, compiled code."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
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
    assert_same_training,
    assert_untouched,
    snapshot,
    train,
)
from tests.test_hold_window import Training, towers
from tests.test_host_sync import CountSyncs

# What torch's own compiler warns of while it traces.
_WORDS = (
    "should not be instantiated|torch.jit.script_method|attribute of a Tensor that is not a leaf"
)
ignore_compiler = pytest.mark.filterwarnings(f"ignore:.*({_WORDS})")
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
    with pytest.raises(UnsupportedEngineError, match=r"Careless, or.* changed 'towers.rsfMRI"):
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
    model = Towers()
    wrapper = model.wrapper(scale)
    optimizer = SGD(model.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    with CountSyncs() as counter:
        train(model, optimizer, wrapper, [["T1"], NAMES, ["dMRI"]])
    assert counter.seen == []


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


@ignore_compiler
@pytest.mark.parametrize("what", ["total", "optimizer.step"])
def test_compiled_code_holds_too(what: str) -> None:
    torch.compiler.reset()
    training, plain = Training(), Towers()
    model, optimizer = training.model, training.optimizer
    step: Callable[[], Any] = optimizer.step
    total: Callable[..., Tensor] = training.total
    if what == "total":
        total = torch.compile(total, backend="aot_eager", fullgraph=True)
    else:
        step = torch.compile(step, backend="aot_eager")
    other = AdamW(plain.parameters(), lr=0.1)
    for active in (["T1"], ["dMRI"], ["dMRI"], NAMES, ["T1"]):
        plain.loss(active).backward()
        other.step()
        other.zero_grad()
        total(*active).backward()
        step()
        optimizer.zero_grad()
        assert towers(training.handle) == set(NAMES) - set(active)
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin)


@ignore_compiler
def test_accumulation_needs_no_graphs_of_its_own() -> None:
    """One for each active set, whatever earlier micro-batches held."""
    torch.compiler.reset()
    training = Training()
    counter = CompileCounterWithBackend("eager")
    total = torch.compile(training.wrapper.total, backend=counter, fullgraph=True)
    windows = [["T1"], ["dMRI", "T1"], ["T1", "dMRI", "rsfMRI"], ["rsfMRI", "T1"], ["dMRI"]]
    for window in windows:
        for name in window:
            total(training.model.loss([name]), name).backward()
        assert training.step() == set(NAMES) - set(window)
    assert counter.frame_count == len(NAMES)


@ignore_compiler
def test_compiled_and_eager_losses_share_a_backward_pass() -> None:
    torch.compiler.reset()
    training = Training()
    compiled = torch.compile(training.wrapper.total, backend="aot_eager")
    for _ in range(2):
        first = compiled(training.model.loss(["T1"]), "T1")
        (first + training.total("dMRI")).backward()
        assert training.step() == {"rsfMRI"}


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
