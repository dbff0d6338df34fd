"""When a modality counts as trained: from backward pass to backward pass, until the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper, hold_inactive
from tests.holding import NAMES, Towers, Training, towers
from tests.zoo import holder


def test_what_any_micro_batch_contains_is_trained() -> None:
    training = Training()
    training.total("T1").backward()
    training.total("rsfMRI").backward()
    assert training.step() == {"dMRI"}
    training.total("dMRI").backward()
    assert training.step() == {"T1", "rsfMRI"}


def test_micro_batches_may_share_a_backward_pass() -> None:
    training = Training()
    (training.total("T1") + training.total("rsfMRI")).backward()
    assert training.step() == {"dMRI"}


def test_a_shared_backward_pass_forgets_nothing_whatever_the_gradients() -> None:
    """Neither loss finds a gradient yet; these real ones are as uniform as a dummy."""
    model: Any = holder(T1=torch.ones(2), dMRI=torch.ones(2))
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    first = wrapper.total(model.T1.sum(), "T1")
    (first + wrapper.total(model.dMRI.sum(), "dMRI")).backward()
    optimizer.step()
    assert handle.held == ()


def test_a_loss_without_a_backward_pass_trains_nothing() -> None:
    """Such as that of an evaluation with gradient mode on."""
    training = Training()
    training.total(*NAMES)
    training.total("T1").backward()
    training.total(*NAMES)
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_loss_trains_in_its_backward_pass_not_when_it_is_made() -> None:
    training = Training()
    early = training.wrapper.dummy("dMRI")
    training.total("T1").backward()
    assert training.step() == {"rsfMRI", "dMRI"}
    early.backward()
    assert training.step() == {"T1", "rsfMRI"}


def test_without_a_loss_of_the_wrapper_nothing_is_held() -> None:
    """Another loss may have trained anything, so the optimizer gets all gradients."""
    training = Training()
    before = training.model.towers["dMRI"].weight.detach().clone()
    training.model.loss(NAMES).backward()
    assert training.step() == set()
    assert not torch.equal(before, training.model.towers["dMRI"].weight)


@pytest.mark.parametrize("clear_before_forward", [True, False])
def test_gradients_cleared_without_a_step_are_forgotten(clear_before_forward: bool) -> None:
    """As by `optimizer.zero_grad(); continue` after a loss that was not finite."""
    training = Training()
    training.total("T1", "dMRI").backward()
    if clear_before_forward:
        training.optimizer.zero_grad()
    total = training.total("rsfMRI")
    training.optimizer.zero_grad()
    total.backward()
    assert training.step() == {"T1", "dMRI"}


def test_only_gradients_of_the_optimizer_count() -> None:
    """Another optimizer has the biases, and has not cleared their gradients."""
    training = Training()
    weights = [p for p in training.model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    handle = hold_inactive(training.wrapper, optimizer)
    training.total("T1").backward()
    optimizer.zero_grad()
    training.total("dMRI").backward()
    optimizer.step()
    assert {name.split(".")[1] for name in handle.held} == {"T1", "rsfMRI"}


def test_where_some_parameters_are_sharded_gradients_may_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that None does not mean that they were cleared."""
    training = Training()
    weight = training.model.towers["rsfMRI"].weight
    monkeypatch.setattr("modaldummy._hold.holder.is_sharded", lambda tensor: tensor is weight)
    training.total("T1").backward()
    training.optimizer.zero_grad()
    training.total("dMRI").backward()
    assert training.step() == {"rsfMRI"}


def test_gradients_cleared_before_two_losses_share_a_backward_pass() -> None:
    """The second of them finds no gradient yet either, and must not forget the first."""
    training = Training()
    training.total("T1").backward()
    training.optimizer.zero_grad()
    (training.total("rsfMRI") + training.total("dMRI")).backward()
    assert training.step() == {"T1"}


def test_gradients_kept_after_a_step_that_did_not_come_still_count() -> None:
    training = Training()
    training.total("T1").backward()
    training.total("rsfMRI").backward()
    training.total("rsfMRI").backward()
    assert training.step() == {"dMRI"}


def test_a_wrapped_loss_and_a_dummy_alone_are_seen_too() -> None:
    training = Training()
    wrapped = training.wrapper(training.model.loss)
    wrapped(["T1"], modalities=["T1"]).backward()
    assert training.step() == {"rsfMRI", "dMRI"}
    (training.model.loss(["T1"]) + training.wrapper.dummy(["T1"])).backward()
    assert training.step() == {"rsfMRI", "dMRI"}
    # With everything active the dummy is a plain zero, which no backward pass reaches.
    (training.model.loss(NAMES) + training.wrapper.dummy(NAMES)).backward()
    (training.model.loss(["T1"]) + training.wrapper.dummy(["T1"])).backward()
    assert training.step() == set()


