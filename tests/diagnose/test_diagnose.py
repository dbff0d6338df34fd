"""The call of a diagnosis: what it takes, refuses and goes by, and what it leaves unchecked."""

import csv
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from modaldummy import Finding, ModalDummyError
from modaldummy._diagnose.diagnose import CHECKS, diagnose, examine
from modaldummy._errors import HistoryError
from tests.diagnose.clinic import Record, Run, plain

NAN = math.nan
FRACTION = "modaldummy/fraction"
Rows = list[dict[str, Any]]


def healthy(number: int = 120, /, **columns: Callable[[int], float]) -> Rows:
    """Rows without a finding, but for the columns that are given."""
    generator = np.random.default_rng(0)
    rows: Rows = []
    for step in range(number):
        a, b = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)][step % 3]
        row = {
            "step": step,
            "loss": 0.5 + 2 * 0.97**step + 0.01 * generator.random(),
            "modaldummy/active/a": a,
            "modaldummy/active/b": b,
            "modaldummy/num_elements": 100.0 * (a + b == 1),
            FRACTION: 1e-6 * (a + b == 1),
        }
        row |= {"grad/w": 1.0} if a and b else {"grad/[a]/w" if a else "grad/[b]/w": 1.0}
        row |= {} if a and b else {"grad/[inactive]/w": 1e-6}
        # Keys stand for themselves; `dummy` and `real` for gradients, where there are any.
        for name, value in columns.items():
            key = {"dummy": "grad/[inactive]/w", "real": "grad/[a]/w"}.get(name, name)
            if key == name or key in row:
                row[key] = value(step)
        rows.append(row)
    return rows


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


# --- rows and files -----------------------------------------------------------------------------


def write_lines(rows: list[Record], path: Path) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_csv(rows: list[Record], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)


def write_wandb(rows: list[Record], path: Path) -> None:
    """As Weights & Biases exports a panel, with extremes beside each value."""
    ends = ("", "__MIN", "__MAX")
    names = {key: [f"run - train/{key}{end}" for end in ends] for row in rows for key in row}
    write_csv([{name: row[key] for key in row for name in names[key]} for row in rows], path)


def write_state(rows: list[Record], path: Path) -> None:
    path.write_text(json.dumps({"log_history": rows}, indent=2))


@functools.cache
def logged(label: bool, lr: float) -> list[Record]:
    return list(plain(Run(40, label=label, lr=lr)))


@pytest.mark.parametrize("write", [write_lines, write_csv, write_wandb, write_state])
@pytest.mark.parametrize(("label", "lr"), [(True, 0.1), (False, 0.0)], ids=["labels", "constant"])
def test_a_file_gives_the_findings_of_its_rows(
    tmp_path: Path, label: bool, lr: float, write: Callable[[list[Record], Path], None]
) -> None:
    """With the same evidence, to the last digit, also behind `train/`."""
    rows = logged(label, lr)
    path = tmp_path / "log"
    write(rows, path)
    expected = diagnose(rows)
    assert ("MD204" in codes(expected)) == (lr == 0)
    assert diagnose(path) == diagnose(str(path)) == expected
    ours, theirs = examine(rows), examine(path)
    assert (ours.signs, ours.unchecked) == (theirs.signs, theirs.unchecked)
    assert ours.notes == theirs.notes == []


@pytest.mark.parametrize("kind", [list, iter, lambda rows: map(MappingProxyType, rows)])
def test_any_iterable_of_mappings_is_a_history(kind: Callable[[Rows], Any]) -> None:
    assert codes(diagnose(kind([{"loss": 2.0}] * 50))) == ["MD204"]


def test_rows_of_evaluations_in_between_change_nothing() -> None:
    rows = healthy()
    between = [row for one in rows for row in (one, {"eval_loss": 9.0, "step": one["step"]})]
    assert examine(between).findings == examine(rows).findings
    assert examine(between).signs == examine(rows).signs


