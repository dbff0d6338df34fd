"""The wrapper: the total, its value and its gradients, and what extensions get."""

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from modaldummy import DummyLossWrapper, UnknownModalityError
from modaldummy._core.parameter_map import Step
from tests.asserts import assert_same_bits, gradients_of, last_report
from tests.zoo import Brain, Case, brain

REAL = torch.tensor(2.0)
EVERYTHING = ["T1", "rsfMRI", "dMRI"]


def real_loss() -> Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1


def dummy_gradients(case: Case, *active: str) -> set[float]:
    """The different elements of the gradients of all inactive parameters."""
    gradients = gradients_of(case.inactive(set(active)))
    return {element for gradient in gradients for element in gradient.unique().tolist()}


def test_a_training_loop_reaches_every_parameter() -> None:
    """Forward, total, backward, on batches of every kind, as a user writes it."""
    case = brain()
    wrapper = case.wrapper()
    sizes = {"T1": 3, "rsfMRI": 2, "dMRI": 5}
    for names in (["T1"], ["rsfMRI"], ["dMRI"], ["T1", "dMRI"], EVERYTHING):
        case.model.zero_grad()
        batch = {name: torch.ones(2, sizes[name]) for name in names}
        wrapper.total(case.model(batch).square().mean(), batch).backward()
        owned = {name for key in case.spec for name in wrapper.named_parameters(key)}
        unused = {
            name for name in owned if name.startswith("fusion") and {"T1", "dMRI"} <= set(names)
        }
        missing = {n for n in owned - unused if case.model.get_parameter(n).grad is None}
        assert not missing, names


# --- Nothing to do ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_left_alone(mode: Any) -> None:
    """The batch is not looked at, the loss is not touched, the last report stays."""
    wrapper = brain().wrapper()
    wrapper.total(REAL, "T1")
    last = wrapper.last
    with mode():
        assert wrapper.total(REAL, object()) is REAL
        assert wrapper(torch.nn.Identity())(REAL, modalities="nonsense") is REAL
        assert wrapper.dummy(object()).item() == 0
    assert wrapper.last is last


def test_with_nothing_inactive_a_wrapped_loss_returns_what_it_got() -> None:
    """The very container, so that not even a shallow copy is made."""
    result = {"loss": REAL, "logits": REAL}
    assert brain().wrapper()(lambda batch: result)(EVERYTHING) is result


def test_inactive_modalities_that_are_frozen_leave_the_loss_alone() -> None:
    case = brain()
    wrapper = case.wrapper()
    for parameter in case.inactive({"T1"}).values():
        parameter.requires_grad_(False)
    assert wrapper.total(REAL, "T1") is REAL
    dummy = wrapper.dummy("T1")
    assert (dummy.item(), dummy.requires_grad) == (0, False)
    report = last_report(wrapper)
    assert (report.inactive, report.num_params) == (("rsfMRI", "dMRI"), 0)


# --- Value and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0,)])
def test_a_loss_of_any_shape_keeps_it(shape: tuple[int, ...]) -> None:
    """Each element gets the dummy, so that a later mean keeps the scale."""
    case = brain()
    total = case.wrapper(0.25).total(torch.ones(shape, requires_grad=True) * 2, "T1")
    assert total.shape == shape
    if total.numel():
        total.mean().backward()
        assert [*dummy_gradients(case, "T1")] == pytest.approx([0.25])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradients_of_many_elements_are_added_up_without_overflow(dtype: torch.dtype) -> None:
    """A later sum hands each of 70,000 elements an upstream gradient of 1."""
    case = brain()
    losses = torch.zeros(70_000, dtype=dtype, requires_grad=True)
    case.wrapper().total(losses * 1, "T1").sum().backward()
    assert [*dummy_gradients(case, "T1")] == pytest.approx([7e-3], rel=1e-6)


def test_an_integer_loss_becomes_floating() -> None:
    """It could not carry the gradient otherwise."""
    case = brain()
    total = case.wrapper(0.25).total(torch.tensor(0), [])
    total.backward()
    assert total.item() == 0
    assert dummy_gradients(case) == {0.25}


