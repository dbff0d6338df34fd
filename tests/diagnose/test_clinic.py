"""Diagnoses of runs that were really trained: sick ones are named, healthy ones left alone."""

import re
from pathlib import Path

import pytest

import modaldummy
from modaldummy import diagnose
from tests.diagnose.clinic_healthy import HEALTHY
from tests.diagnose.clinic_sick import SICK

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_run(name: str) -> None:
    history, options = HEALTHY[name]()
    assert [str(finding) for finding in diagnose(history, **options)] == []


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_named(name: str) -> None:
    """By exactly these codes, each with evidence and a remedy."""
    codes, build = SICK[name]
    history, options = build()
    findings = diagnose(history, **options)
    assert {finding.code for finding in findings} == codes
    for finding in findings:
        assert finding.message.endswith(".")
        assert not finding.message[0].islower()
        assert finding.evidence
        assert finding.remedy.endswith(".")


def test_every_code_has_a_sick_run() -> None:
    sources = Path(modaldummy.__file__).parent.glob("_diagnose/check_*.py")
    codes = set(re.findall(r"\bMD2\d\d\b", "".join(path.read_text() for path in sources)))
    assert codes == set().union(*(codes for codes, _ in SICK.values()))
    assert len(codes) >= 15
    assert len(HEALTHY) >= 20
    assert len(SICK) >= 20
