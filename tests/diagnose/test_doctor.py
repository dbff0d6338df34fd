"""The doctor: what it prints, draws and returns, for logs as people have them."""

import csv
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from modaldummy import __main__ as command
from modaldummy._diagnose import doctor, picture
from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.picture import draw
from tests.diagnose.clinic import Run, plain
from tests.diagnose.clinic_healthy import HEALTHY
from tests.diagnose.clinic_sick import SICK

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def rows(name: str) -> list[dict[str, float]]:
    """The log of a run of the clinic."""
    history, _ = HEALTHY[name]() if name in HEALTHY else SICK[name][1]()
    return list(history)


def write(path: Path, records: list[dict[str, float]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


LATER, SINGLES = "data that is not finite later", "a dummy for single modalities only"


# --- exit code and text -----------------------------------------------------------------------


def test_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "log.jsonl", rows("SGD"))
    assert command.main(["doctor", path]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}: 150 rows\n")
    assert "Healthy:\n  loss is finite: 150 losses, all finite\n" in shown
    assert "dummy gradients have their size: 1 times scale * sqrt(elements)" in shown
    assert shown.endswith("\n\nNothing wrong in 12 checks.\n")
    assert "Not checked" not in shown


def test_a_sick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "log.jsonl", rows(LATER))
    assert command.main(["doctor", path]) == 1
    shown = capsys.readouterr().out
    assert "\nMD202 error: The loss becomes NaN or infinite at step 60.\n  evidence: " in shown
    assert "followed_by=[MD203, MD221]" in shown
    assert "\n  remedy: Lower the learning rate" in shown
    assert shown.endswith(" checks found something: MD202.\n")


