"""Counts and extremes of a whole history in one pass, and the numbers that a diagnosis goes by."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._diagnose import evidence as _evidence
from modaldummy._diagnose.evidence import Evidence, Tally, Thresholds
from modaldummy._diagnose.history import Row
from modaldummy._diagnose.signals import Column

INF, NAN = math.inf, math.nan


def evidence(*rows: Row, **limits: float) -> Evidence:
    return Evidence(rows, 1e-7, Thresholds.of(limits))


def hits(found: Evidence, name: str) -> tuple[int, int]:
    tally = found.tally(name)
    return tally.hits, tally.seen


# --- tallies ------------------------------------------------------------------------------------

Told = tuple[float, bool, bool]  # value, hit, seen


def naive(rows: list[Told]) -> Tally:
    """Row by row, as it would be counted by hand."""
    tally = Tally()
    for step, (value, hit, seen) in zip(itertools.count(0.0), rows, strict=False):
        if not seen:
            continue
        if hit:
            if not tally.hits:
                tally.first, tally.place = step, tally.seen
            if np.isfinite(value) and value > tally.largest:
                tally.largest, tally.largest_step = value, step
        tally.lead += hit and tally.hits == tally.seen
        tally.hits += hit
        tally.seen += 1
        tally.run = tally.run + 1 if hit else 0
    return tally


def counted(rows: list[Told], size: int, given_seen: bool) -> Tally:
    tally = Tally()
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        value, hit, seen = (np.array(column) for column in zip(*part, strict=True))
        steps = np.arange(start, start + len(part), dtype=float)
        tally.add(steps, value, hit, seen if given_seen else None)
    return tally


values = st.sampled_from([NAN, INF, 0.0, 1.0, 2.0, -3.0])


@given(st.lists(st.tuples(values, st.booleans(), st.booleans())), st.integers(1, 6))
def test_a_tally_counts_as_by_hand(rows: list[Told], size: int) -> None:
    """The first hit, hits at the start and the end, the largest value, wherever chunks end."""
    assert repr(counted(rows, size, True)) == repr(naive(rows))
    told = [(value, hit, not math.isnan(value)) for value, hit, _ in rows]
    assert repr(counted(rows, size, False)) == repr(naive(told))


def test_the_first_of_equal_values_is_the_largest() -> None:
    steps: Column = np.arange(3.0)
    tally = Tally()
    for _ in range(2):
        tally.add(steps, np.array([1.0, 5.0, 5.0]), np.ones(3, bool))
        steps = steps + 3
    assert (tally.largest, tally.largest_step) == (5.0, 1.0)


def test_the_share_of_hits() -> None:
    assert Tally().share == 0
    assert Tally(seen=4, hits=3).share == 0.75


# --- what is counted ----------------------------------------------------------------------------

LABELS = {"grad/[T1]/a": 1.0, "grad/[inactive]/b": 1e-7}
CONSTANT = {"grad/T1/a": 1.0, "grad/dMRI/b": 1e-7, "grad_norm/T1": 1.0, "grad_norm/dMRI": 1e-7}
CONSTANT |= {"active/T1": 1.0, "active/dMRI": 0.0}
GONE = {"grad/dMRI/b": NAN, "grad_norm/dMRI": NAN, "grad_missing/dMRI": 1.0}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "loss broken"),
        ("modaldummy/uncapped", "report/uncapped broken"),
        ("grad/[T1]/a", "real_norm broken"),
    ],
)
def test_values_that_are_not_finite(key: str, name: str) -> None:
    found = evidence({key: 1.0}, {}, {key: NAN}, {key: 2.0}, {key: INF})
    assert hits(found, name) == (2, 4)
    assert (found.tally(name).first, found.tally(name).place) == (3, 1)


def test_fractions() -> None:
    """Those at the bound are not above it; those that are no numbers do not count."""
    shares = (0.0, 1e-5, 1e-4 * (1 + 5e-7), 1e-3, 2e-4, INF, NAN)
    found = evidence(*({"modaldummy/fraction": share} for share in shares))
    assert hits(found, "fraction") == (4, 5)
    assert hits(found, "fraction above") == (2, 5)
    assert found.tally("fraction above").largest == 1e-3
    assert found.tally("fraction above").largest_step == 4
    assert hits(evidence({"modaldummy/fraction": 0.1}, fraction=0.2), "fraction above") == (0, 1)


@pytest.mark.parametrize(
    ("row", "missing", "zero"),
    [
        (LABELS, (0, 1), (0, 1)),
        (LABELS | {"grad/[inactive]/b": 0.0}, (0, 1), (1, 1)),
        (LABELS | {"grad/[inactive]/b": NAN, "loss": 1.0}, (0, 1), (0, 0)),
        ({"grad/[T1]/a": 1.0, "active/dMRI": 0.0}, (1, 1), (0, 0)),
        ({"grad/[T1]/a": 1.0, "active/dMRI": 0.0, "modaldummy/num_params": 0.0}, (0, 0), (0, 0)),
        ({"grad/[T1]/a": 1.0, "active/dMRI": 0.0, "modaldummy/num_params": 2.0}, (1, 1), (0, 0)),
        ({"grad/a": 1.0, "active/dMRI": 1.0}, (0, 0), (0, 0)),
        ({"loss": 1.0, "active/dMRI": 0.0}, (0, 0), (0, 0)),
        (CONSTANT | {"loss": 1.0}, (0, 1), (0, 1)),
        (CONSTANT | GONE | {"loss": 1.0}, (1, 1), (0, 0)),
        (CONSTANT | GONE | {"loss": NAN}, (1, 1), (0, 0)),
        (CONSTANT | {"grad_norm/dMRI": NAN, "loss": 1.0}, (0, 1), (0, 0)),
        (CONSTANT | {"active/dMRI": 1.0}, (0, 0), (0, 0)),
    ],
    ids=[
        *("labels", "zero", "NaN in a label", "no label", "all frozen", "not all frozen"),
        *("all active", "no gradients", "constant", "constant, none", "loss NaN", "constant, NaN"),
        "all are active",
    ],
)
def test_dummy_gradients(row: Row, missing: tuple[int, int], zero: tuple[int, int]) -> None:
    """Where one is due it is there, zero, or missing, which constant keys say with a number."""
    found = evidence(row)
    assert hits(found, "dummy missing") == missing
    assert hits(found, "dummy zero") == zero


def test_what_batches_held() -> None:
    batches = [(1.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
    found = evidence(*({"active/T1": a, "active/dMRI": b} for a, b in batches), {"loss": 1.0})
    assert hits(found, "held/T1") == (3, 4)
    assert hits(found, "held/dMRI") == (1, 4)
    assert hits(found, "single") == (2, 4)
    assert hits(evidence({"loss": 1.0}), "single") == (0, 0)


def test_a_history_that_says_nothing() -> None:
    found = evidence({"lr": 1.0})
    assert found.tally("loss broken") == found.tally("no such") == Tally()
    assert np.isnan(found.column("loss")).tolist() == [True]
    assert np.isnan(found.column("no such")).tolist() == [True]
    assert evidence().column("loss").shape == evidence().column("no such").shape == (0,)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks_of_any_size_count_the_same(size: int) -> None:
    rows = [
        {
            "loss": NAN if step % 5 == 4 else 1.0,
            **(CONSTANT | GONE if step % 3 else CONSTANT),
            "modaldummy/fraction": step / 1e5,
        }
        for step in range(40)
    ]
    expected = evidence(*rows)
    with patch.object(_evidence, "_CHUNK", size):
        found = evidence(*rows)
    assert found._tallies == expected._tallies
    assert hits(found, "dummy missing")[0] > 0


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
    """Of 200,000 rows a few thousand are there at a time, and 20,000 at most are remembered."""

    def rows() -> Iterator[Row]:
        for step in range(200_000):
            yield Live(step=step, loss=1.0 + step % 2)

    found = Evidence(rows(), 1e-7, Thresholds())
    assert Live.most < 10_000
    assert Live.number == 0
    assert found.tally("loss broken").seen == found.signals.num_rows == 200_000
    assert {len(column) for column in found.sample.values()} == {len(found.sample["step"])}
    assert 5_000 < len(found.sample["step"]) <= 20_000
    assert 0.45 < (found.sample["loss"] == 2).mean() < 0.55


def test_an_endless_history_is_read_as_far_as_it_goes() -> None:
    """One pass: a generator is as good as a list."""
    rows = ({"loss": 1.0} for _ in itertools.repeat(None, 10))
    assert Evidence(rows, None, Thresholds()).signals.num_rows == 10


# --- thresholds ---------------------------------------------------------------------------------


def test_thresholds_that_are_given_replace_the_usual_ones() -> None:
    assert Thresholds.of({}) == Thresholds()
    assert Thresholds.of({"ratio": 5, "early": 2}) == Thresholds(ratio=5, early=2)


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((0, "0 (int)"), (-1.0, "-1.0 (float)"), (NAN, "nan (float)"), (INF, "inf (float)")),
        *((True, "True (bool)"), ("0.5", "'0.5'"), (None, "None (NoneType)"), ([1], "[1] (list)")),
    ],
)
def test_a_threshold_is_a_finite_number_above_0(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match="finite") as error:
        Thresholds.of({name: value})
    assert str(error.value) == f"`{name}` must be a finite number above 0, got {words}."


def test_a_threshold_may_be_a_number_of_numpy() -> None:
    assert Thresholds.of({"ratio": np.float32(0.5), "early": np.int64(3)}).ratio == 0.5


def test_an_unknown_threshold() -> None:
    """The error names one that looks like it, and all that there are."""
    with pytest.raises(TypeError, match=r"no threshold 'ratios'; did you mean 'ratio'\?") as error:
        Thresholds.of({"ratios": 1.0})
    assert all(repr(field.name) in str(error.value) for field in fields(Thresholds))
    with pytest.raises(TypeError, match=r"no threshold 'zzz'\. There are: \['early', "):
        Thresholds.of({"zzz": 1.0})
