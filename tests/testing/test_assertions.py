"""Each assertion of the kit holds where the promise does, and fails, by name, where it does not."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modaldummy import DummyLossWrapper
from modaldummy.testing import (
    active_sets,
    assert_dummy_is_negligible,
    assert_every_parameter_has_gradient,
    assert_gradients_unchanged,
    batches,
    param_maps,
    scales,
)
from modaldummy.testing.compare import describe_difference
from tests.asserts import assert_same_bits
from tests.zoo import ZOO, Brain, Case, brain

REAL = torch.tensor(2.0)


def backward(wrapper: DummyLossWrapper, loss: Tensor, batch: Any) -> None:
    wrapper.total(loss, batch).backward()


@given(data=st.data(), scale=scales())
def test_all_hold_for_random_maps(data: st.DataObject, scale: float) -> None:
    """As a user would test a model: any map, any active set, any form of batch."""
    model = Brain()
    wrapper = DummyLossWrapper(model, data.draw(param_maps(model)), scale)
    active = data.draw(active_sets(wrapper.modalities))
    batch = data.draw(batches(wrapper.modalities, active))
    inactive = {
        id(owned.parameter) for owned in wrapper.parameters.split(active).inactive_parameters
    }
    used = [p for p in model.parameters() if id(p) not in inactive]

    def loss_fn(_: Any) -> Tensor:
        return torch.stack([p.square().mean() for p in used] or [torch.ones(())]).sum()

    assert_gradients_unchanged(wrapper, loss_fn, batch)
    assert_dummy_is_negligible(wrapper)
    backward(wrapper, loss_fn(batch), batch)
    assert_every_parameter_has_gradient(model, wrapper)


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO.keys())
def test_all_hold_in_the_zoo(make: Callable[[], Case]) -> None:
    case = make()
    wrapper = case.wrapper()
    active = {wrapper.modalities[0]}
    assert_gradients_unchanged(wrapper, lambda _: case.real(active), active)
    assert_dummy_is_negligible(wrapper)
    backward(wrapper, case.real(active), active)
    assert_every_parameter_has_gradient(case.model, wrapper)


# --- assert_every_parameter_has_gradient -------------------------------------------------------


def test_missing_gradients_are_named_with_modality_and_cause() -> None:
    case = brain()
    wrapper = case.wrapper()
    wrapper.total(case.model({"T1": torch.ones(2, 3)}).sum(), ["T1", "dMRI"])
    with pytest.raises(AssertionError) as info:
        assert_every_parameter_has_gradient(case.model, wrapper)
    first, *lines = str(info.value).splitlines()
    assert first == "12 trainable parameters have no usable gradient after backward:"
    tower = "vision_tower.{0}_patch_embed.weight: no gradient. Its modality was "
    unowned = "trunk.bias: no gradient. No modality owns it, and the loss does not depend on it."
    inactive = "inactive. Call `backward()` on what the wrapper returned."
    assert f"  [T1] {tower.format('T1')}active, but the loss does not depend on it." in lines
    assert f"  [rsfMRI] {tower.format('rsfMRI')}{inactive}" in lines
    assert f"  {unowned}" in lines
    assert any(line.startswith("  [T1-dMRI] fusion.weight: ") for line in lines)


def test_a_scale_of_none_is_named_as_the_cause() -> None:
    case = brain()
    wrapper = case.wrapper(None)
    backward(wrapper, case.real({"T1"}), "T1")
    with pytest.raises(AssertionError, match=r"\[dMRI\] .*inactive, and `scale=None` gives no"):
        assert_every_parameter_has_gradient(case.model, wrapper)


def test_without_a_wrapper_only_names_are_known() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"](torch.ones(2)).sum().backward()
    with pytest.raises(AssertionError) as info:
        assert_every_parameter_has_gradient(model)
    assert str(info.value).splitlines()[1:] == ["  b.weight: no gradient", "  b.bias: no gradient"]
    model["b"].requires_grad_(False)
    assert_every_parameter_has_gradient(model)


@pytest.mark.parametrize("scale", [1e-7, 0.0])
def test_a_zero_counts_only_where_the_dummy_alone_wrote(scale: float) -> None:
    """Real gradients may contain zeros, and so may those of a scale of zero."""
    case = brain()
    wrapper = case.wrapper(scale)
    backward(wrapper, case.real({"T1"}), "T1")
    trunk = case.model.get_parameter("trunk.weight").grad
    fusion = case.model.get_parameter("fusion.weight").grad
    assert trunk is not None
    assert fusion is not None
    trunk.zero_()
    assert_every_parameter_has_gradient(case.model, wrapper)
    fusion[0] = 0
    if scale:
        with pytest.raises(AssertionError, match=r"\[T1-dMRI\] fusion.weight: 4 of 16 elements"):
            assert_every_parameter_has_gradient(case.model, wrapper)
    else:
        assert_every_parameter_has_gradient(case.model, wrapper)


def test_a_wrapper_that_has_not_been_called_is_told() -> None:
    case = brain()
    with pytest.raises(AssertionError, match="has not been called in gradient mode"):
        assert_every_parameter_has_gradient(case.model, case.wrapper())
    with pytest.raises(AssertionError, match="has not been called in gradient mode"):
        assert_dummy_is_negligible(case.wrapper())


# --- assert_dummy_is_negligible ----------------------------------------------------------------


def test_too_large_a_dummy_names_what_contributes_most() -> None:
    case = brain()
    with torch.no_grad():
        case.model.get_parameter("fusion.weight").fill_(1.0)
        case.model.get_parameter("vision_tower.dMRI_patch_embed.weight").fill_(-100.0)
    wrapper = case.wrapper(0.01, max_fraction=None)
    wrapper.total(REAL, "T1")
    with pytest.raises(AssertionError) as info:
        assert_dummy_is_negligible(wrapper)
    first, *sums = str(info.value).splitlines()
    assert first.startswith("The dummy term must be at most 0.010% of the real loss 2, got -19.")
    assert first.endswith(
        "%. Inactive: rsfMRI, dMRI. Lower `scale` or `max_fraction`. Largest sums:"
    )
    assert len(sums) == 5
    assert sums[0] == "  [dMRI] vision_tower.dMRI_patch_embed.weight: -2000"
    assert sums[1] == "  [T1-dMRI] fusion.weight: 16"


def test_the_accepted_fraction_can_be_chosen() -> None:
    wrapper = brain().wrapper(1.0, max_fraction=0.5)
    wrapper.total(torch.tensor(1e-3), "T1")
    assert_dummy_is_negligible(wrapper, max_fraction=0.5)
    with pytest.raises(AssertionError, match=r"at most 0.010%"):
        assert_dummy_is_negligible(wrapper)


@pytest.mark.parametrize("real", [0.0, float("inf"), float("nan")])
def test_no_dummy_is_negligible_beside_anything(real: float) -> None:
    """A dummy without a real loss has nothing to be negligible beside."""
    wrapper = brain().wrapper()
    wrapper.total(torch.tensor(real), "T1")
    assert_dummy_is_negligible(wrapper)
    wrapper.dummy("T1")
    with pytest.raises(AssertionError, match="of the real loss nan"):
        assert_dummy_is_negligible(wrapper)


# --- assert_gradients_unchanged ----------------------------------------------------------------


class Leaky(DummyLossWrapper):
    """Its dummy term reaches into the trunk."""

    def total(self, real: Tensor, batch: Any) -> Tensor:
        trunk: Tensor = self.parameters.model.get_parameter("trunk.weight")
        return super().total(real, batch) + 1e-7 * trunk.sum()


def test_a_dummy_that_leaks_is_caught() -> None:
    case = brain()
    wrapper = Leaky(case.model, case.spec)
    with pytest.raises(AssertionError) as info:
        assert_gradients_unchanged(wrapper, lambda _: case.real({"T1"}), "T1")
    assert str(info.value).startswith(
        "1 gradients changed that the dummy term must not change:\n  trunk.weight: differs by up to"
    )


def test_a_modality_that_the_loss_uses_though_inactive_is_no_change() -> None:
    """Inactive parameters are the dummy's own business."""
    case = brain()
    assert_gradients_unchanged(case.wrapper(), lambda _: case.real({"T1", "dMRI"}), "T1")


