"""The promises, over random models, maps, batches, losses and scales."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaldummy.testing import batches, scales
from tests.asserts import assert_bounded, assert_connected, assert_same_bits, last_report
from tests.oracles import naive_dummy, naive_magnitude
from tests.strategies import FLOATS, active_sets, cases, modalities
from tests.zoo import ZOO, Case

FACTORS = st.sampled_from([1.0, -1.0, 1e-3, 1e-30, 1e-40, 0.0, 1e4, 1e30, math.inf, math.nan])


@given(data=st.data(), case=cases(), scale=scales(), dtype=st.sampled_from(FLOATS))
def test_every_inactive_parameter_gets_a_gradient(
    data: st.DataObject, case: Case, scale: float, dtype: torch.dtype
) -> None:
    """(a) Not None and nowhere zero, after division by 4,096 too, whatever form the batch has."""
    active = data.draw(active_sets(case))
    batch = data.draw(batches(case.wrapper().modalities, active))
    divisor = data.draw(st.sampled_from([1, 4096]))
    total = case.wrapper(scale).total(case.real(active, dtype), batch)
    if total.requires_grad:
        (total / divisor).backward()
    assert_connected(case.inactive(active))


@given(data=st.data(), case=cases(), scale=scales(), factor=FACTORS, dtype=st.sampled_from(FLOATS))
def test_the_dummy_stays_below_its_fraction_of_the_loss(
    data: st.DataObject, case: Case, scale: float, factor: float, dtype: torch.dtype
) -> None:
    """(b) |dummy| <= 1e-4 |real| at any loss: tiny, zero, negative, huge, infinite, NaN."""
    active = data.draw(active_sets(case))
    real = case.real(active, dtype).detach() * factor
    wrapper = case.wrapper(scale)
    total = wrapper.total(real, active).detach()
    assert_bounded(last_report(wrapper))
    assert total.dtype == real.dtype
    assert total.isfinite() == real.isfinite()
    if real.isfinite():
        # The total is real + dummy rounded once, so half a unit in the last place may be added.
        rounding = torch.finfo(dtype).eps * abs(real.item()) + torch.finfo(dtype).tiny
        assert abs(total.item() - real.item()) <= 1e-4 * abs(real.item()) + rounding


@given(
    data=st.data(),
    case=cases(),
    scale=scales(),
    dtype=st.sampled_from(FLOATS),
    shape=st.sampled_from([(), (1,), (2, 3)]),
    factor=st.sampled_from([1.0, 1024.0, 1 / 4096]),
)
def test_other_gradients_stay_bit_for_bit(
    data: st.DataObject,
    case: Case,
    scale: float,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor: float,
) -> None:
    """(c) Whoever is not inactive has the gradient that the real loss alone gives."""
    active = data.draw(active_sets(case))
    twin = copy.deepcopy(case)
    real, twin_real = (stage.real(active, dtype).expand(shape) for stage in (case, twin))
    total = case.wrapper(scale).total(real, active)
    for loss in (total, twin_real):
        if loss.requires_grad:
            (loss.mean() * factor).backward()
    inactive = case.inactive(active)
    expected = dict(twin.model.named_parameters())
    for name, parameter in case.model.named_parameters():
        if name not in inactive:
            assert_same_bits(parameter.grad, expected[name].grad, name)


@given(case=cases(), scale=scales() | st.sampled_from([0.0, None]))
def test_with_nothing_inactive_the_total_is_the_real_loss(case: Case, scale: float | None) -> None:
    """(d) The same object, so that not a bit of it or of its graph can differ."""
    everything = modalities(case)
    real = case.real(everything)
    wrapper = case.wrapper(scale)
    assert wrapper.total(real, everything) is real
    report = last_report(wrapper)
    assert (report.inactive, report.num_params, report.fraction) == ((), 0, 0)


@given(data=st.data(), case=cases(), scale=st.sampled_from([1e-7, 1e-3, 1.0]))
def test_value_and_gradient_agree_with_the_naive_line(
    data: st.DataObject, case: Case, scale: float
) -> None:
    """(e) Before the cap, within float32 rounding of the sum and of the gradient's dtype."""
    active = data.draw(active_sets(case))
    wrapper = case.wrapper(scale)
    dummy = wrapper.dummy(active)
    inactive = case.inactive(active)
    expected = naive_dummy(inactive.values(), scale).item()
    tolerance = 1e-5 * naive_magnitude(inactive.values(), scale)
    assert dummy.item() == pytest.approx(expected, rel=0, abs=tolerance)
    assert last_report(wrapper).num_elements == sum(p.numel() for p in inactive.values())
    if inactive:
        dummy.backward()
    for name, parameter in inactive.items():
        assert parameter.grad is not None, name
        # What the naive line hands to float16, 1e-7, is not a normal number there.
        assert torch.equal(parameter.grad, torch.full_like(parameter, scale)), name


# Torch warns of every gradient that accumulates in an empty tensor whose strides hold a zero.
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@given(data=st.data(), case=cases(), scale=st.sampled_from([1e-7, 0.25]))
def test_accumulated_gradients_are_the_sum_of_their_steps(
    data: st.DataObject, case: Case, scale: float
) -> None:
    """Several backward passes with changing active sets: no gradient leaks into another."""
    steps = data.draw(st.lists(active_sets(case), min_size=2, max_size=3))
    start = copy.deepcopy(case)
    expected: dict[str, torch.Tensor] = {}
    for active in steps:
        alone = copy.deepcopy(start)
        for stage in (case, alone):
            total = stage.wrapper(scale).total(stage.real(active), active)
            if total.requires_grad:
                total.backward()
        for name, parameter in alone.model.named_parameters():
            if parameter.grad is not None:
                earlier = expected.get(name)
                gradient = parameter.grad
                expected[name] = gradient if earlier is None else earlier + gradient
    for name, parameter in case.model.named_parameters():
        assert_same_bits(parameter.grad, expected.get(name), name)


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO.keys())
@pytest.mark.parametrize("divisor", [1, 4096])
def test_the_promises_hold_in_the_zoo(make: Callable[[], Case], divisor: int) -> None:
    """All three promises, for every active set of every awkward model."""
    names = sorted(modalities(make()))
    for bits in range(2 ** len(names)):
        case = make()
        active = {name for index, name in enumerate(names) if bits >> index & 1}
        twin = copy.deepcopy(case)
        wrapper = case.wrapper()
        (wrapper.total(case.real(active), active) / divisor).backward()
        (twin.real(active) / divisor).backward()
        inactive = case.inactive(active)
        assert_connected(inactive)
        assert_bounded(last_report(wrapper))
        expected = dict(twin.model.named_parameters())
        for name, parameter in case.model.named_parameters():
            if name not in inactive:
                assert_same_bits(parameter.grad, expected[name].grad, name)
