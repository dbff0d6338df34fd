"""The doctor: what it prints and returns, for logs as people have them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modaldummy import __main__ as command
from modaldummy._diagnose import doctor
from tests.diagnose.clinic_healthy import HEALTHY
from tests.diagnose.clinic_sick import SICK

pytestmark = pytest.mark.usefixtures("one_thread")
LATER, SINGLES = "data that is not finite later", "a dummy for single modalities only"
Doctor = Callable[..., tuple[int, str, str]]


@functools.cache
def rows(name: str) -> list[dict[str, float]]:
    """The log of a run of the clinic."""
    history, _ = HEALTHY[name]() if name in HEALTHY else SICK[name][1]()
    return list(history)


@pytest.fixture
def doctored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Doctor:
    """Exit code and output of the command, in a folder with that log."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        Path("log").write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
        code = command.main(["doctor", *(arguments or ["log"])])
        return (code, *capsys.readouterr())

    return run


def test_a_healthy_run(doctored: Doctor) -> None:
    code, shown, _ = doctored("SGD")
    assert code == 0
    assert shown.startswith("log: 150 rows\n")
    assert "Healthy:\n  loss is finite: 150 losses, all finite\n" in shown
    assert "dummy gradients have their size: 1 times scale * sqrt(elements)" in shown
    assert shown.endswith("\n\nNothing wrong in 12 checks.\n")
    assert "Not checked" not in shown


def test_a_sick_run(doctored: Doctor) -> None:
    code, shown, _ = doctored(LATER)
    assert code == 1
    assert "\nMD202 error: The loss becomes NaN or infinite at step 60.\n  evidence: " in shown
    assert "followed_by=[MD203, MD221]" in shown
    assert "\n  remedy: Lower the learning rate" in shown
    assert shown.endswith(" checks found something: MD202.\n")


def test_what_is_only_information_is_healthy(doctored: Doctor) -> None:
    code, shown, _ = doctored("one modality at a time")
    assert code == 0
    assert "MD226 info" in shown


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of someone who has never heard of this library, cut off while it was written."""
    own = {f"own/{letter}": 1.0 for letter in "abcdefg"}
    records = [{"step": step, "loss": 1 / (step + 1)} | own for step in range(40)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 40, "lo')
    assert command.main(["doctor", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Note: The last line was cut off and is left out:" in shown
    assert "line 41" in shown
    assert "Not checked:\n  loss is steady: which modalities were active is not logged" in shown
    assert "Columns without a meaning here: own/a, own/b, own/c, own/d, own/e, and 2 more" in shown


def test_json(doctored: Doctor) -> None:
    """Strict JSON, whatever numbers are in it."""
    code, shown, _ = doctored(LATER, "log", "--json")
    assert code == 1
    found = json.loads(shown, parse_constant=pytest.fail)
    assert (found["path"], found["rows"], found["healthy"]) == ("log", 150, False)
    assert [finding["code"] for finding in found["findings"]] == ["MD202"]
    assert found["findings"][0]["evidence"]["first_step"] == 60
    assert found["signs"]["dummy gradients are there"]["numbers"] == {"steps": 150}
    assert found["unchecked"]["loss falls"] == "the loss does not stay finite"
    assert found["notes"] == found["ignored"] == []


def test_json_has_no_infinity() -> None:
    content = {"a": [float("inf"), {"b": float("nan")}, 1.5], "c": "x"}
    assert doctor._for_json(content) == {"a": ["inf", {"b": "nan"}, 1.5], "c": "x"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 1),
        (["--scale", "1e-5"], 0),
        (["--scale", "None"], 0),
        (["--threshold", "factor=1000"], 0),
        (["--threshold", "factor=1000", "--threshold", "ratio=1e12"], 0),
    ],
)
def test_scale_and_thresholds(doctored: Doctor, arguments: list[str], code: int) -> None:
    """What is wrong for one scale is right for another."""
    found, shown, _ = doctored("another scale than was meant", "log", *arguments)
    assert found == code
    assert ("MD214" in shown) == bool(code)
    assert ("the scale is 0 or None" in shown) == ("None" in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file or directory.\n"),
        (["."], ".: Is a directory.\n"),
        (["log", "--threshold", "unrets=2"], "did you mean 'unrest'?"),
        (["log", "--scale", "-1"], "`scale` must be a finite number >= 0 or None, got -1.0"),
        (["log", "--plot", "no/folder.png"], "The run cannot be drawn: [Errno 2] No such file or"),
        (["broken"], "broken, line 2: Expecting value at column 21"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    doctored: Doctor, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": }\n{"step": 3}')
    code, shown, error = doctored("too short to tell", *arguments)
    assert (code, shown) == (2, "")
    assert message in error


@pytest.mark.parametrize("arguments", [["--scale", "small"], ["--threshold", "unrest"], []])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["doctor", *(["log", *arguments] if arguments else [])])
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_picture(doctored: Doctor, tmp_path: Path) -> None:
    assert doctored("SGD", "log", "--plot", "run.png")[0] == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(doctored: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    code, _, error = doctored("SGD", "log", "--plot", "run.png")
    assert (code, error) == (2, "--plot needs matplotlib: pip install matplotlib\n")