def test_nothing_is_left_behind() -> None:
    """Gradients, buffers and random state are as they were, also after a failure."""
    norm, other = nn.BatchNorm1d(3), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": norm, "b": other})
    wrapper = DummyLossWrapper(model, {"a": "a", "b": "b"})
    earlier = torch.ones(3)
    norm.bias.grad = earlier

    def loss_fn(batch: Any) -> Tensor:
        output: Tensor = nn.functional.dropout(norm(torch.randn(4, 3)), 0.5).square().mean()
        return output * (random.random() if batch == "b" else 1)

    state, mean = torch.get_rng_state(), norm.running_mean
    assert mean is not None
    before = mean.clone()
    assert_gradients_unchanged(wrapper, loss_fn, "a")
    with pytest.raises(
        AssertionError, match=r"the same loss for the same batch.*, got .* and then"
    ):
        assert_gradients_unchanged(wrapper, loss_fn, "b")
    assert norm.bias.grad is earlier
    assert_same_bits(earlier, torch.ones(3), "gradient")
    assert other.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mean, before)


class Counting(Brain):
    """Replaces a buffer in each forward pass."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


def test_buffers_that_are_replaced_are_put_back() -> None:
    """By the very tensor, so that no second run counts from where the first one ended."""
    model = Counting()
    before = model.count

    def loss_fn(_: Any) -> Tensor:
        model.count = model.count + 1
        return model.count * model.trunk.weight.sum()

    assert_gradients_unchanged(DummyLossWrapper(model, {"T1": "fusion"}), loss_fn, "T1")
    assert model.count is before
    assert model.count == 0


def test_buffers_that_are_none_or_uninitialised_are_left_alone() -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    parts = {"a": norm, "b": nn.Linear(2, 2), "unused": nn.LazyBatchNorm1d()}
    wrapper = DummyLossWrapper(nn.ModuleDict(parts), {"a": "a", "b": "b"})
    assert_gradients_unchanged(wrapper, lambda _: norm(torch.randn(4, 3)).square().mean(), "a")
    assert norm.running_mean is None


def test_a_loss_function_that_returns_no_loss_is_told() -> None:
    with pytest.raises(TypeError, match=r"`loss_fn\(batch\)`"):
        assert_gradients_unchanged(brain().wrapper(), lambda _: (torch.ones(()),), "T1")  # type: ignore[arg-type, return-value]


def test_a_loss_without_a_graph_has_no_gradients_to_compare() -> None:
    assert_gradients_unchanged(brain().wrapper(), lambda _: torch.ones(()), ["T1", "dMRI"])


ONES, SPARSE = torch.ones(2), torch.eye(2).to_sparse()
DENSE = "changed from torch.strided torch.float32 [2] to torch.strided "
DIFFERENCES: list[tuple[Tensor | None, Tensor | None, str]] = [
    (None, None, ""),
    (None, ONES, "has a gradient only with the dummy term"),
    (ONES, None, "has a gradient only without the dummy term"),
    (ONES, ONES.clone(), ""),
    (ONES * torch.nan, ONES * torch.nan, ""),
    (torch.ones(0), torch.ones(0), ""),
    (ONES * 0, ONES * -0.0, "differs by up to 0"),
    (ONES, ONES * 3, "differs by up to 2"),
    (ONES * 1j, ONES * 1j, ""),
    (ONES[:1].expand(2), ONES, ""),
    (ONES, ONES.double(), f"{DENSE}torch.float64 [2]"),
    (ONES, torch.ones(3), f"{DENSE}torch.float32 [3]"),
    (SPARSE, torch.eye(2), "changed from torch.sparse_coo torch.float32 [2, 2] to torch.str"),
    (SPARSE, SPARSE * 2, "differs by up to 1"),
    (SPARSE, SPARSE.clone(), ""),
]


@pytest.mark.parametrize(("one", "other", "text"), DIFFERENCES)
def test_difference(one: Tensor | None, other: Tensor | None, text: str) -> None:
    difference = describe_difference(one, other)
    assert difference.startswith(text)
    assert bool(difference) == bool(text)
