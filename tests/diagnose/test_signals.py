"""What keys and values of logged metrics mean, in any format, and which rows are kept."""

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._diagnose.history import HistoryFile, Row
from modaldummy._diagnose.keys import role_of
from modaldummy._diagnose.signals import Columns, Signals

INF, NAN = math.inf, math.nan


def read(*rows: Row) -> Columns:
    return Signals().add(rows)


def told(columns: Columns) -> dict[str, float]:
    """What the first row says."""
    return {name: float(values[0]) for name, values in columns.items() if not np.isnan(values[0])}


def assert_same(found: Columns, expected: Columns) -> None:
    """Quantities that nothing is said about may be left out."""
    for name in found.keys() | expected.keys():
        size = len(expected["step"])
        nothing = np.full(size, NAN)
        np.testing.assert_array_equal(found.get(name, nothing), expected.get(name, nothing), name)


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "train/", "brave-sun-12 - ", "a/b - c - ", "x - train/"])
@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("loss", ("loss", "loss")),
        ("train_loss", ("loss", "train_loss")),
        ("step", ("step", "")),
        ("_step", ("step", "")),
        ("global_step", ("step", "")),
        ("Step", ("step", "")),
        ("modaldummy/real", ("report", "real")),
        ("modaldummy/num_elements", ("report", "num_elements")),
        ("modaldummy/active/T1", ("present", "T1")),
        ("active/T1", ("active", "T1")),
        ("grad_ratio", ("grad", "ratio")),
        ("grad_ranks", ("grad", "ranks")),
        ("grad_norm/T1", ("norm", "T1")),
        ("grad_norm/T1-dMRI", ("norm", "T1-dMRI")),
        ("grad_norm/site/T1", ("norm", "site/T1")),
        ("grad/[T1]/tower.weight", ("label", "T1")),
        ("grad/[inactive]/tower.weight", ("label", "inactive")),
        ("grad/tower.weight", ("whole", "")),
        ("grad/T1/tower.weight", ("constant", "T1")),
        ("grad_missing/T1", ("missing", "T1")),
        ("grad_norm", ("overall", "")),
    ],
)
def test_a_key_means_the_same_behind_what_loggers_put_before_it(
    key: str, role: tuple[str, str], before: str
) -> None:
    assert role_of(before + key) == role


@pytest.mark.parametrize(
    "key",
    [
        *("lr", "eval_loss", "eval/loss", "val/loss", "loss/ce", "losses", "my_step", "eval/step"),
        *("grad/norm", "train/grad/norm", "grad", "grad/", "grad_norm/", "active", "reactive/T1"),
        *("modaldummy/other", "grad_norms/T1", "", "/", " - "),
        *("run - train/loss__MIN", "run - grad_norm/T1__MAX", "grad/tower.weight__MIN"),
    ],
)
def test_a_key_that_means_nothing_here(key: str) -> None:
    """Among them the losses of evaluations, and extremes beside the values of a panel."""
    assert role_of(key) == ("", "")


def test_unknown_keys_are_ignored_and_remembered() -> None:
    """In the order in which they came, up to a hundred."""
    signals = Signals()
    signals.add([{"lr": 1.0, "loss": 1.0}, {"eval/loss": 5.0, "lr": "high", 7: 1.0}])  # type: ignore[dict-item]
    assert list(signals.ignored) == ["lr", "eval/loss", "7"]
    signals.add([{f"x{index}": 1.0 for index in range(200)}])
    assert len(signals.ignored) == 100


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ({"train_loss": 1.0, "total_loss": 2.0, "training_loss": 3.0, "loss": 4.0}, 4.0),
        ({"modaldummy/real": 1.0, "train_loss": 2.0, "total_loss": 3.0}, 3.0),
        ({"modaldummy/real": 1.0, "train_loss": 2.0}, 2.0),
        ({"modaldummy/real": 1.0}, 1.0),
    ],
)
def test_the_loss_is_the_first_key_of_a_list(row: Row, loss: float) -> None:
    assert told(read(row))["loss"] == loss


