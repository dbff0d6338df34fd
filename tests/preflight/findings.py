"""The findings of `preflight`, in a form for asserts."""

from typing import Any

from modaldummy import DummyLossWrapper, preflight


def codes(*arguments: Any, **options: Any) -> set[str]:
    """Codes of all findings."""
    return {finding.code for finding in preflight(*arguments, **options)}


def evidence(wrapper: DummyLossWrapper, code: str, **arguments: Any) -> Any:
    """Evidence of the only finding, which must have this code."""
    (finding,) = preflight(wrapper, **arguments)
    assert finding.code == code
    return finding.evidence