def test_gradient_only_leaves_the_value_bit_for_bit() -> None:
    """The gradients are those of the ordinary form."""
    case = brain()
    wrapper = case.wrapper(0.5, gradient_only=True)
    for value in (2.0, -0.0):
        case.model.zero_grad()
        real = torch.tensor(value, requires_grad=True) * 1
        total = wrapper.total(real, "T1")
        assert_same_bits(total.detach(), real.detach(), "value")
        assert wrapper.dummy("T1").item() == 0
        total.backward()
        assert dummy_gradients(case, "T1") == {0.5}


@pytest.mark.parametrize("scale", [0.0, None])
def test_scale_zero_and_none(scale: float | None) -> None:
    """Zeros, or nothing at all; the value stays as it is."""
    case = brain()
    real = real_loss()
    total = case.wrapper(scale).total(real, "T1")
    assert_same_bits(total.detach(), real.detach(), "value")
    total.backward()
    if scale is None:
        assert all(p.grad is None for p in case.inactive({"T1"}).values())
    else:
        assert dummy_gradients(case, "T1") == {0.0}


def test_max_fraction_none_lifts_the_cap() -> None:
    case = brain()
    with torch.no_grad():
        case.model.get_parameter("fusion.weight").fill_(1e6)
    bounded, free = case.wrapper(1.0), case.wrapper(1.0, max_fraction=None)
    assert bounded.total(REAL, "T1").item() == pytest.approx(2, rel=1.01e-4)
    assert free.total(REAL, "T1").item() > 1e6
    assert last_report(free).dummy == last_report(free).uncapped


def test_the_total_may_be_changed_in_place() -> None:
    """HF's Trainer multiplies the loss in place; the report and the gradient stay right."""
    case = brain()
    wrapper = case.wrapper(0.25)
    real = real_loss()
    total = wrapper.total(real, "T1")
    total *= 3
    total.backward()
    assert dummy_gradients(case, "T1") == {0.75}
    everything = wrapper.total(real, EVERYTHING)
    with torch.no_grad():
        everything *= 3
    assert last_report(wrapper).real == 2


def test_the_dummy_may_be_changed_in_place() -> None:
    """It shares no memory with the report."""
    wrapper = brain().wrapper(1.0)
    dummy = wrapper.dummy("T1")
    before = dummy.item()
    dummy *= 3
    assert before != 0
    assert last_report(wrapper).dummy == last_report(wrapper).uncapped == before


# --- The wrapper as an object -----------------------------------------------------------------


def test_repr_shows_how_to_make_it() -> None:
    text = repr(DummyLossWrapper(Brain(), {"T1": "fusion"}, 1e-6))
    assert text == (
        "DummyLossWrapper(Brain(...), {'T1': ['fusion']}, scale=1e-06, max_fraction=0.0001, "
        "gradient_only=False, resolver=None)"
    )


def test_settings_can_be_read_and_not_set() -> None:
    wrapper = brain().wrapper(1e-6, max_fraction=None, gradient_only=True)
    assert (wrapper.scale, wrapper.max_fraction, wrapper.reads_parameters) == (1e-6, None, False)
    assert brain().wrapper(0.0).reads_parameters is False
    for name in ("scale", "max_fraction", "reads_parameters"):
        with pytest.raises(AttributeError, match=name):
            setattr(wrapper, name, 1.0)


def pickled(wrapper: DummyLossWrapper) -> Any:
    return pickle.loads(pickle.dumps(wrapper))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_model_and_no_subscribers(
    copied: Callable[[DummyLossWrapper], DummyLossWrapper],
) -> None:
    """Its settings and its last report are those of the original."""
    case = brain()
    wrapper = case.wrapper(0.25)
    wrapper.total(real_loss(), "T1")
    wrapper.subscribe(lambda step, total: pytest.fail("the copy called"))
    twin = copied(wrapper)
    assert repr(twin) == repr(wrapper)
    assert last_report(twin).as_dict() == last_report(wrapper).as_dict()
    twin.total(real_loss(), "T1").backward()
    assert all(p.grad is None for p in case.model.parameters())
    gradients = gradients_of(twin.named_parameters(("T1", "dMRI")))
    assert all((gradient == 0.25).all() for gradient in gradients)


