"""The page of what is found where is about the trainings that there are."""

import re

import pytest

from tests import preflight_cases
from tests.clinic_healthy import HEALTHY
from tests.clinic_sick import SICK
from tests.confusion import PAGE, Result, _counts, _table, _words

PARTS = PAGE.read_text().split("\n## ")[1:]


@pytest.mark.parametrize(
    ("part", "sick", "healthy"),
    [(PARTS[0], SICK, HEALTHY), (PARTS[1], preflight_cases.SICK, preflight_cases.HEALTHY)],
    ids=["diagnose", "preflight"],
)
def test_the_page_lists_the_trainings_that_there_are(part: str, sick: dict, healthy: dict) -> None:  # type: ignore[type-arg]
    """Or else `make confusion` has to be run again."""
    assert healthy.keys().isdisjoint(sick)
    rows = dict(re.findall(r"^\| ([^|]+) \| (nothing|MD[^|]*) \|", part, re.M))
    expected = {name: _words(codes) for name, (codes, _) in sick.items()}
    assert rows == expected | dict.fromkeys(healthy, "nothing")
    found = dict(re.findall(r"^\| ([^|]+) \| nothing \| ([^|]*) \|", part, re.M))
    assert found == dict.fromkeys(healthy, "nothing")
    counts = re.findall(r"^\| (MD\d+) \| (\d+) \| (\d+) \|", part, re.M)
    few = {code for code, there, seen in counts if int(seen) < 0.75 * int(there)}
    assert few <= {"MD205"}
    codes = re.findall(r"^\| (MD\d+) \|", part, re.M)
    assert set(codes) >= set().union(*(codes for codes, _ in sick.values()))


def test_a_table_counts_what_is_missed_and_what_is_not_there() -> None:
    results = [
        Result("well", set(), [set(), {"MD2"}]),
        Result("ill", {"MD1"}, [{"MD1", "MD2"}, set()]),
    ]
    assert list(_table(results))[2:] == [
        "| MD1 | 2 | 1 | 1 | 0 | 0 |\n",
        "| MD2 | 0 | 0 | 0 | 1 | 1 |\n",
        "\n| training | should be found | found |\n|---|---|---|\n",
        "| ill | MD1 | MD1 (1 of 2), MD2 (1 of 2) |\n",
        "| well | nothing | MD2 (1 of 2) |\n",
    ]
    assert _counts([{"MD1"}, {"MD1"}]) == "MD1"
