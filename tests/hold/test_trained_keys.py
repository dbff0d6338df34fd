"""Which keys count as trained: from backward pass to backward pass, until the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper, hold_inactive
from tests.asserts import assert_same_bits
from tests.holding import NAMES, Towers, Training, towers
from tests.zoo import holder


def test_keys_of_any_micro_batch_are_trained() -> None:
    training = Training()
    for name in ("T1", "rsfMRI", "rsfMRI"):
        training.backward(name)
    assert training.step() == {"dMRI"}
    (training.total("T1") + training.total("dMRI")).backward()
    assert training.step() == {"rsfMRI"}


def test_two_losses_in_a_backward_pass_are_both_trained() -> None:
    """Neither finds a gradient yet, and the real gradients are as uniform as dummy gradients."""
    model: Any = holder(T1=torch.ones(2), dMRI=torch.ones(2))
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    first = wrapper.total(model.T1.sum(), "T1")
    (first + wrapper.total(model.dMRI.sum(), "dMRI")).backward()
    optimizer.step()
    assert handle.held == ()


def test_a_loss_without_a_backward_pass_trains_nothing() -> None:
    """Such as the loss of an evaluation with gradient mode on."""
    training = Training()
    training.total(*NAMES)
    training.backward("T1")
    training.total(*NAMES)
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_loss_trains_in_its_backward_pass_not_when_it_is_computed() -> None:
    training = Training()
    early = training.wrapper.dummy("dMRI")
    training.backward("T1")
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
    training.backward("T1", "dMRI")
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
    training.backward("T1")
    optimizer.zero_grad()
    training.backward("dMRI")
    optimizer.step()
    assert {name.split(".")[1] for name in handle.held} == {"T1", "rsfMRI"}


def test_sharded_parameters_may_have_their_gradients_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None does then not mean that they were cleared."""
    training = Training()
    weight = training.model.towers["rsfMRI"].weight
    monkeypatch.setattr("modaldummy._hold.holder.is_sharded", lambda tensor: tensor is weight)
    training.backward("T1")
    training.optimizer.zero_grad()
    training.backward("dMRI")
    assert training.step() == {"rsfMRI"}


def test_gradients_cleared_before_two_losses_share_a_backward_pass() -> None:
    """The second of them finds no gradient yet either, and must not forget the first."""
    training = Training()
    training.backward("T1")
    training.optimizer.zero_grad()
    (training.total("rsfMRI") + training.total("dMRI")).backward()
    assert training.step() == {"T1"}


def test_a_wrapped_loss_and_a_dummy_alone_are_observed_too() -> None:
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
def test_a_total_is_observed_however_backward_is_called(
    active: tuple[str, ...], use: Callable[[Tensor], object]
) -> None:
    training = Training()
    use(training.total(*active))
    assert training.step() == set(NAMES) - set(active)


def test_observing_changes_no_bit_of_loss_and_gradients() -> None:
    for active in (NAMES, ("T1",)):
        plain, observed = Towers(), Training()
        totals = plain.wrapper().total(plain.loss(active), active), observed.total(*active)
        assert_same_bits(*totals, "total")
        for total in totals:
            total.backward()
        for name, parameter in plain.named_parameters():
            assert_same_bits(parameter.grad, observed.model.get_parameter(name).grad, name)


def put_aside(training: Training, *active: str) -> list[Tensor]:
    """The gradients of a backward pass, which are then cleared."""
    training.backward(*active)
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    training.optimizer.zero_grad()
    return gradients


def test_gradients_that_were_put_aside_and_came_back_count() -> None:
    """As where a training loop clips each micro-batch by itself."""
    training = Training()
    sums = zip(put_aside(training, "T1"), put_aside(training, "dMRI"), strict=True)
    for parameter, (first, second) in zip(training.model.parameters(), sums, strict=True):
        parameter.grad = first + second
    assert training.step() == {"rsfMRI"}
    training.backward("T1")
    assert training.step() == {"rsfMRI", "dMRI"}


