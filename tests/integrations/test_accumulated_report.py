"""The report of a step that accumulates several batches."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from modaldummy import DummyLossWrapper
from modaldummy.integrations.accumulated_report import WeightedReport, accumulated_report

Batch = tuple[float, list[str]]  # its loss and its modalities


def wrapper() -> DummyLossWrapper:
    """T1, rsfMRI and dMRI with 10, 12 and 14 elements, and 3 elements of T1 and dMRI together."""
    torch.manual_seed(0)
    sizes = {"T1": 4, "rsfMRI": 5, "dMRI": 6}
    towers = {name: nn.Linear(size, 2) for name, size in sizes.items()}
    model = nn.ModuleDict(towers | {"fusion": nn.Linear(3, 1, bias=False)})
    return DummyLossWrapper(model, {n: n for n in sizes} | {("T1", "dMRI"): "fusion"}, 1e-5)


def weighted(wrapper: DummyLossWrapper, batches: Sequence[Batch]) -> list[WeightedReport]:
    """The reports of batches that are a quarter of a step each."""
    found = []
    for loss, names in batches:
        wrapper.total(torch.tensor(loss), names)
        assert wrapper.last is not None
        found.append(WeightedReport(wrapper.last, 0.25))
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_losses_are_weighted_sums_and_the_fraction_is_the_largest(order: int) -> None:
    own = wrapper()
    reports = weighted(own, [(8.0, ["T1"]), (-4.0, ["T1", "dMRI"])])
    first, second = (batch.report for batch in reports)
    row = accumulated_report(own, reports[::order])
    assert row["modaldummy/real"] == 1
    for name in ("dummy", "uncapped"):
        expected = 0.25 * (getattr(first, name) + getattr(second, name)).item()
        assert row[f"modaldummy/{name}"] == pytest.approx(expected)
    assert first.fraction != second.fraction
    assert row["modaldummy/fraction"] == max(first.fraction, second.fraction)
    assert row.keys() == first.as_dict().keys()


@pytest.mark.parametrize(
    ("batches", "inactive", "num_params", "num_elements"),
    [
        ([["T1"], ["T1"]], ["rsfMRI", "dMRI"], 5, 29),
        ([["T1"], ["dMRI"]], ["rsfMRI"], 3, 15),  # never together, so the fusion is inactive
        ([["T1"], ["T1", "dMRI"]], ["rsfMRI"], 2, 12),
        ([["T1", "rsfMRI"], ["T1", "dMRI"]], [], 0, 0),
    ],
)
def test_a_key_is_inactive_if_no_batch_makes_it_active(
    batches: list[list[str]], inactive: list[str], num_params: int, num_elements: int
) -> None:
    own = wrapper()
    row = accumulated_report(own, weighted(own, [(1.0, names) for names in batches]))
    assert [n for n in own.modalities if not row[f"modaldummy/active/{n}"]] == inactive
    assert row["modaldummy/num_params"] == num_params
    assert row["modaldummy/num_elements"] == num_elements


@pytest.mark.parametrize("order", [1, -1])
def test_a_loss_of_nan_shows_in_the_sum_and_in_the_fraction(order: int) -> None:
    own = wrapper()
    row = accumulated_report(own, weighted(own, [(math.nan, ["T1"]), (1.0, ["T1"])])[::order])
    assert math.isnan(row["modaldummy/real"])
    assert math.isnan(row["modaldummy/fraction"])
