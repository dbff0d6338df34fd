"""What one step of a held optimizer does: hides gradients, runs closures, agrees with ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import DummyLossWrapper, ParameterMapError, UnsupportedEngineError, hold_inactive
from modaldummy._hold import wrapper_hold
from tests.holding import NAMES, Towers, Training, assert_same_training, towers, train
from tests.test_host_sync import CountSyncs

Closure = Callable[[], Any]


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("clear", ["inside", "outside"])
def test_a_closure_is_held_after_its_backward_pass(by: str, clear: str) -> None:
    """The step hook runs before it, when the gradients of the last step may still exist."""
    plain, ours = Towers(), Training()
    optimizer = AdamW(plain.parameters(), lr=0.1)

    def step(owner: Any, total: Closure) -> Any:
        def closure() -> Any:
            if clear == "inside":
                owner.zero_grad()
            loss = total()
            loss.backward()
            return loss

        loss = owner.step(closure) if by == "position" else owner.step(closure=closure)
        if clear == "outside":
            owner.zero_grad()
        return loss

    for active in (["T1"], ["dMRI"], NAMES, ["T1", "rsfMRI"]):
        expected = step(optimizer, partial(plain.loss, active))
        assert torch.allclose(step(ours.optimizer, partial(ours.total, *active)), expected)
        assert towers(ours.handle) == set(NAMES) - set(active)
    assert_same_training(ours.model, ours.optimizer, plain, optimizer)


def test_micro_batches_before_a_closure_count() -> None:
    """Lightning runs all but the last of them before the step."""
    training = Training()
    training.backward("T1")
    early = training.model.towers["dMRI"].weight.grad.clone()
    training.optimizer.step(partial(training.backward, "rsfMRI"))
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


def test_after_an_error_of_the_hold_the_next_step_holds() -> None:
    training = Training()
    training.backward("T1")
    tower = training.model.towers["dMRI"]
    with training.holding("dMRI"):
        del training.model.towers["dMRI"]
        with pytest.raises(ParameterMapError, match="matches no parameter"):
            training.optimizer.step()
        training.model.towers["dMRI"] = tower
        assert training.step() == {"rsfMRI", "dMRI"}


def test_a_closure_that_raised_leaves_all_gradients() -> None:
    training = Training()

    def closure() -> None:
        training.backward("T1")
        raise MemoryError

    with pytest.raises(MemoryError):
        training.optimizer.step(closure)
    assert all(p.grad is not None for p in training.model.parameters())
    training.optimizer.zero_grad()
    training.backward("dMRI")
    assert training.step() == {"T1", "rsfMRI"}


@pytest.mark.parametrize("first", ["hold", "schedule"])
def test_schedules_continue(first: str) -> None:
    """A schedule wraps `step`, and warns if something else has changed it. Warnings are errors."""
    model = Towers()
    optimizer = SGD(model.parameters(), lr=1.0)
    wrapper = model.wrapper()
    schedule = None if first == "hold" else LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    handle = hold_inactive(wrapper, optimizer)
    schedule = schedule or LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for _ in range(3):
        train(model, optimizer, wrapper, [["T1"]])
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert towers(handle) == {"rsfMRI", "dMRI"}


def test_parameter_groups_that_are_added_later_are_held() -> None:
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


def test_an_optimizer_that_steps_in_the_backward_pass() -> None:
    """It steps as soon as its only parameter has a gradient, and then clears that gradient."""
    model = Towers()
    wrapper = model.wrapper()
    weight = model.towers["dMRI"].weight
    optimizer = AdamW([weight], lr=0.1)
    hold_inactive(wrapper, optimizer)

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    weight.register_post_accumulate_grad_hook(step)
    before = weight.detach().clone()
    wrapper.total(model.loss(["T1"]), "T1").backward()
    assert torch.equal(weight, before)
    assert not optimizer.state
    wrapper.total(model.loss(["dMRI"]), "dMRI").backward()
    assert not torch.equal(weight, before)


def test_a_sparse_table_is_held() -> None:
    model = nn.ModuleDict({name: nn.Embedding(4, 2, sparse=True) for name in ("T1", "dMRI")})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SparseAdam(list(model.parameters()), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model["T1"](torch.tensor([1])).square().mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.weight",)
    assert optimizer.state.keys() == {model["T1"].weight}


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_a_hold_synchronizes_with_the_device_only_to_check_gradients(scale: float | None) -> None:
    """In steps that hold a modality for the 1st, 2nd, 4th, 8th... time."""
    training = Training(partial(SGD, lr=0.1), scale)
    waited = []
    for step in range(1, 10):
        with CountSyncs() as counter:
            training.train([["rsfMRI", "dMRI"], NAMES])
        waited += [step] if counter.seen else []
    assert waited == ([] if scale is None else [1, 2, 4, 8])


def test_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would hold the same parameters forever."""
    training = Training()
    training.backward("T1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for refused in (training.step, lambda: training.total("T1")):
        with pytest.raises(UnsupportedEngineError, match="CUDA graph"):
            refused()


def test_an_optimizer_that_lost_all_parameters_of_the_map_is_refused() -> None:
    """As where an engine puts flat copies in their place. If all are active, nothing is held."""
    training = Training()
    training.optimizer.param_groups[0]["params"] = list(training.model.trunk.parameters())
    training.train([NAMES])
    with pytest.raises(UnsupportedEngineError, match="no parameter of the modalities any more"):
        training.train([["T1"]])


# --- several ranks, played by one process -------------------------------------------------------


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("active", "other_rank", "held"),
    [
        (["T1"], [1, 2, 1], {"rsfMRI"}),
        (["T1"], [0, 0, 0], {"rsfMRI", "dMRI"}),
        (None, [1, 1, 2], {"T1", "dMRI"}),
        (None, [0, 0, 0], set()),
    ],
    ids=["both train", "this rank trains", "the other rank trains", "no rank trains"],
)
def test_a_key_is_trained_if_any_rank_has_trained_it(
    active: list[str] | None,
    other_rank: list[int],
    held: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest number counts: 0 without a backward pass, 1 for untrained, 2 for trained.

    The keys are in alphabetical order.
    """
    operators = []

    def all_reduce(tensor: Tensor, op: object, group: object) -> None:
        operators.append(op)
        tensor.copy_(torch.maximum(tensor, torch.tensor(other_rank)))

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(wrapper_hold, "check_same_map", lambda *_: None)
    training = Training()
    if active:
        training.backward(*active)
    assert training.step() == held
    assert operators == [dist.ReduceOp.MAX]


def test_several_wrappers_hold_parameters_of_one_optimizer() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    wrappers = [model.wrapper(names=[name]) for name in NAMES]
    handles = [hold_inactive(wrapper, optimizer) for wrapper in wrappers]
    before = [tower.weight.clone() for tower in model.towers.values()]
    loss = model.loss(["T1"])
    for wrapper in wrappers:
        loss = wrapper.total(loss, [] if wrapper.modalities != ("T1",) else ["T1"])
    loss.backward()
    optimizer.step()
    assert [towers(handle) for handle in handles] == [set(), {"rsfMRI"}, {"dMRI"}]
    after = [tower.weight for tower in model.towers.values()]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, True, True]


# --- unusual optimizers -------------------------------------------------------------------------


class Scaling(SGD):
    """Has a second argument, and calls its closure with one."""

    @torch.no_grad()
    def step(self, closure: Any = None, factor: float = 1.0) -> Any:
        with torch.enable_grad():
            return closure(factor=factor)


def test_arguments_of_step_and_closure_arrive() -> None:
    training = Training(Scaling)

    def closure(factor: float) -> float:
        training.backward("T1")
        return factor

    assert training.optimizer.step(closure, 2.0) == 2
    assert towers(training.handle) == {"rsfMRI", "dMRI"}


class Perturbing(Optimizer):
    """Like sharpness-aware optimizers: a move, a second gradient, the way back and the step."""

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


def test_an_optimizer_may_move_before_its_closure_and_clear_gradients_after_it() -> None:
    """Gradients that it clears stay cleared."""
    plain, ours = Towers(), Training(Perturbing)
    optimizer = Perturbing(plain.parameters())
    for active in (["T1"], ["dMRI"], ["T1", "rsfMRI"]):
        plain.loss(active).backward()
        optimizer.step(lambda active=active: plain.loss(active).backward())
        ours.backward(*active)
        ours.optimizer.step(partial(ours.backward, *active))
        assert all(p.grad is None for p in ours.model.parameters())
    assert_same_training(ours.model, ours.optimizer, plain, optimizer)


class Decaying(AdamW):
    """Calls the step of its parent, which has hooks too, and then uses the gradients itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.mul_(0.9)


def test_a_step_within_a_step_holds_until_the_outer_one_ends() -> None:
    AdamW(Towers().parameters())  # an instance, so that the step of the class has hooks
    training = Training(Decaying)
    with training.holding("dMRI"):
        training.train([["T1"], ["rsfMRI"]])
    assert towers(training.handle) == {"T1", "dMRI"}


class Careless(SGD):
    """Decays everything, with or without a gradient. Before it has a factor, it cannot be tried."""

    factor: float

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.mul_(self.factor)


def test_an_optimizer_that_changes_held_parameters_is_refused() -> None:
    training = Training(Careless)
    training.optimizer.factor = 0.9
    training.backward("T1")
    words = r"Careless, or.* changed held parameters.*: 'towers.rsfMRI.*, and 1 more"
    with pytest.raises(UnsupportedEngineError, match=words):
        training.optimizer.step()
    assert training.model.towers["dMRI"].weight.grad is not None


class Storing(SGD):
    """Computes its loss in `step`, by a function that it got before."""

    loss: Closure

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            self.loss()


@pytest.mark.parametrize("accumulated", [False, True])
def test_an_optimizer_that_computes_losses_by_itself_is_refused(accumulated: bool) -> None:
    training = Training(Storing)
    training.optimizer.loss = partial(training.backward, "T1")
    if accumulated:
        training.backward("T1")
    with pytest.raises(UnsupportedEngineError, match=r"Storing computes losses.*base_optimi"):
        training.optimizer.step()


class Failing(AdamW):
    """Runs out of memory in its first step."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise MemoryError
        super().step(closure)


@pytest.mark.parametrize("again", [True, False], ids=["tried again", "given up"])
def test_after_a_step_that_raised_the_next_one_holds(again: bool) -> None:
    training = Training(Failing)
    training.backward("T1")
    with pytest.raises(MemoryError):
        training.optimizer.step()
    with training.holding("dMRI"):
        if again:
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.train([["rsfMRI"]])
    assert towers(training.handle) == {"T1", "dMRI"}
    training.backward("T1")
    training.optimizer.step()
    assert training.model.towers["dMRI"].weight.grad is not None


def test_a_gradient_that_a_hook_of_the_step_sets_stays() -> None:
    training = Training()
    weight = training.model.towers["dMRI"].weight
    gradient = torch.zeros_like(weight)
    hook = training.optimizer.register_step_post_hook(lambda *_: setattr(weight, "grad", gradient))
    training.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
    training.backward("T1")
    training.optimizer.step()
    assert weight.grad is gradient


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("raising", [Failing, AdamW], ids=["step", "hook"])
@pytest.mark.parametrize("by", ["loss", "step", "remove"])
@pytest.mark.parametrize("cleared", [False, True])
def test_a_step_that_raised_loses_no_gradient(raising: Any, by: str, cleared: bool) -> None:
    """The next loss, the next step or the end of the hold puts them back, unless cleared.

    It is the step if the loss is compiled.
    """
    training = Training(raising)
    weight = training.model.towers["dMRI"].weight
    training.backward("T1")
    gradient = weight.grad
    hook = training.optimizer.register_step_post_hook(interrupt)
    training.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
    with pytest.raises((MemoryError, KeyboardInterrupt)):
        training.optimizer.step()
    hook.remove()
    if cleared:
        training.optimizer.zero_grad()
    if by == "loss":
        training.total("dMRI")
    elif by == "step":
        with patch("torch.compiler.is_compiling", lambda: True):
            training.total("dMRI")
        assert weight.grad is None
        training.optimizer.step()
    else:
        training.handle.remove()
    assert weight.grad is (None if cleared else gradient)
    if by == "loss":
        training.backward("dMRI")
        assert training.step() == ({"T1", "rsfMRI"} if cleared else {"rsfMRI"})
