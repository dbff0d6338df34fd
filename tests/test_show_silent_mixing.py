"""What is shown of wrong gradients is what happens between two ranks."""

from typing import Any

import pytest

from fleet import Fleet
from mixing import CHECKED, ENGINES, TOTAL, WAYS, WITHOUT
from show_silent_mixing import FINISHED, cell, measure, print_table
from tests.distributed.engines import needs_averages

# Of a dummy of 1e-7 and of rounding.
SMALL = 1e-6


def rows_of(two: Fleet, engine: str) -> dict[str, dict[str, Any]]:
    """By way, of the case in which all that is mixed up fits."""
    rows = measure(two, engine, ["one shape"], ["one each"])
    assert [row["way"] for row in rows] == list(WAYS)
    return {row["way"]: row for row in rows}


def assert_right(row: dict[str, Any]) -> None:
    assert row["ending"] == FINISHED
    assert row["error"] < SMALL < 0.1 < row["largest_gradient"]


def assert_wrong(row: dict[str, Any]) -> None:
    assert row["ending"] == FINISHED
    assert row["error"] > 0.1 * row["largest_gradient"] > 0.01


def test_ddp_stops_without_a_dummy_and_is_right_with_one(two: Fleet) -> None:
    rows = rows_of(two, "DDP")
    assert rows[WITHOUT]["ending"].startswith("stops: Expected to have finished reduction")
    assert_right(rows[TOTAL])
    assert_right(rows[CHECKED])


@needs_averages
def test_fsdp2_for_the_whole_is_right_with_a_dummy_alone(two: Fleet) -> None:
    rows = rows_of(two, "FSDP2, the whole")
    assert_wrong(rows[WITHOUT])
    assert_right(rows[TOTAL])
    assert_right(rows[CHECKED])


@pytest.mark.parametrize("engine", ["FSDP2, towers one by one", "FSDP2, the whole, resharding"])
def test_what_a_dummy_cannot_mend_is_refused(two: Fleet, engine: str) -> None:
    rows = rows_of(two, engine)
    assert_wrong(rows[WITHOUT])
    assert_wrong(rows[TOTAL])
    assert rows[CHECKED]["ending"] == "refused: RankDisagreementError"


def row(way: str, ending: str, error: float | None = None) -> dict[str, Any]:
    surroundings = {"engine": "DDP", "device": "a CPU", "ranks": 2, "torch": "2.13.0"}
    return surroundings | {"way": way, "ending": ending, "error": error, "largest_gradient": 2.0}


def test_a_cell_is_the_worst_of_its_cases() -> None:
    """NaN is worse than any number, and nothing is left out."""
    finished = [row(TOTAL, FINISHED, error) for error in (0.5, 0.25)]
    assert cell(finished) == "0.5 / 2"
    assert cell([*finished, row(TOTAL, FINISHED, float("nan"))]) == "nan / 2"
    ended = [row(TOTAL, "hangs"), row(TOTAL, "process ended"), row(TOTAL, "hangs")]
    assert cell([*finished, *ended]) == "0.5 / 2; in 2 of 5 hangs; in 1 of 5 process ended"
    assert cell(ended[:1]) == "hangs"


def test_the_table_has_a_line_for_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(way, "hangs") for way in WAYS]
    print_table([*rows, *({**own, "engine": "ZeRO-1"} for own in rows)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a CPU, 2 gloo ranks, torch 2.13.0"
    assert [line.partition(" ")[0] for line in printed[3:]] == ["DDP", "ZeRO-1"]
    assert {"DDP", "ZeRO-1"} < ENGINES.keys()
