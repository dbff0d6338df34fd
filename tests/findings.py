"""What preflight finds, in a form for asserts."""

from typing import Any

from modaldummy import DummyLossWrapper, preflight


def codes(*arguments: Any, **options: Any) -> set[str]:
    """What preflight finds."""
    return {finding.code for finding in preflight(*arguments, **options)}


def evidence(wrapper: DummyLossWrapper, code: str, **arguments: Any) -> Any:
    """That of the one finding there is, which must have the code."""
    (finding,) = preflight(wrapper, **arguments)
    assert finding.code == code
    return finding.evidence