@pytest.mark.parametrize(
    "use",
    [
        lambda total: total.mul_(0.5).backward(),
        lambda total: torch.autograd.backward([total * 2]),
        lambda total: total.backward(retain_graph=True) or total.backward(),
        lambda total: torch.autograd.backward(total, torch.full((), 3.0), create_graph=True),
    ],
    ids=["in place", "part of more", "twice", "create_graph"],
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("active", [("T1",), NAMES])
def test_a_total_is_seen_however_backward_is_called(
    active: tuple[str, ...], use: Callable[[Tensor], object]
) -> None:
    training = Training()
    use(training.total(*active))
    assert training.step() == set(NAMES) - set(active)


def test_watching_changes_no_bit_of_loss_and_gradients() -> None:
    for active in (NAMES, ("T1",)):
        plain, watched = Towers(), Training()
        expected = plain.wrapper().total(plain.loss(active), active)
        found = watched.total(*active)
        assert torch.equal(expected, found)
        expected.backward()
        found.backward()
        for one, other in zip(plain.parameters(), watched.model.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)


def put_aside(training: Training, *active: str) -> list[Tensor]:
    """Gradients of a backward pass, which leaves none behind."""
    training.total(*active).backward()
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    training.optimizer.zero_grad()
    return gradients


def test_gradients_that_were_put_aside_and_came_back_count() -> None:
    """As where each micro-batch is clipped, or projected, by itself."""
    training = Training()
    sums = zip(put_aside(training, "T1"), put_aside(training, "dMRI"), strict=True)
    for parameter, (first, second) in zip(training.model.parameters(), sums, strict=True):
        parameter.grad = first + second
    assert training.step() == {"rsfMRI"}
    training.total("T1").backward()
    assert training.step() == {"rsfMRI", "dMRI"}


def test_of_gradients_that_came_back_a_frozen_parameter_has_none() -> None:
    training = Training()
    training.model.towers["dMRI"].bias.requires_grad_(False)
    put_aside(training, "dMRI")
    training.total("T1").backward()
    training.model.towers["dMRI"].weight.grad = torch.rand(4, 3)
    assert training.step() == {"rsfMRI"}


@pytest.mark.parametrize(("size", "held"), [(1, ()), (2, ("dMRI",))])
def test_of_single_elements_that_came_back_nobody_can_tell(size: int, held: tuple[str]) -> None:
    """One number is a dummy's as well as any other; so they get their step. Of two one can tell."""
    model: Any = holder(T1=torch.ones(size), dMRI=torch.ones(size))
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model.T1.sum() + model.dMRI.sum(), ["T1", "dMRI"]).backward()
    optimizer.zero_grad()
    wrapper.total(model.T1.sum(), "T1").backward()
    optimizer.step()
    assert handle.held == held


def test_a_loss_without_a_graph_survives_gradients_that_are_not_there_yet() -> None:
    """Several parts of one loss, the first of which holds everything."""
    training = Training()
    for _ in range(2):
        parts = [
            training.model.loss(active) + training.wrapper.dummy(active)
            for active in (NAMES, ("T1",))
        ]
        training.optimizer.zero_grad()
        torch.stack(parts).sum().backward()
        assert training.step() == set()


def test_a_loss_that_is_made_during_the_backward_pass() -> None:
    """Reentrant checkpointing computes it again there, when gradients may not be there yet."""
    model = Towers()
    wrapper = model.wrapper(None)
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    entrance = torch.ones((), requires_grad=True)
    again = checkpoint(
        lambda one: wrapper.total(model.loss(["dMRI"]) * one, "dMRI"), entrance, use_reentrant=True
    )
    (wrapper.total(model.loss(["T1"]), "T1") + again).backward()
    optimizer.step()
    assert towers(handle) == {"rsfMRI"}


def test_a_handle_made_between_backward_and_step() -> None:
    """The gradients that it finds may be anyone's."""
    training = Training()
    training.handle.remove()
    training.total("dMRI").backward()
    training.handle = hold_inactive(training.wrapper, training.optimizer)
    training.total("T1").backward()
    assert training.step() == set()
    training.total("T1").backward()
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_handle_removed_between_backward_and_step() -> None:
    """What it saw trained still counts as trained for the other one, at this step."""
    training = Training()
    other = training.model.wrapper()
    with hold_inactive(other, training.optimizer) as handle:
        training.total("T1").backward()
        other.total(training.model.loss(["dMRI"]), "dMRI").backward()
    assert training.step() == {"rsfMRI"}
    assert handle.held == ()
    training.total("T1").backward()
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_tower_frozen_between_backward_and_step_is_held() -> None:
    """Optimizers look at the gradient alone."""
    training = Training()
    training.total("T1").backward()
    training.model.towers["dMRI"].requires_grad_(False)
    before = training.model.towers["dMRI"].weight.clone()
    assert training.step() == {"rsfMRI", "dMRI"}
    assert torch.equal(before, training.model.towers["dMRI"].weight)


def test_several_wrappers_hold_what_none_of_them_has_trained() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    first, second = model.wrapper(), model.wrapper(names=("T1", "dMRI"))
    handles = [hold_inactive(wrapper, optimizer) for wrapper in (first, second)]
    first.total(model.loss(["T1"]), "T1").backward()
    second.total(model.loss(["dMRI"]), "dMRI").backward()
    optimizer.step()
    optimizer.zero_grad()
    assert [towers(handle) for handle in handles] == [{"rsfMRI"}, set()]
    first.total(model.loss(["T1"]), "T1").backward()
    second.total(model.loss(["T1", "dMRI"]), ["T1", "dMRI"]).backward()  # all that it knows
    optimizer.step()
    optimizer.zero_grad()
    assert [towers(handle) for handle in handles] == [{"rsfMRI"}, set()]
    first.total(model.loss(["T1"]), "T1").backward()
    optimizer.step()
    assert [towers(handle) for handle in handles] == [{"rsfMRI", "dMRI"}, set()]


def test_several_optimizers_have_a_window_each() -> None:
    model = Towers()
    wrapper = model.wrapper()
    optimizers = [AdamW(model.towers[name].parameters(), lr=0.1) for name in ("T1", "dMRI")]
    handles = [hold_inactive(wrapper, optimizer) for optimizer in optimizers]
    wrapper.total(model.loss(["T1"]), "T1").backward()
    optimizers[0].step()  # the other one goes on accumulating
    optimizers[0].zero_grad()
    wrapper.total(model.loss(["dMRI"]), "dMRI").backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [towers(handle) for handle in handles] == [{"T1"}, set()]
