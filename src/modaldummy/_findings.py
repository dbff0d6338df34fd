"""What a check reports, in a form for people and for programs."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modaldummy._errors import first_few

Severity = Literal["error", "warning", "info"]
_ORDER = ("error", "warning", "info")
MAX_LISTED_ITEMS = 3  # of a list or a mapping in the evidence


@dataclass(frozen=True)
class Finding:
    """Something that will go wrong, has gone wrong, or is worth knowing.

    >>> print(Finding("MD201", "error", "The loss is NaN.", {"first_step": 3}, "Look at the data."))
    MD201 error: The loss is NaN.
      evidence: first_step=3
      remedy: Look at the data.

    Attributes:
        code: Stable name such as ``MD101``; each has a section in the reference.
        severity: ``error``: training fails, or its result is wrong. ``warning``: the setting is
            probably a mistake. ``info``: good to know, and nothing has to be done.
        message: What happens or will happen, in one to three sentences.
        evidence: The numbers and names behind the message, all of which JSON can represent.
        remedy: What to do about it; empty if nothing has to be done.
    """

    code: str
    severity: Severity
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def __str__(self) -> str:
        evidence = ", ".join(f"{name}={_short(value)}" for name, value in self.evidence.items())
        lines = [f"{self.code} {self.severity}: {self.message}"]
        lines += [f"  evidence: {evidence}"] if evidence else []
        lines += [f"  remedy: {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then infos; each in the order of codes."""
    return sorted(findings, key=lambda f: (_ORDER.index(f.severity), f.code))


def log_findings(findings: Iterable[Finding], logger: logging.Logger) -> None:
    """Log each finding at the level with the name of its severity."""
    for finding in findings:
        logger.log(logging.getLevelNamesMapping()[finding.severity.upper()], "%s", finding)


def _short(value: object) -> str:
    """A value of the evidence in a few words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        items = (f"{name}: {_short(item)}" for name, item in value.items())
        return f"{{{first_few(items, MAX_LISTED_ITEMS)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{first_few(map(_short, value), MAX_LISTED_ITEMS)}]"
    return str(value)
