"""The wrapper: decorated losses, the explicit form, and what it reports."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from modaldummy import DummyLossWrapper
from tests.asserts import assert_same_bits, gradients_of
from tests.zoo import Brain, brain

T1_BATCH = {"T1": torch.ones(2, 3), "dMRI": None}
REAL = torch.tensor(2.0)
NUM_INACTIVE = 6  # weight and bias of rsfMRI, dMRI and of the fusion that dMRI is missing for


def real_loss() -> Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1


def test_a_training_loop_reaches_every_parameter() -> None:
    """Forward, total, backward, on batches of every kind, as a user writes it."""
    case = brain()
    wrapper = case.wrapper()
    sizes = {"T1": 3, "rsfMRI": 2, "dMRI": 5}
    for names in (["T1"], ["rsfMRI"], ["dMRI"], ["T1", "dMRI"], ["T1", "rsfMRI", "dMRI"]):
        case.model.zero_grad()
        batch = {name: torch.ones(2, sizes[name]) for name in names}
        wrapper.total(case.model(batch).square().mean(), batch).backward()
        owned = {name for key in case.spec for name in wrapper.named_parameters(key)}
        idle = {
            name for name in owned if name.startswith("fusion") and {"T1", "dMRI"} <= set(names)
        }
        missing = {n for n in owned - idle if case.model.get_parameter(n).grad is None}
        assert not missing, names


# --- without gradient mode, with nothing to do -----------------------------------------------


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
    assert brain().wrapper()(lambda batch: result)(["T1", "rsfMRI", "dMRI"]) is result


def test_inactive_modalities_that_are_frozen_leave_the_loss_alone() -> None:
    case = brain()
    wrapper = case.wrapper()
    for parameter in case.inactive({"T1"}).values():
        parameter.requires_grad_(False)
    assert wrapper.total(REAL, "T1") is REAL
    dummy = wrapper.dummy("T1")
    assert (dummy.item(), dummy.requires_grad) == (0, False)
    assert wrapper.last is not None
    assert (wrapper.last.inactive, wrapper.last.num_params) == (("rsfMRI", "dMRI"), 0)


# --- value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0,)])
def test_a_loss_of_any_shape_keeps_it(shape: tuple[int, ...]) -> None:
    """Each element gets the dummy, so that a later mean keeps the scale."""
    case = brain()
    total = case.wrapper(1e-3).total(torch.ones(shape, requires_grad=True) * 2, "T1")
    assert total.shape == shape
    if total.numel():
        total.mean().backward()
        gradients = gradients_of(case.inactive({"T1"}))
        assert all(torch.allclose(g, torch.full_like(g, 1e-3)) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradients_of_many_elements_are_added_up_without_overflow(dtype: torch.dtype) -> None:
    """A later sum hands each of 70,000 elements an upstream gradient of 1."""
    case = brain()
    losses = torch.zeros(70_000, dtype=dtype, requires_grad=True)
    case.wrapper().total(losses * 1, "T1").sum().backward()
    for gradient in gradients_of(case.inactive({"T1"})):
        assert torch.allclose(gradient, torch.full_like(gradient, 7e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_loss_keeps_its_dtype(dtype: torch.dtype) -> None:
    assert brain().wrapper().total(REAL.to(dtype), "T1").dtype == dtype


def test_an_integer_loss_becomes_floating() -> None:
    """It could not carry the gradient otherwise."""
    case = brain()
    total = case.wrapper().total(torch.tensor(0), [])
    total.backward()
    assert total.item() == 0
    assert gradients_of(case.inactive(set()))


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
    assert all((gradient == 0.5).all() for gradient in gradients_of(case.inactive({"T1"})))


@pytest.mark.parametrize("scale", [0.0, None])
def test_scale_zero_and_none(scale: float | None) -> None:
    """Zeros, or nothing at all; the value stays as it is; the parameters are in the graph."""
    case = brain()
    real = real_loss()
    total = case.wrapper(scale).total(real, "T1")
    assert_same_bits(total.detach(), real.detach(), "value")
    visited: list[str] = []
    for name, parameter in case.inactive({"T1"}).items():
        node = get_gradient_edge(parameter).node
        node.register_hook(lambda *_, name=name: visited.append(name))
    total.backward()
    if scale is None:
        assert all(p.grad is None for p in case.inactive({"T1"}).values())
    else:
        assert not any(gradient.any() for gradient in gradients_of(case.inactive({"T1"})))
    assert sorted(visited) == sorted(case.inactive({"T1"}))


def test_max_fraction_none_lifts_the_cap() -> None:
    case = brain()
    with torch.no_grad():
        case.model.get_parameter("fusion.weight").fill_(1e6)
    bounded, free = case.wrapper(1.0), case.wrapper(1.0, max_fraction=None)
    assert bounded.total(REAL, "T1").item() == pytest.approx(2, rel=1.01e-4)
    assert free.total(REAL, "T1").item() > 1e6
    assert free.last is not None
    assert free.last.dummy == free.last.uncapped


def test_a_nan_loss_stays_nan() -> None:
    """A broken loss is never hidden."""
    wrapper = brain().wrapper()
    assert wrapper.total(torch.tensor(math.nan), "T1").isnan()
    assert wrapper.last is not None
    assert wrapper.last.dummy == 0
    assert math.isnan(wrapper.last.fraction)


def test_the_total_may_be_changed_in_place() -> None:
    """HF's Trainer multiplies the loss in place; the report and the gradient stay right."""
    case = brain()
    wrapper = case.wrapper()
    real = real_loss()
    total = wrapper.total(real, "T1")
    total *= 3
    total.backward()
    everything = wrapper.total(real, ["T1", "rsfMRI", "dMRI"])
    with torch.no_grad():
        everything *= 3
    assert wrapper.last is not None
    assert wrapper.last.real == 2
    gradient = case.model.get_parameter("fusion.bias").grad
    assert gradient is not None
    assert_same_bits(gradient, torch.full((4,), 1e-7) * 3, "scaled")


