"""Findings about a run out of what it logged."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from modaldummy._diagnose import check_gradients as gradients
from modaldummy._diagnose import check_loss as loss
from modaldummy._diagnose.evidence import Evidence, Outcome, Sign, Thresholds
from modaldummy._diagnose.history import HistoryFile, Row
from modaldummy._diagnose.signals import MOST
from modaldummy._errors import HistoryError, describe
from modaldummy._findings import Finding, by_severity
from modaldummy._numbers import check_number_or_none

CHECKS: dict[str, Callable[[Evidence], Outcome]] = {
    "loss is finite": loss.finite,
    "loss falls": loss.decreasing,
    "loss is steady": loss.steady,
    "inactive parameters are finite": loss.uncapped,
    "real gradients are finite": gradients.real,
    "real gradients are there": gradients.reached,
    "dummy gradients are there": gradients.there,
    "dummy gradients have their size": gradients.sized,
    "dummy is small beside the loss": gradients.small,
    "real gradients outweigh dummy ones": gradients.ratio,
    "every modality occurs": gradients.occurring,
    "batches mix modalities": gradients.mixed,
}
# What comes of what: named with its cause, unless it was there before.
_FOLLOWS = {
    "MD203": ("MD201", "MD202"),
    "MD211": ("MD201", "MD202", "MD221"),
    "MD221": ("MD201", "MD202"),
    "MD224": ("MD214", "MD216"),
}


@dataclass(frozen=True)
class Diagnosis:
    """All that the checks said about a history.

    Attributes:
        findings: Errors first.
        signs: Check to what it saw, of those that found nothing wrong.
        unchecked: Check to what it would have needed.
        notes: About the file.
        evidence: What the checks went by.
    """

    findings: list[Finding]
    signs: dict[str, Sign]
    unchecked: dict[str, str]
    notes: list[str]
    evidence: Evidence

    @property
    def is_healthy(self) -> bool:
        """Whether nothing worse than `info` was found."""
        return all(finding.severity == "info" for finding in self.findings)


def diagnose(
    history: Iterable[Row] | str | PathLike[str],
    *,
    scale: float | None = 1e-7,
    **thresholds: float,
) -> list[Finding]:
    """What logged metrics say is wrong with a run.

    The metrics are those of ``gradient_norms(wrapper)`` and ``wrapper.last.as_dict()`` with a
    ``loss``, as they are or behind ``train/``; what is not logged is not checked. NaN says that a
    number is not finite, None or a missing key that there is none. Memory is bounded: counts and
    extremes are those of all rows; medians, of more than 20,000, those of 10,000 or more drawn at
    random.

    >>> rows = [{"step": step, "loss": 2.0} for step in range(50)]
    >>> [finding.code for finding in diagnose(rows)]
    ['MD204']

    Args:
        history: Rows of metrics, by step; or the path of a file: one JSON object a line, CSV, also
            as Weights & Biases exports it, a JSON list, or ``trainer_state.json`` of Hugging Face.
        scale: That of the wrapper.
        **thresholds: Numbers to go by in place of those in the reference, such as ``unrest=3.0``.

    Returns:
        Findings, errors first; those of severity ``info`` are no cause for concern. One that
        another brings with it is left out, and named in the evidence of that one.

    Raises:
        OSError: The file cannot be opened.
        HistoryError: A line of it cannot be read, there are no rows, or none says anything.
        TypeError: ``history`` is neither rows nor a path, or a row is not a mapping. ``scale`` or a
            threshold is not a number, or there is no threshold of that name.
        ValueError: ``scale`` is negative or not finite, or a threshold is not finite and above 0.
    """
    return examine(history, scale=scale, thresholds=thresholds).findings


def examine(
    history: Iterable[Row] | str | PathLike[str],
    *,
    scale: float | None = 1e-7,
    thresholds: dict[str, Any] | None = None,
) -> Diagnosis:
    """As `diagnose`, with what was healthy and what could not be checked."""
    scale = check_number_or_none("scale", scale)
    if isinstance(history, (str, PathLike)):
        history = HistoryFile(history)
    if not isinstance(history, Iterable):
        raise TypeError(f"`history` must be rows or a path, got {describe(history)}.")
    evidence = Evidence(history, scale, Thresholds.of(thresholds or {}))
    notes = list(getattr(history, "notes", []))
    if evidence.signals.is_cut:
        notes.append(f"More than {MOST} quantities of modalities; those beyond are left out.")
    if not evidence.signals.num_rows:
        raise HistoryError("The history has no rows; log at least one step.")
    with np.errstate(all="ignore"):
        outcomes = {name: check(evidence) for name, check in CHECKS.items()}
    if all(isinstance(outcome, str) for outcome in outcomes.values()):
        keys = list(evidence.signals.ignored)[:10]
        raise HistoryError(
            f"Nothing in the history has a meaning here; its keys are {keys}. Log a "
            "`loss`, `wrapper.last.as_dict()` and `gradient_norms(wrapper)`."
        )
    findings = [outcome for outcome in outcomes.values() if isinstance(outcome, Finding)]
    return Diagnosis(
        findings=_causes(by_severity(findings)),
        signs={name: o for name, o in outcomes.items() if isinstance(o, Sign)},
        unchecked={name: o for name, o in outcomes.items() if isinstance(o, str)},
        notes=notes,
        evidence=evidence,
    )


def _causes(findings: list[Finding]) -> list[Finding]:
    """Findings without those that follow from others, which these then name."""
    starts = {f.code: float(f.evidence.get("first_step", math.inf)) for f in findings}
    cause_of = {
        code: cause
        for code, start in starts.items()
        for cause in reversed(_FOLLOWS.get(code, ()))  # of several, the first
        if cause in starts and starts[cause] <= start
    }
    kept = {finding.code: finding for finding in findings if finding.code not in cause_of}
    for code in kept.keys() & cause_of.values():
        followers = [other for other, cause in cause_of.items() if cause == code]
        kept[code] = replace(kept[code], evidence={**kept[code].evidence, "followed_by": followers})
    return list(kept.values())
