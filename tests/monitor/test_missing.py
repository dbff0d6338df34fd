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
from tests.preflight.models import partition
from tests.zoo import ZOO, brain, holder

BATCH = ("T1", "rsfMRI")


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
@pytest.mark.parametrize("name", ZOO)
@given(data=st.data())
def test_nothing_is_missing_after_a_total(
    name: str, scale: float | None, data: st.DataObject
) -> None:
    """Also where zeros, or no gradients, are what the scale asks for."""
    case = ZOO[name]()
    wrapper = case.wrapper(scale)
    active = data.draw(st.sets(st.sampled_from(wrapper.modalities)))
    wrapper.total(case.real(active), active).backward()
    assert missing_gradients(wrapper, strict=True) == {}


def total(model: Towers, wrapper: DummyLossWrapper) -> Tensor:
    return wrapper.total(model.loss(BATCH), BATCH)


def with_deepspeed(model: Towers, wrapper: DummyLossWrapper) -> None:
    total(model, wrapper)
    partition(model, "_hp_mapping")


NOT_FINITE = (
    r"(?s)in the gradient, active modality: 'towers.T1.weight',.*: an overflow, after which .*in "
    "the gradient, inactive modality: 'towers.dMRI.weight',.*: the gradient of the total itself"
)
# What happens to a model and its wrapper, the modalities without gradients, words of the message.
CASES: dict[str, tuple[Callable[[Any, DummyLossWrapper], Any], list[str], str]] = {
    "the total is not used": (
        lambda model, wrapper: (total(model, wrapper), model.loss(BATCH).backward()),
        ["dMRI"],
        "No gradient, inactive modality: .*another tensor than the total",
    ),
    "the forward pass leaves out a tower": (
        lambda model, wrapper: wrapper.total(model.loss(["T1"]), BATCH).backward(),
        ["rsfMRI"],
        r"No gradient, active modality: .*`\.detach\(\)`",
    ),
    "zero_grad has run": (
        lambda model, wrapper: (total(model, wrapper).backward(), model.zero_grad()),
        [*NAMES],
        r"`zero_grad\(\)` has run since",
    ),
    "DeepSpeed": (
        with_deepspeed,
        [*NAMES],
        r"safe_get_full_grad\(parameter\)",
    ),
    "the wrapper is not used": (
        lambda model, wrapper: model.loss(["T1"]).backward(),
        ["rsfMRI", "dMRI"],
        "no loss has gone through the wrapper",
    ),
    "zeros without the wrapper": (
        lambda model, wrapper: sum(0 * p.sum() for p in model.parameters()).backward(),
        [*NAMES],
        "zero everywhere, active modality: .*dead",
    ),
    "zeros in active modalities": (
        lambda model, wrapper: (total(model, wrapper) - model.loss(BATCH)).backward(),
        [*BATCH],
        "zero everywhere, active modality: .*dead",
    ),
    "zeros in an inactive modality": (
        lambda model, wrapper: (
            total(model, wrapper).backward(),
            model.towers["dMRI"].zero_grad(set_to_none=False),
        ),
        ["dMRI"],
        "zero everywhere, inactive modality: .*multiplied by 0",
    ),
    "NaN": (
        lambda model, wrapper: (total(model, wrapper) * math.nan).backward(),
        [*NAMES],
        NOT_FINITE,
    ),
    "infinity": (
        lambda model, wrapper: (total(model, wrapper) * math.inf).backward(),
        [*NAMES],
        NOT_FINITE,
    ),
}


@pytest.mark.parametrize(("happens", "missing", "words"), CASES.values(), ids=CASES)
def test_missing_gradients_are_found_with_their_likely_cause(
    happens: Callable[[Any, DummyLossWrapper], Any], missing: list[str], words: str
) -> None:
    model = Towers()
    wrapper = model.wrapper()
    happens(model, wrapper)
    assert missing_gradients(wrapper, unmapped=False) == {
        name: (f"towers.{name}.weight", f"towers.{name}.bias") for name in missing
    }
    with pytest.raises(MissingGradientError, match=words):
        missing_gradients(wrapper, strict=True)


