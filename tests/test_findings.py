"""How findings read, and in which order they come."""

from modaldummy import Finding
from modaldummy._findings import by_severity


def test_a_finding_reads_as_a_sentence_its_evidence_and_its_remedy() -> None:
    evidence = {
        "step": 3.0,
        "size": 0.123456,
        "few": ["a", 0.333333],
        "many": [*range(9)],
        "rates": {"T1": 0.987654, "dMRI": 1.0, "PET": 2, "CT": 3},
    }
    assert str(Finding("MD1", "error", "It is wrong.", evidence, "Mend it.")) == (
        "MD1 error: It is wrong.\n"
        "  evidence: step=3, size=0.1235, few=[a, 0.3333], many=[0, 1, 2, and 6 more], "
        "rates={T1: 0.9877, dMRI: 1, PET: 2, and 1 more}\n"
        "  remedy: Mend it."
    )
    assert str(Finding("MD2", "info", "It is so.")) == "MD2 info: It is so."


def test_errors_come_before_warnings_and_these_before_information() -> None:
    kinds = [("MD3", "info"), ("MD2", "warning"), ("MD9", "error"), ("MD1", "warning")]
    findings = [Finding(code, severity, "") for code, severity in kinds]  # type: ignore[arg-type]
    assert [finding.code for finding in by_severity(findings)] == ["MD9", "MD1", "MD2", "MD3"]