def test_the_loss_stays_the_same_key() -> None:
    """Hugging Face's Trainer writes `train_loss`, a mean of all, below the losses."""
    signals = Signals()
    assert told(signals.add([{"loss": 3.0}]))["loss"] == 3
    assert "loss" not in told(signals.add([{"train_loss": 1.0}]))


def test_two_keys_of_one_meaning_complete_each_other() -> None:
    """The first that says something counts."""
    assert read({"loss": 1.0}, {"train/loss": 2.0}, {"loss": 3.0, "train/loss": 4.0})[
        "loss"
    ].tolist() == [1, 2, 3]


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([10, 20, 30], [10, 20, 30]),
        ([None, None, None], [1, 2, 3]),
        ([10, None, None, 40, None], [10, 10, 10, 40, 40]),
        ([None, None, 30, None], [1, 2, 30, 30]),
        ([5, 1, None], [5, 1, 1]),
        ([7, NAN, "NaN", "later"], [7, 7, 7, 7]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_row_without_a_step_is_of_the_one_before(
    steps: list[Any], expected: list[float], size: int
) -> None:
    """Rows are numbered from 1 until there is one, wherever a chunk ends."""
    rows = [{"loss": 1.0} | ({} if step is None else {"step": step}) for step in steps]
    signals = Signals()
    for start in range(0, len(rows), size):
        signals.add(rows[start : start + size])
    assert signals.sample()["step"].tolist() == expected


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [1.0, "text"], ids=["number", "text"])
@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((1.5, 1.5), ("1.5", 1.5), ("1e-7", 1e-7), (" 2 ", 2), (3, 3), (True, 1), (False, 0)),
        *((np.float32(0.5), 0.5), (np.int8(3), 3), (np.bool_(True), 1), (np.array([4.0]), 4)),
        *((torch.tensor(2.0), 2), (torch.tensor([2.0]), 2), (torch.tensor(3), 3)),
        (torch.tensor(2.0, dtype=torch.bfloat16), 2),
        (torch.tensor(2.0, requires_grad=True), 2),
        *((NAN, INF), ("NaN", INF), ("nan", INF), (np.float32("nan"), INF)),
        *((torch.tensor(NAN), INF), (torch.tensor([NAN]), INF)),
        *((INF, INF), (-INF, INF), ("Infinity", INF), ("-Infinity", INF), ("inf", INF)),
        *((10**400, INF), ("1e400", INF)),
        *((None, NAN), ("", NAN), (" ", NAN), ("high", NAN), ({}, NAN), (1j, NAN), ([1.0], NAN)),
        *((torch.ones(2), NAN), (np.ones(2), NAN), (torch.ones((), device="meta"), NAN)),
    ],
)
def test_values(value: Any, number: float, beside: Any) -> None:
    """What is not finite is infinity, what is no number is absent, whatever is beside it."""
    columns = read({"loss": value}, {"loss": beside}, {})
    np.testing.assert_array_equal(columns["loss"][0], number)
    assert columns["loss"].shape == (3,)
    np.testing.assert_array_equal(read({"loss": value}, {"loss": value})["loss"], [number] * 2)


_VALUES = st.none() | st.floats(0, 1e300) | st.sampled_from([NAN, INF, -INF, 0, 1, 2])
_KEYS = [
    *("loss", "eval/loss", "modaldummy/fraction", "modaldummy/active/T1", "active/dMRI"),
    *("grad_norm/T1", "grad_norm/T1-dMRI", "grad/[T1]/a", "grad/[T1]/b", "grad/[inactive]/c"),
    *("grad/a", "grad/dMRI/c", "grad_ratio"),
]


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    some = st.fixed_dictionaries({}, optional=dict.fromkeys(_KEYS, _VALUES))
    return [{"step": n} | row for n, row in enumerate(draw(st.lists(some, min_size=1)))]


