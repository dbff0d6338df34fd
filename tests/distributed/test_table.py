"""The table of engines in the documentation: what each cell says is what happens."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, needs_averages
from tests.distributed.oracle import Schedule, verdict
from tests.fleet import Fleet

PAGE = Path(__file__).parents[2] / "docs/explanation/ranks.md"
HEADER = ["differ, 1e-7", "differ, 0.0", "differ, None", "agree, 1e-7", "agree, 0.0", "agree, None"]
SCALES = (1e-7, 0.0, None)

# What two ranks hold at each step: one modality each; several; nothing on one of them; the same.
DIFFER: Schedule = (
    ((("T1",), ("dMRI",)),),
    ((("rsfMRI",), ("T1", "dMRI")),),
    (((), ("T1", "rsfMRI")),),
    ((("dMRI",), ("dMRI",)),),
)
AGREE: Schedule = tuple(tuple((first, first) for first, _ in step) for step in DIFFER)


def rows() -> dict[str, list[str]]:
    """Engine to what the page says of it."""
    header, *cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|[^-].*\|$", PAGE.read_text().partition("\n## ")[0], re.M)
    ]
    assert header == ["engine", *HEADER]
    return {engine: said for engine, *said in cells}


def check_row(two: Fleet, verdict_of: Callable[..., str], engine: str) -> None:
    """`verdict_of` an engine is what the page says, for each cell of its row."""
    cases = [(scale, schedule) for schedule in (DIFFER, AGREE) for scale in SCALES]
    for said, (scale, schedule) in zip(rows()[engine], cases, strict=True):
        assert two.ask(verdict_of, engine, scale, schedule) == [said] * 2


def verdict_of(rank: int, engine: str, scale: float | None, schedule: Schedule) -> str:
    return verdict(rank, ENGINES[engine], scale, schedule)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=needs_averages if "FSDP2" in engine else ())
        for engine in rows()
        if "ZeRO" not in engine
    ],
)
def test_what_the_page_says_is_what_happens(two: Fleet, engine: str) -> None:
    check_row(two, verdict_of, engine)


def test_no_engine_is_missing() -> None:
    """Variants of a row that a table need not tell apart are tested elsewhere."""
    variants = {
        "DDP, attached",
        "FSDP1, root, wrapped early",
        "FSDP2, root, wrapped early",
        "FSDP2, towers, wrapped early",
    }
    assert rows().keys() >= {e for e in ENGINES if "compiled" not in e} - variants - {
        "DDP, unused, bucket views"
    }