def test_gradients_that_were_put_aside_twice_and_came_back_count() -> None:
    training = Training()
    everything = [put_aside(training, name) for name in NAMES]
    for parameter, gradients in zip(
        training.model.parameters(), zip(*everything, strict=True), strict=True
    ):
        parameter.grad = torch.stack(gradients).sum(0)
    assert training.step() == set()


def test_a_frozen_parameter_has_no_gradient_that_came_back() -> None:
    training = Training()
    training.model.towers["dMRI"].bias.requires_grad_(False)
    put_aside(training, "dMRI")
    training.backward("T1")
    training.model.towers["dMRI"].weight.grad = torch.rand(4, 3)
    assert training.step() == {"rsfMRI"}


@pytest.mark.parametrize(("size", "held"), [(1, ()), (2, ("dMRI",))])
def test_a_gradient_of_one_element_counts_as_training_if_it_may_have_come_back(
    size: int, held: tuple[str]
) -> None:
    """Two equal elements are a dummy gradient. One element could be either."""
    model: Any = holder(T1=torch.ones(size), dMRI=torch.ones(size))
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model.T1.sum() + model.dMRI.sum(), ["T1", "dMRI"]).backward()
    optimizer.zero_grad()
    wrapper.total(model.T1.sum(), "T1").backward()
    optimizer.step()
    assert handle.held == held


def test_a_loss_without_a_graph_is_not_forgotten_where_no_gradients_exist_yet() -> None:
    """One loss has several parts. In the first of them, all modalities are active."""
    training = Training()
    for _ in range(2):
        parts = [
            training.model.loss(active) + training.wrapper.dummy(active)
            for active in (NAMES, ("T1",))
        ]
        training.optimizer.zero_grad()
        torch.stack(parts).sum().backward()
        assert training.step() == set()


def test_a_loss_that_is_computed_during_the_backward_pass() -> None:
    """Reentrant checkpointing computes it again there, when gradients may not exist yet."""
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
    """The gradients that it finds may be those of any modality."""
    training = Training()
    training.handle.remove()
    training.backward("dMRI")
    training.handle = hold_inactive(training.wrapper, training.optimizer)
    training.backward("T1")
    assert training.step() == set()
    training.backward("T1")
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_handle_removed_between_backward_and_step() -> None:
    """What it observed still counts as trained for the other one, in this step."""
    training = Training()
    other = training.model.wrapper()
    with hold_inactive(other, training.optimizer) as handle:
        training.backward("T1")
        other.total(training.model.loss(["dMRI"]), "dMRI").backward()
    assert training.step() == {"rsfMRI"}
    assert handle.held == ()
    training.backward("T1")
    assert training.step() == {"rsfMRI", "dMRI"}


def test_a_tower_frozen_between_backward_and_step_is_held() -> None:
    """Optimizers look at the gradient alone."""
    training = Training()
    training.backward("T1")
    training.model.towers["dMRI"].requires_grad_(False)
    before = training.model.towers["dMRI"].weight.clone()
    assert training.step() == {"rsfMRI", "dMRI"}
    assert torch.equal(before, training.model.towers["dMRI"].weight)


def test_several_wrappers_hold_what_none_of_them_has_trained() -> None:
    """A wrapper without a backward pass since the last step holds nothing."""
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    wrappers = model.wrapper(), model.wrapper(names=("T1", "dMRI"))
    handles = [hold_inactive(wrapper, optimizer) for wrapper in wrappers]
    for actives, held in (
        ([["T1"], ["dMRI"]], [{"rsfMRI"}, set()]),
        ([["T1"], ["T1", "dMRI"]], [{"rsfMRI"}, set()]),
        ([["T1"]], [{"rsfMRI", "dMRI"}, set()]),
    ):
        for wrapper, active in zip(wrappers, actives, strict=False):
            wrapper.total(model.loss(active), active).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [towers(handle) for handle in handles] == held


def test_each_optimizer_has_its_own_trained_keys() -> None:
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