def test_the_whole_message() -> None:
    model = Towers()
    wrapper = model.wrapper()
    total(model, wrapper)
    model.loss(BATCH).backward()
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    assert str(caught.value) == (
        "2 of 8 trainable parameters have no usable gradient.\n"
        "No gradient, inactive modality: 'towers.dMRI.weight', 'towers.dMRI.bias'. Likely cause: "
        "`backward()` ran on another tensor than the total. Call it on the tensor that "
        "`wrapper.total(loss, batch)` returns."
    )
    assert isinstance(caught.value, ModalDummyError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("num_layers", "end"), [(5, "'a.4.weight'. L"), (6, "'a.4.weight', and 1 more. L")]
)
def test_a_message_lists_five_names(num_layers: int, end: str) -> None:
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(num_layers))
    with pytest.raises(MissingGradientError, match=end):
        missing_gradients(DummyLossWrapper(nn.ModuleDict({"a": layers}), {"a": "a"}), strict=True)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_every_element_of_a_gradient_counts(scale: float | None) -> None:
    """One NaN is too many. One element above 0 is enough, also if its square is 0."""
    model = Towers()
    wrapper = model.wrapper(scale)
    total(model, wrapper).backward()
    model.towers["T1"].weight.grad[0, 1] = math.nan
    model.towers["T1"].bias.grad.zero_()
    model.towers["rsfMRI"].bias.grad.zero_()[1] = 1e-40
    assert missing_gradients(wrapper) == {"T1": ("towers.T1.weight", "towers.T1.bias")}


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_sparse_tables(scale: float | None) -> None:
    """An inactive one gets an empty gradient. Without any gradient, something is wrong."""
    model = nn.ModuleDict({name: nn.Embedding(4, 2, sparse=True) for name in ("a", "b")})
    wrapper = DummyLossWrapper(model, {"a": "a", "b": "b"}, scale)
    wrapper.total(model["a"](torch.tensor([1, 1])).sum(), ["a"]).backward()
    assert missing_gradients(wrapper) == {}
    model["b"].weight.grad = None
    assert missing_gradients(wrapper) == ({} if scale is None else {"b": ("b.weight",)})


def test_parameters_without_elements_and_frozen_ones_need_no_gradient() -> None:
    model = nn.ModuleDict({"a": holder(empty=torch.empty(0), frozen=torch.ones(2))})
    model["a"].frozen.requires_grad_(False)
    assert missing_gradients(DummyLossWrapper(model, {"a": "a"})) == {}


def test_a_parameter_of_several_keys_is_listed_for_each() -> None:
    paths: Any = {"T1": "fusion", "dMRI": "fusion", ("T1", "dMRI"): "trunk"}
    assert missing_gradients(DummyLossWrapper(brain().model, paths), unmapped=False) == {
        "T1": ("fusion.weight", "fusion.bias"),
        "dMRI": ("fusion.weight", "fusion.bias"),
        "T1-dMRI": ("trunk.weight", "trunk.bias"),
    }


def test_what_is_in_no_modality_is_listed_if_it_has_no_gradient() -> None:
    """Such as a tower that the map forgot; not what is frozen, or has zeros."""
    model = Towers()
    wrapper = model.wrapper(names=("T1", "rsfMRI"))
    model.unused = nn.Linear(2, 2)
    model.unused.bias.requires_grad_(False)
    wrapper.total(model.loss(["T1"]), ["T1"]).backward()
    model.trunk.bias.grad.zero_()  # type: ignore[union-attr]
    names = ("towers.dMRI.weight", "towers.dMRI.bias", "unused.weight")
    assert missing_gradients(wrapper) == {"[unmapped]": names}
    assert missing_gradients(wrapper, strict=True, unmapped=False) == {}
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(wrapper, strict=True)
    assert str(caught.value) == (
        "3 of 9 trainable parameters have no usable gradient.\n"
        "No gradient, no modality: 'towers.dMRI.weight', 'towers.dMRI.bias', 'unused.weight'. "
        "Likely cause: the loss of this batch does not depend on them, and they are in no "
        "modality, so that they get no dummy gradient. Give them to a modality if only some "
        "batches use them, else freeze them."
    )


@pytest.mark.parametrize(
    ("step", "words"), [(True, "`zero_grad\\(\\)` has"), (False, "no loss has")]
)
def test_without_any_gradient_the_cause_is_the_same_for_all(step: bool, words: str) -> None:
    model = Towers()
    wrapper = model.wrapper()
    if step:
        total(model, wrapper)
    with pytest.raises(MissingGradientError, match=f"no modality: 'trunk.weight'.*{words}"):
        missing_gradients(wrapper, strict=True)


@pytest.mark.usefixtures("process_group")
def test_no_rank_waits_for_another() -> None:
    """Only the local shard of a DTensor is read."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    model["a"].weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    model["a"].weight.grad = torch.ones_like(model["a"].weight)
    assert missing_gradients(DummyLossWrapper(model, {"a": "a"})) == {}
