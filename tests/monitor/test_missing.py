"""Missing gradients are found by name, and the error says what is likely wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from modaldummy import DummyLossWrapper, MissingGradientError, ModalDummyError, missing_gradients
from tests.holding import NAMES, Towers
from tests.preflight.models import Model, mapped, partition
from tests.zoo import ZOO, brain, holder


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
@pytest.mark.parametrize("name", ZOO)
@given(data=st.data())
def test_nothing_is_missing_after_a_total(
    name: str, scale: float | None, data: st.DataObject
) -> None:
    """Also where zeros, or no gradients, are what was asked for."""
    case = ZOO[name]()
    wrapper = case.wrapper(scale)
    active = data.draw(st.sets(st.sampled_from(wrapper.modalities)))
    wrapper.total(case.real(active), active).backward()
    assert missing_gradients(wrapper, strict=True) == {}


def towers(
    scale: float | None = 1e-7, spoil: Callable[[Any, Tensor], Tensor] | None = None
) -> DummyLossWrapper:
    """After a batch of T1 and rsfMRI; `spoil` is the bug."""
    model = Towers()
    wrapper = model.wrapper(scale)
    total = wrapper.total(model.loss(["T1", "rsfMRI"]), ["T1", "rsfMRI"])
    (total if spoil is None else spoil(model, total)).backward()
    return wrapper


DMRI = {"dMRI": ("towers.dMRI.weight", "towers.dMRI.bias")}


def test_a_loss_that_bypassed_the_wrapper() -> None:
    """The real loss is backwarded, the total is only logged."""
    wrapper = towers(spoil=lambda model, total: model.loss(["T1", "rsfMRI"]))
    assert missing_gradients(wrapper) == DMRI
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    assert str(caught.value) == (
        "2 of 6 trainable parameters have no usable gradient.\n"
        "No gradient, inactive modality: 'towers.dMRI.weight', 'towers.dMRI.bias'. Likely cause: "
        "`backward()` ran on another tensor than the total. Call it on the tensor that "
        "`wrapper.total(loss, batch)` returns."
    )
    assert isinstance(caught.value, ModalDummyError)
    assert isinstance(caught.value, RuntimeError)


def test_a_tower_that_forward_left_out() -> None:
    wrapper = towers()
    model: Any = wrapper.parameters.model
    model.zero_grad()
    wrapper.total(model.loss(["T1"]), ["T1", "rsfMRI"]).backward()
    assert list(missing_gradients(wrapper)) == ["rsfMRI"]
    with pytest.raises(
        MissingGradientError, match=r"No gradient, active modality: .*`\.detach\(\)`"
    ):
        missing_gradients(wrapper, strict=True)


def test_before_backward_and_after_zero_grad() -> None:
    wrapper = towers()
    wrapper.parameters.model.zero_grad()
    assert list(missing_gradients(wrapper)) == list(NAMES)
    with pytest.raises(MissingGradientError, match=r"`zero_grad\(\)` has run since"):
        missing_gradients(wrapper, strict=True)


def test_a_wrapper_that_is_not_used() -> None:
    """What was active is not known: everything has to have a gradient."""
    model = Towers()
    wrapper = model.wrapper(None)
    model.loss(["T1"]).backward()
    assert list(missing_gradients(wrapper)) == ["rsfMRI", "dMRI"]
    with pytest.raises(MissingGradientError, match="no loss has gone through the wrapper"):
        missing_gradients(wrapper, strict=True)


def test_zeros_in_an_inactive_modality() -> None:
    """As underflow leaves them; every element counts, also one that squares to zero."""
    wrapper = towers()
    model: Any = wrapper.parameters.model
    gradient = model.towers["dMRI"].weight.grad
    gradient.zero_()
    assert missing_gradients(wrapper) == {"dMRI": ("towers.dMRI.weight",)}
    with pytest.raises(MissingGradientError, match=r"zero everywhere, inactive.*multiplied by 0"):
        missing_gradients(wrapper, strict=True)
    gradient[1, 2] = 1e-40
    assert missing_gradients(wrapper) == {}


def test_zeros_in_an_active_modality() -> None:
    wrapper = towers(spoil=lambda model, total: total - model.loss(["T1", "rsfMRI"]))
    with pytest.raises(MissingGradientError, match=r"zero everywhere, active.*dead"):
        missing_gradients(wrapper, strict=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite(value: float) -> None:
    wrapper = towers(spoil=lambda model, total: total * value)
    assert list(missing_gradients(wrapper)) == list(NAMES)
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    active, inactive = str(caught.value).splitlines()[1:]
    assert "gradient, active modality: 'towers.T1.weight'," in active
    assert "Likely cause: an overflow, after which a GradScaler" in active
    assert "gradient, inactive modality: 'towers.dMRI.weight'," in inactive
    assert "Likely cause: the gradient of the total itself is not finite." in inactive


def test_one_element_is_enough_to_be_not_finite() -> None:
    wrapper = towers()
    model: Any = wrapper.parameters.model
    model.towers["T1"].weight.grad[0, 1] = math.nan
    assert missing_gradients(wrapper) == {"T1": ("towers.T1.weight",)}


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_sparse_tables(scale: float | None) -> None:
    """An empty gradient is what an inactive one gets; none at all is a mistake."""
    model = nn.ModuleDict({name: nn.Embedding(4, 2, sparse=True) for name in ("a", "b")})
    wrapper = DummyLossWrapper(model, {"a": "a", "b": "b"}, scale)
    wrapper.total(model["a"](torch.tensor([1, 1])).sum(), ["a"]).backward()
    assert missing_gradients(wrapper) == {}
    model["b"].weight.grad = None
    assert missing_gradients(wrapper) == ({} if scale is None else {"b": ("b.weight",)})


def test_parameters_without_elements_and_frozen_ones_miss_nothing() -> None:
    model = nn.ModuleDict({"a": holder(empty=torch.empty(0), frozen=torch.ones(2))})
    model["a"].frozen.requires_grad_(False)
    wrapper = DummyLossWrapper(model, {"a": "a"})
    assert missing_gradients(wrapper) == {}


def test_a_parameter_of_several_keys_stands_at_each() -> None:
    case = brain()
    model: Any = case.model
    wrapper = DummyLossWrapper(model, {"T1": "fusion", "dMRI": "fusion", ("T1", "dMRI"): "trunk"})
    assert missing_gradients(wrapper) == {
        "T1": ("fusion.weight", "fusion.bias"),
        "dMRI": ("fusion.weight", "fusion.bias"),
        "T1-dMRI": ("trunk.weight", "trunk.bias"),
    }


def test_a_message_lists_a_few_names() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList(nn.Linear(1, 1) for _ in range(50))})
    wrapper = DummyLossWrapper(model, {"a": "a"})
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    assert "'a.2.weight', and 95 more. Likely cause:" in str(caught.value)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_zeros_of_an_active_modality_are_never_meant(scale: float | None) -> None:
    wrapper = towers(scale)
    model: Any = wrapper.parameters.model
    model.towers["T1"].bias.grad.zero_()
    assert missing_gradients(wrapper) == {"T1": ("towers.T1.bias",)}


def test_a_zero_in_a_wrapper_that_is_not_used_is_called_a_zero() -> None:
    wrapper = Towers().wrapper()
    for parameter in wrapper.parameters.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    assert "zero everywhere" in str(caught.value)
    assert "no loss has gone" not in str(caught.value)


def test_a_message_lists_five_names_without_a_rest() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(5))})
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(DummyLossWrapper(model, {"a": "a"}), strict=True)
    assert "'a.4.weight'. Likely cause:" in str(caught.value)


@pytest.mark.usefixtures("process_group")
def test_no_rank_waits_for_another() -> None:
    """Of a DTensor the local part is looked at."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    model["a"].weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    model["a"].weight.grad = torch.ones_like(model["a"].weight)
    assert missing_gradients(DummyLossWrapper(model, {"a": "a"})) == {}


def test_something_else_than_a_wrapper() -> None:
    with pytest.raises(TypeError, match="`wrapper` must be a DummyLossWrapper, got None"):
        missing_gradients(None)  # type: ignore[arg-type]


def test_deepspeed_is_named_where_it_keeps_gradients_to_itself() -> None:
    """Its parameters have none after backward."""
    model = Model()
    wrapper = mapped(model)
    wrapper.total(model(["T1"]), "T1")
    partition(model, "_hp_mapping")
    with pytest.raises(MissingGradientError, match=r"safe_get_full_grad\(parameter\)"):
        missing_gradients(wrapper, strict=True)