def table(rows: list[dict[str, Any]]) -> str:
    """As CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row), "note"])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def renamed(rows: list[dict[str, Any]], before: str, *ends: str) -> list[dict[str, Any]]:
    return [
        {f"{before}{key}{end}": value for key, value in row.items() for end in ("", *ends)}
        for row in rows
    ]


@given(histories())
def test_the_same_rows_in_any_format(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    """As dicts, JSON of each kind, CSV, and as Weights & Biases exports runs and panels."""
    expected = read(*rows)
    contents = [
        "".join(f"{json.dumps(row)}\n" for row in rows),
        json.dumps(rows),
        json.dumps({"log_history": rows}, indent=2),
        table(rows),
        table(renamed(rows, "train/")),
        table(renamed(rows, "brave-sun-12 - train/", "__MIN", "__MAX")),
    ]
    path = tmp_path_factory.mktemp("formats") / "log"
    for content in contents:
        path.write_text(content, newline="")
        assert_same(read(*HistoryFile(path)), expected)


@given(histories(), st.integers(1, 5))
def test_chunks_of_any_size(rows: list[dict[str, Any]], size: int) -> None:
    """Where the first rows have the keys that there are, the rows mean the same."""
    rows = [dict.fromkeys(_KEYS, 1.0), *rows]
    whole, parts = Signals(), Signals()
    expected = whole.add(rows)
    found = [parts.add(rows[start : start + size]) for start in range(0, len(rows), size)]
    sizes = [len(columns["step"]) for columns in found]
    assert sum(sizes) == parts.num_rows == len(rows)
    for name, values in expected.items():
        pieces = [c.get(name, np.full(n, NAN)) for c, n in zip(found, sizes, strict=True)]
        np.testing.assert_array_equal(np.concatenate(pieces), values, name)
    assert_same(parts.sample(), whole.sample())


# --- the sample ---------------------------------------------------------------------------------


def sampled(number: int, room: int, size: int) -> tuple[Columns, int]:
    """The sample of so many rows whose modalities take turns, and the largest one on the way."""
    signals, largest = Signals(room), 0
    for start in range(0, number, size):
        steps = range(start, min(start + size, number))
        signals.add([{"step": n, "active/T1": n % 2, "late": 1.0} for n in steps])
        largest = max(largest, len(signals.sample()["step"]))
    return signals.sample(), largest


def test_a_history_with_room_is_kept_as_a_whole() -> None:
    assert sampled(1000, 1000, 300)[0]["step"].tolist() == list(range(1000))


@pytest.mark.parametrize("size", [1000, 64])
def test_of_a_longer_history_a_bounded_part_is_kept(size: int) -> None:
    sample, largest = sampled(9001, 1000, size)
    steps = sample["step"]
    assert largest <= 1000
    assert 300 < len(steps) <= 1000
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(sample["held/T1"], steps % 2)


def test_the_part_that_is_kept_is_drawn_at_random_and_always_the_same() -> None:
    """Not every other row: batches that take turns are both in it, and all parts of the run."""
    steps = sampled(9001, 1000, 1000)[0]["step"]
    assert 0.4 < (steps % 2).mean() < 0.6
    assert len(set(np.diff(steps))) > 9
    assert (np.histogram(steps, 9)[0] > len(steps) / 9 / 2).all()
    for size in (1000, 77):
        np.testing.assert_array_equal(sampled(9001, 1000, size)[0]["step"], steps)


def test_what_was_not_said_before_is_absent_in_the_sample() -> None:
    signals = Signals()
    signals.add([{"loss": 1.0}])
    signals.add([{"grad_ranks": 2.0}])
    np.testing.assert_array_equal(signals.sample()["grad/ranks"], [NAN, 2.0])
    np.testing.assert_array_equal(signals.sample()["loss"], [1.0, NAN])
    assert Signals().sample() == {}