# --- wrong calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (5, "`history` must be rows or a path, got 5 (int)."),
        ({"loss": [1.0]}, "A row of `history` must be a mapping of metrics, got 'loss'."),
        ([{}, 1.0], "A row of `history` must be a mapping of metrics, got 1.0."),
        (b"log", "A row of `history` must be a mapping of metrics, got 108."),
    ],
)
def test_something_else_than_a_history(history: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        diagnose(history)
    assert str(error.value) == message


@pytest.mark.parametrize("content", [None, "[]", '{"log_history": []}', "step,loss\n"])
def test_a_history_without_rows(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "log"
    path.write_text(content or "")
    with pytest.raises(HistoryError, match=r"^The history has no rows; log at least one step\.$"):
        diagnose([] if content is None else path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Our error is a ValueError too; that of the system stays as it is."""
    path = tmp_path / "log"
    path.write_text("")
    for kind in (HistoryError, ModalDummyError, ValueError):
        with pytest.raises(kind, match="log is empty"):
            diagnose(path)
    with pytest.raises(FileNotFoundError):
        diagnose(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1.0}, ValueError, "`scale` must be a finite number >= 0 or None"),
        ({"scale": "1e-7"}, TypeError, "`scale` must be a finite number >= 0 or None"),
        ({"ratio": 0.0}, ValueError, "`ratio` must be a finite number above 0"),
        ({"ratio": None}, TypeError, "`ratio` must be a finite number above 0"),
        ({"ratios": 1.0}, TypeError, "no threshold 'ratios'; did you mean 'ratio'? There are: ["),
        ({"zzz": 1.0}, TypeError, "no threshold 'zzz'. There are: ['early', 'least', "),
    ],
)
def test_arguments_are_checked_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        diagnose(tmp_path / "nothing", **options)


# --- thresholds ---------------------------------------------------------------------------------


NOISE = 10 * np.random.default_rng(1).random(1200)


def spread(low: float, high: float) -> Callable[[int], float]:
    """Numbers between, that neither stay the same nor double."""
    return lambda step: low * (high / low) ** (step * 0.618 % 1)


def test_healthy_rows() -> None:
    assert diagnose(healthy()) == []
    assert examine(healthy()).unchecked.keys() == {"inactive parameters are finite"}


@pytest.mark.parametrize(
    ("rows", "threshold", "usual", "then"),
    [
        (healthy(loss=lambda n: NAN if n > 2 else 1.0), {"early": 2}, ["MD201"], ["MD202"]),
        (healthy(12, loss=lambda n: 1.0), {"least": 10}, [], ["MD204"]),
        (healthy(loss=lambda n: 1 - n / 24_000), {"decrease": 1e-3}, ["MD204"], []),
        (healthy(1200, loss=lambda n: 3 - n / 400 + NOISE[n]), {"unrest": 0.01}, [], ["MD205"]),
        (healthy(dummy=lambda n: 3e-6), {"factor": 4}, ["MD214"], []),
        (healthy(dummy=spread(1e-9, 7e-9)), {"clipped": 1e-4}, ["MD215"], []),
        (healthy(dummy=lambda n: 1e-4 if n % 7 == 1 else 1e-6), {"broken": 0.5}, ["MD216"], []),
        (healthy(real=lambda n: NAN if n % 4 == 3 else 1.0), {"broken": 0.5}, ["MD221"], []),
        (healthy(**{FRACTION: lambda n: 5e-4}), {"fraction": 1e-3}, ["MD222"], []),
        (healthy(**{FRACTION: lambda n: 0.05}), {"large_fraction": 0.1}, ["MD223"], ["MD222"]),
        (healthy(), {"ratio": 1e7}, [], ["MD224"]),
        (healthy(), {"single": 0.5}, [], ["MD226"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_threshold_decides(
    rows: Rows, threshold: dict[str, float], usual: list[str], then: list[str]
) -> None:
    assert codes(diagnose(rows)) == usual
    assert codes(diagnose(rows, **threshold)) == then


# --- what is said -------------------------------------------------------------------------------


def test_errors_come_first() -> None:
    """Each check says something, once."""
    rows = healthy(
        loss=lambda n: 1.0,
        **{"modaldummy/uncapped": lambda n: NAN, "modaldummy/active/b": lambda n: 0.0},
    )
    found = examine(rows, thresholds={"ratio": 1e7})
    assert codes(found.findings) == ["MD203", "MD204", "MD225", "MD224"]
    assert not found.is_healthy
    assert examine(healthy(), thresholds={"ratio": 1e7}).is_healthy  # MD224 is no concern
    assert len(found.findings) + len(found.signs) + len(found.unchecked) == len(CHECKS)


def test_evidence_is_json() -> None:
    """Also in a strict reading, which knows no NaN."""
    found = examine(healthy(loss=lambda n: NAN if n > 50 else 1.0))
    assert codes(found.findings) == ["MD202"]
    numbers = [f.evidence for f in found.findings], [s.numbers for s in found.signs.values()]
    assert json.loads(json.dumps(numbers, allow_nan=False)) == [*numbers]


@pytest.mark.parametrize(
    ("start", "expected"),
    [(60, {"MD202": ["MD221"]}), (90, {"MD202": ["MD221"]}), (30, {"MD202": None, "MD221": None})],
)
def test_what_follows_from_another_finding(start: int, expected: dict[str, Any]) -> None:
    """The loss is NaN from step 60 on; gradients that are so before are a finding apart."""
    loss, real = (lambda n: NAN if n >= 60 else 0.97**n), (lambda n: NAN if n >= start else 1.0)
    found = diagnose(healthy(loss=loss, real=real))
    assert {f.code: f.evidence.get("followed_by") for f in found} == expected


REASONS = {
    "loss is finite": "no loss is logged: a key `loss`, `train/loss` or `modaldummy/real`",
    "loss falls": "1 losses are too few; 20 are needed",
    "loss is steady": "which modalities were active is not logged: `wrapper",
    "inactive parameters are finite": "`modaldummy/uncapped` is not logged: `wrapper",
    "real gradients are finite": "gradient norms are not logged: `gradient_norms(wrapper)`",
    "real gradients are there": "gradient norms are not logged: `gradient_norms(wrapper)`",
    "dummy gradients are there": "no step with an inactive modality, or gradient norms are not",
    "dummy gradients have their size": "no inactive gradient beside `modaldummy/num_elements`, or",
    "dummy is small beside the loss": "no finite `modaldummy/fraction` is logged",
    "real gradients outweigh dummy ones": "no step with real and dummy gradients, or gradient",
    "every modality occurs": "which modalities were active is not logged: `wrapper",
    "batches mix modalities": "which modalities were active is not logged: `wrapper",
}


def test_what_is_not_logged_is_not_checked() -> None:
    """Each check says what it would have needed."""
    found = examine([{"loss": 1.0}])
    assert found.findings == []
    assert found.signs.keys() == {"loss is finite"}
    assert found.unchecked.keys() | found.signs.keys() == CHECKS.keys() == REASONS.keys()
    for check, reason in found.unchecked.items():
        assert reason.startswith(REASONS[check])
    assert examine([{"active/T1": 1.0}] * 20).unchecked["loss is finite"].startswith("no loss is")


def test_a_history_that_says_nothing_is_an_error() -> None:
    """And not a healthy run."""
    with pytest.raises(HistoryError, match=r"Nothing in the history .* its keys are \['lr'\]"):
        examine([{"lr": 1.0}] * 30)


SIZE, RATIO = "dummy gradients have their size", "real gradients outweigh dummy ones"
AVERAGED = healthy(grad_ranks=lambda n: 8.0)


@pytest.mark.parametrize(
    ("rows", "scale", "check", "reason"),
    [
        (healthy(), None, "dummy gradients are there", "with `scale=None` inactive modalities get"),
        (healthy(), None, SIZE, "the scale is 0 or None"),
        (healthy(), 0.0, SIZE, "the scale is 0 or None"),
        (AVERAGED, 1, SIZE, "gradients are averages over ranks"),
        (AVERAGED, 1, RATIO, "gradients are averages over ranks"),
        (healthy(12), 1, "loss is steady", "12 losses are too few; 20 are needed"),
        ([{"active/T1": 1.0}] * 20, 1, "batches mix modalities", "which modalities were active"),
        (healthy(9), 1, "every modality occurs", "9 batches are too few"),
    ],
)
def test_other_reasons(rows: Rows, scale: float | None, check: str, reason: str) -> None:
    assert examine(rows, scale=scale).unchecked[check].startswith(reason)


def test_noise_is_not_called_a_loss_that_does_not_fall() -> None:
    """Where a fall by half would not show, nothing is said about one."""
    noise = np.random.default_rng(0).lognormal(sigma=1.5, size=30)
    found = examine([{"loss": float(loss)} for loss in noise])
    assert codes(found.findings) == []
    assert re.match(r"too noisy: a fall by less than \d+% would", found.unchecked["loss falls"])