def test_the_dummy_may_be_changed_in_place() -> None:
    """It shares no memory with the report."""
    wrapper = brain().wrapper(1.0)
    dummy = wrapper.dummy("T1")
    before = dummy.item()
    dummy *= 3
    assert wrapper.last is not None
    assert before != 0
    assert wrapper.last.dummy == wrapper.last.uncapped == before


def test_accumulation_adds_up() -> None:
    """Two backward passes give each parameter the sum of its dummy and real gradients."""
    case = brain()
    wrapper = case.wrapper(0.25)
    for _ in range(2):
        wrapper.total(real_loss(), "T1").backward()
    bias = case.model.get_parameter("fusion.bias")
    assert bias.grad is not None
    assert bias.grad.tolist() == [0.5] * 4


# --- report ----------------------------------------------------------------------------------


def test_report() -> None:
    """What happened, in map order, ready for a logger."""
    case = brain()
    wrapper = case.wrapper(1e-3)
    assert wrapper.last is None
    wrapper.total(REAL, ["T1", "rsfMRI"])
    report = wrapper.last
    assert report is not None
    assert (report.active, report.inactive) == (("T1", "rsfMRI"), ("dMRI",))
    inactive = case.inactive({"T1", "rsfMRI"})
    assert report.num_params == len(inactive)
    assert report.num_elements == sum(p.numel() for p in inactive.values())
    logged = report.as_dict()
    assert json.loads(json.dumps(logged)) == logged
    assert list(logged) == [
        "modaldummy/real",
        "modaldummy/dummy",
        "modaldummy/uncapped",
        "modaldummy/fraction",
        "modaldummy/num_params",
        "modaldummy/num_elements",
        "modaldummy/active/T1",
        "modaldummy/active/dMRI",
        "modaldummy/active/rsfMRI",
    ]
    assert logged["modaldummy/fraction"] == report.fraction == abs(report.dummy.item()) / 2
    assert [logged[f"modaldummy/active/{name}"] for name in ("T1", "rsfMRI", "dMRI")] == [1, 1, 0]
    wrapper.total(REAL, [])
    assert list(wrapper.last.as_dict()) == list(logged)
    with pytest.raises(AttributeError):
        report.active = ()


def test_report_of_the_dummy_alone_has_no_real_loss() -> None:
    wrapper = brain().wrapper()
    dummy = wrapper.dummy("T1")
    report = wrapper.last
    assert report is not None
    assert dummy.shape == ()
    assert report.dummy == report.uncapped == dummy
    assert report.real.isnan()
    assert math.isnan(report.fraction)


def test_fraction_of_a_zero_loss() -> None:
    """Zero with the cap, which lets nothing through; infinite without it."""
    case = brain()
    capped, free = case.wrapper(1.0), case.wrapper(1.0, max_fraction=None)
    for wrapper in (capped, free):
        wrapper.total(torch.tensor(0.0), "T1")
    assert capped.last is not None
    assert free.last is not None
    assert (capped.last.fraction, free.last.fraction) == (0, math.inf)


def test_repr_shows_how_to_make_it() -> None:
    text = repr(DummyLossWrapper(Brain(), {"T1": "fusion"}, 1e-6))
    assert text == (
        "DummyLossWrapper(Brain(...), {'T1': ['fusion']}, scale=1e-06, max_fraction=0.0001, "
        "gradient_only=False, resolver=None)"
    )


def test_two_wrappers_on_one_model_do_not_meet() -> None:
    case = brain()
    first, second = case.wrapper(0.5), DummyLossWrapper(case.model, {"T1": "trunk"})
    first.total(REAL, "T1")
    second.total(REAL, [])
    assert first.last is not None
    assert first.last.active == ("T1",)


def test_a_copy_of_the_wrapper_has_its_own_model() -> None:
    case = brain()
    twin = copy.deepcopy(case.wrapper())
    twin.total(real_loss(), "T1").backward()
    assert all(p.grad is None for p in case.model.parameters())