def test_wrappers_can_be_chained() -> None:
    """Two maps of one model, say vision and text: each adds its own term and has its own report."""
    case = brain()
    vision = DummyLossWrapper(case.model, {"T1": "fusion"}, 0.25)
    text = DummyLossWrapper(case.model, {"text": "trunk"}, 0.5)
    text.total(vision.total(real_loss(), []), []).backward()
    for name, value in (("fusion.bias", 0.25), ("trunk.bias", 0.5)):
        gradient = case.model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient == value).all()
    assert (last_report(vision).inactive, last_report(text).inactive) == (("T1",), ("text",))


class Probe(torch.autograd.Function):
    """Identity whose node tells when the graph goes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_the_report_keeps_no_graph_alive() -> None:
    """Otherwise the activations of a whole step would live until the next."""
    wrapper = brain().wrapper()
    real = Probe.apply(torch.ones((), requires_grad=True))  # type: ignore[no-untyped-call]
    node = weakref.ref(real.grad_fn)
    total = wrapper.total(real, "T1")
    del real
    assert node() is not None
    del total
    assert wrapper.last is not None
    assert node() is None


# --- For code that extends the package --------------------------------------------------------


def test_a_subscriber_gets_each_step_and_what_is_returned() -> None:
    wrapper = brain().wrapper()
    seen: list[tuple[tuple[str, ...], Tensor]] = []
    unsubscribe = wrapper.subscribe(lambda step, total: seen.append((step.active, total)))
    loss = real_loss()
    criterion = wrapper(lambda batch: loss)
    totals = [wrapper.total(loss, "T1"), wrapper.dummy("dMRI"), criterion(batch=["T1"])]
    totals.append(wrapper.total(loss, EVERYTHING))
    with torch.no_grad():
        wrapper.total(loss, "T1")
    assert [active for active, _ in seen] == [("T1",), ("dMRI",), ("T1",), tuple(EVERYTHING)]
    assert all(total is given for total, (_, given) in zip(totals, seen, strict=True))
    unsubscribe()
    wrapper.total(loss, "T1")
    assert len(seen) == 4


def test_subscriptions_of_one_function_end_one_by_one() -> None:
    wrapper = brain().wrapper()
    calls: list[str] = []

    def observe(step: Step, total: Tensor) -> None:
        calls.append("called")

    first, second = wrapper.subscribe(observe), wrapper.subscribe(observe)
    first()
    first()
    wrapper.total(REAL, "T1")
    assert calls == ["called"]
    second()
    wrapper.total(REAL, "T1")
    assert calls == ["called"]


def test_a_subscriber_may_end_its_subscription_while_it_is_called() -> None:
    wrapper = brain().wrapper()
    calls: list[int] = []
    ends: list[Any] = []

    def observe(number: int, step: Step, total: Tensor) -> None:
        calls.append(number)
        ends[number]()

    ends += [wrapper.subscribe(partial(observe, number)) for number in range(3)]
    wrapper.total(REAL, "T1")
    assert calls == [0, 1, 2]


def test_a_share_is_a_factor_on_the_gradient() -> None:
    case = brain()
    case.wrapper(0.5).add(real_loss(), {"T1"}, share=0.25).backward()
    assert dummy_gradients(case, "T1") == {0.125}
    case.model.zero_grad()
    case.wrapper(None).add(real_loss(), {"T1"}, share=0.25).backward()
    assert all(p.grad is None for p in case.inactive({"T1"}).values())


@pytest.mark.parametrize("active", [["t1"], "a b", {"T1", "PET"}])
def test_a_name_that_is_not_in_the_map_is_refused(active: Any) -> None:
    with pytest.raises(UnknownModalityError, match="`active` names the modality"):
        brain().wrapper().add(REAL, active)


def test_a_wrapper_has_one_interceptor() -> None:
    wrapper = brain().wrapper()
    wrapper.intercept(Mock())
    with pytest.raises(ValueError, match="shadow already"):
        wrapper.intercept(Mock())
    wrapper.intercept(None)
    assert wrapper.interceptor is None
