"""What a diagnosis counts in one pass over all rows, however many there are."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

from modaldummy import diagnose
from modaldummy._diagnose import evidence
from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.history import Row

INF, NAN = math.inf, math.nan
LABELS = {"grad/[T1]/a": 1.0, "grad/[inactive]/b": 1e-7}
UNLABELLED = {"grad/[T1]/a": 1.0, "active/dMRI": 0.0}
CONSTANT = {"grad/T1/a": 1.0, "grad/dMRI/b": 1e-7, "grad_norm/T1": 1.0, "grad_norm/dMRI": 1e-7}
CONSTANT |= {"active/T1": 1.0, "active/dMRI": 0.0}
GONE = {"grad/dMRI/b": NAN, "grad_norm/dMRI": NAN, "grad_missing/dMRI": 1.0}


@pytest.mark.parametrize(
    ("key", "code"),
    [("loss", "MD201"), ("modaldummy/uncapped", "MD203"), ("grad/[T1]/a", "MD221")],
)
def test_values_that_are_not_finite_are_counted(key: str, code: str) -> None:
    """Rows that do not have the key do not count."""
    found = {f.code: f for f in diagnose([{key: 1.0}, {}, {key: NAN}, {key: 2.0}, {key: INF}])}
    counts = found[code].evidence
    assert (counts["first_step"], counts["not_finite"]) == (3, 2)
    assert (counts.get("losses") or counts.get("sums") or counts.get("steps")) == 4
    assert counts.get("losses_before", 1) == 1


def test_fractions_above_the_bound_are_counted() -> None:
    """One at the bound is not above it. One that is not finite does not count."""
    shares = (0.0, 1e-5, 1e-4 * (1 + 5e-7), 1e-3, 2e-4, 1e-3, INF, NAN)
    (finding,) = diagnose([{"modaldummy/fraction": share} for share in shares])
    assert finding.code == "MD222"
    numbers = {"first_step": 4, "largest": 1e-3, "largest_step": 4, "steps_above": 3, "steps": 6}
    assert finding.evidence == numbers


def test_batches_are_counted_by_what_they_contain() -> None:
    batches = [(1.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)] * 5
    signs = examine([{"active/T1": a, "active/dMRI": b} for a, b in batches]).signs
    assert signs["every modality occurs"].numbers == {"T1": 0.75, "dMRI": 0.25}
    assert signs["batches mix modalities"].numbers == {"share": 0.5, "steps": 20}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (LABELS, "healthy"),
        (LABELS | {"grad/[inactive]/b": 0.0}, "MD211"),
        (LABELS | {"grad/[inactive]/b": 0.0, "modaldummy/num_elements": 0.0}, "healthy"),
        (LABELS | {"grad/[inactive]/b": NAN, "loss": 1.0}, "healthy"),
        (UNLABELLED, "MD212"),
        (UNLABELLED | {"modaldummy/num_params": 0.0}, "unchecked"),
        (UNLABELLED | {"modaldummy/num_params": 2.0}, "MD212"),
        ({"grad/tower.a": 1.0, "active/dMRI": 1.0, "loss": 1.0}, "unchecked"),
        ({"loss": 1.0, "active/dMRI": 0.0}, "unchecked"),
        (CONSTANT | {"loss": 1.0}, "healthy"),
        (CONSTANT | GONE | {"loss": 1.0}, "MD212"),
        (CONSTANT | GONE | {"loss": NAN}, "MD212"),
        (CONSTANT | {"grad_norm/dMRI": NAN, "loss": 1.0}, "healthy"),
        (CONSTANT | {"active/dMRI": 1.0}, "unchecked"),
    ],
)
def test_dummy_gradients_that_are_due(row: Row, expected: str) -> None:
    """They are there, zero, or missing, which constant keys say with a number."""
    found, check = examine([row] * 3), "dummy gradients are there"
    codes = {finding.code for finding in found.findings} & {"MD211", "MD212", "MD213"}
    healthy, unchecked = check in found.signs, check in found.unchecked
    assert codes == {expected} - {"healthy", "unchecked"}
    assert (healthy, unchecked) == (expected == "healthy", expected == "unchecked")


@pytest.mark.parametrize("size", [1, 7, 64])
def test_findings_do_not_depend_on_how_many_rows_are_read_at_once(size: int) -> None:
    rows = [
        {"modaldummy/fraction": (40 - step) / 1e5, "loss": NAN if step % 5 == 4 else 1.0}
        | (CONSTANT | GONE if step % 3 else CONSTANT)
        for step in range(40)
    ]
    expected = diagnose(rows)
    assert {finding.code for finding in expected} >= {"MD201", "MD213", "MD222"}
    with patch.object(evidence, "_CHUNK", size):
        assert diagnose(rows) == expected


class Live(dict[str, Any]):
    """Knows how many of its kind there are."""

    number: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        Live.number += 1
        Live.most = max(Live.most, Live.number)

    def __del__(self) -> None:
        Live.number -= 1


def test_a_long_history_takes_bounded_memory() -> None:
    """The rows beyond the sample are counted and not kept. What happened once is still found."""

    def rows() -> Iterator[Row]:
        for step in range(60_000):
            yield Live(step=step, loss=NAN if step == 31_234 else 1.0 + step % 2)

    found = examine(rows())
    assert Live.most < 10_000
    assert Live.number == 0
    assert [(f.code, f.evidence["first_step"]) for f in found.findings] == [("MD202", 31_234)]
    losses = found.evidence.column("loss")
    assert 5_000 < len(losses) <= 20_000
    assert 0.45 < (losses == 2).mean() < 0.55