def test_what_is_only_information_is_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "log.jsonl", rows("one modality at a time"))
    assert command.main(["doctor", path]) == 0
    assert "MD226 info" in capsys.readouterr().out


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of someone who has never heard of this library, cut off while it was written."""
    records = [
        {"step": i, "loss": 1 / (i + 1)} | {f"own/{k}": 1.0 for k in "abcdefg"} for i in range(40)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 40, "lo')
    assert command.main(["doctor", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Note: The last line was cut off and is left out:" in shown
    assert "line 41" in shown
    assert "Not checked:\n  loss is steady: which modalities were active is not logged" in shown
    assert "Columns without a meaning here: own/a, own/b, own/c, own/d, own/e and 2 more" in shown


@pytest.mark.parametrize("format", ["csv", "trainer_state", "list"])
def test_other_formats_say_the_same(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = rows(SINGLES)
    path = tmp_path / "log"
    if format == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for record in records for key in record}))
            writer.writeheader()
            writer.writerows(records)
    else:
        content = {"log_history": records, "epoch": 1} if format == "trainer_state" else records
        path.write_text(json.dumps(content, indent=2))
    assert command.main(["doctor", str(path)]) == 1
    other = capsys.readouterr().out
    assert command.main(["doctor", write(path, records)]) == 1
    assert capsys.readouterr().out == other
    assert "MD213 error: Inactive modalities had no gradient at 115 of 150 steps." in other


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strict JSON, whatever numbers are in it."""
    path = write(tmp_path / "log.jsonl", rows(LATER))
    assert command.main(["doctor", path, "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["path"] == path
    assert (found["rows"], found["healthy"]) == (150, False)
    assert [finding["code"] for finding in found["findings"]] == ["MD202"]
    assert found["findings"][0]["evidence"]["first_step"] == 60
    assert found["signs"]["dummy gradients are there"]["numbers"] == {"steps": 150}
    assert found["unchecked"]["loss falls"] == "the loss does not stay finite"
    assert found["notes"] == found["ignored"] == []


def test_json_has_no_infinity() -> None:
    content = {"a": [float("inf"), {"b": float("nan")}, 1.5], "c": "x"}
    assert doctor._for_json(content) == {"a": ["inf", {"b": "nan"}, 1.5], "c": "x"}


def test_scale_and_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong for one scale is right for another."""
    path = write(tmp_path / "log.jsonl", rows("another scale than was meant"))
    assert command.main(["doctor", path]) == 1
    assert "MD214" in capsys.readouterr().out
    assert command.main(["doctor", path, "--scale", "1e-5"]) == 0
    assert command.main(["doctor", path, "--threshold", "factor=1000"]) == 0
    assert command.main(["doctor", path, "--scale", "None"]) == 0
    assert "the scale is 0 or None" in capsys.readouterr().out


# --- what cannot be read ----------------------------------------------------------------------


def test_a_line_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": }\n{"step": 3, "loss": 1.0}\n')
    assert command.main(["doctor", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{path}, line 2: Expecting value at column 21")


def test_a_number_of_thousands_of_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python refuses it in words of its own; the line is told all the same."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"loss": 1.0}\n{"loss": ' + "9" * 5000 + "}\n")
    assert command.main(["doctor", str(path)]) == 2
    assert f"{path}, line 2: Exceeds the limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file or directory.\n"),
        (["."], ".: Is a directory.\n"),
        (["log", "--threshold", "unrets=2"], "did you mean 'unrest'?"),
        (["log", "--threshold", "unrest=-2"], "`unrest` must be a finite number above 0, got -2.0"),
        (["log", "--scale", "-1"], "`scale` must be a finite number >= 0 or None, got -1.0"),
        (["log", "--plot", "no/such/folder.png"], "no/such/folder.png: No such file or directory."),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log", rows("too short to tell"))
    assert command.main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("arguments", [["--scale", "small"], ["--threshold", "unrest"], []])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["doctor", *(["log", *arguments] if arguments else [])])
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_picture_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert command.main(["doctor", "log", "--plot", "run.png"]) == 2
    assert capsys.readouterr().err == "--plot needs matplotlib: pip install 'modaldummy[demo]'\n"


# --- the picture ------------------------------------------------------------------------------


def texts(history: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All words in the picture of a run."""
    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(examine(history), "A title", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_picture_by_command(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", rows("SGD"))
    assert command.main(["doctor", path, "--plot", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "SGD",
            ["Nothing wrong was found.", "T1 active", "dMRI inactive", "several", "bound 0.0001"],
        ),
        (LATER, ["MD202", "MD202: The loss becomes NaN or infinite at step 60.", "not finite"]),
        (SINGLES, ["MD213", "inactive, no gradient"]),
        ("scale 0 by mistake", ["MD211", "inactive, zero"]),
        ("NaN in a gradient", ["MD221", "MD204", "active, NaN or infinite"]),
        ("one modality at a time", ["MD226: 100% of batches hold a single modality.", "T1"]),
        ("a fusion", ["T1-dMRI active", "T1-dMRI inactive"]),
        ("six modalities", ["f active", "a inactive"]),
    ],
)
def test_what_a_picture_says(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = texts(rows(name), tmp_path, monkeypatch)
    assert "A title" in shown
    whole = "\n".join(shown)
    assert [word for word in words if word not in whole] == []


def test_a_finding_is_marked_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all rows of the picture; what is only information is not."""
    marked: list[float] = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **_: marked.append(x))
    draw(examine(rows(LATER)), "", tmp_path / "run.png")
    assert marked == [60, 60, 60]
    marked.clear()
    draw(examine(rows("one modality at a time")), "", tmp_path / "run.png")
    assert marked == []


def test_a_picture_of_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the dashboards that this library comes from: nothing but labelled parameters."""
    records = [
        {key: value for key, value in row.items() if key in ("step", "loss") or "[" in key}
        for row in rows("SGD")
    ]
    shown = texts(records, tmp_path, monkeypatch)
    assert {"T1 active", "inactive"} <= {*shown}
    assert "|dummy| / |real|" not in shown


def test_a_picture_of_a_loss_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [{"loss": 10.0 ** (3 - step / 10)} for step in range(80)]
    assert "loss" in texts(losses, tmp_path, monkeypatch)


def test_a_picture_of_negative_losses_and_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts([{"loss": -float(step)} for step in range(30)], tmp_path, monkeypatch)
    texts([{"step": 1.0, "loss": float("nan")}], tmp_path, monkeypatch)


def test_many_findings_are_cut_short() -> None:
    findings = examine(rows("NaN in a gradient")).findings
    assert picture._verdict(findings * 3).endswith(f"\nand {len(findings) * 3 - 5} more")


def test_a_running_median_goes_along_with_its_values() -> None:
    """It neither lags behind a loss that falls nor follows a single value."""
    falling = np.arange(40.0)[::-1]
    assert picture._running_median(falling).tolist() == falling.tolist()
    assert picture._running_median(np.array([7.0])).tolist() == [7]
    falling[20] = 1000
    assert picture._running_median(falling).max() < 40


def test_a_long_run_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """Rows beyond the sample are counted and not kept; what happened once is still found."""
    path = tmp_path / "log.jsonl"
    few = list(plain(Run(steps=100)))
    with path.open("w") as file:
        for step in range(60_000):
            row = few[step % 100] | {"step": step}
            if step == 31_234:
                row["loss"] = float("nan")
            file.write(json.dumps(row) + "\n")
    diagnosis = examine(str(path))
    assert diagnosis.evidence.signals.num_rows == 60_000
    assert len(diagnosis.evidence.column("step")) <= 20_000
    first = {finding.code: finding.evidence["first_step"] for finding in diagnosis.findings}
    assert first["MD202"] == 31_234
