"""A share of the inputs of `make fuzz`, and that it notices what breaks, hangs or grows."""

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest

from modaldummy._diagnose import doctor
from modaldummy._diagnose.history import HistoryFile
from tests import fuzz
from tests.fuzz_logs import MONSTERS, Log

GOOD = Log(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")


def child(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


@linux
def test_a_share_of_the_inputs(tmp_path: Path) -> None:
    """All monsters among them."""
    result = child("-m", "tests.fuzz", "--inputs", "1200", "--seed", "7", "--out", str(tmp_path))
    assert "1,200 of 1,200 inputs did as they" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0
    for kind in ("log: healthy", "log: HistoryError", "batch: read\n", "batch: UnknownModality"):
        assert kind in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_seed_makes_the_same_inputs(tmp_path: Path) -> None:
    numbers = [number for number in range(len(MONSTERS), 200) if number % 2]
    assert [fuzz.make(1, n) for n in numbers] == [fuzz.make(1, n) for n in numbers]
    assert [fuzz.make(1, n) for n in numbers] != [fuzz.make(2, n) for n in numbers]
    batches = [[repr(fuzz.failure(fuzz.make(1, n + 1), tmp_path)) for n in numbers] for _ in "12"]
    assert batches[0] == batches[1]


def test_what_is_good_does_not_fail(tmp_path: Path) -> None:
    for wants in ("text", "json", "plot"):
        assert fuzz.failure(Log(GOOD.content, "pipe", wants), tmp_path) == "healthy"
    assert fuzz.failure((["T1"], ("T1",)), tmp_path) == "read"
    assert fuzz.failure(({}, ("T1",)), tmp_path) == "BatchMetadataError"


# --- what is noticed --------------------------------------------------------------------------


def breaks(file: HistoryFile) -> NoReturn:
    raise KeyError(file.path)


def hangs(file: HistoryFile) -> NoReturn:
    while True:
        pass


def warns(file: HistoryFile) -> Iterator[dict[str, Any]]:
    import warnings

    warnings.warn("overflow", RuntimeWarning, stacklevel=1)
    yield {"loss": 1.0}


@pytest.mark.parametrize(
    ("reader", "error"),
    [(breaks, KeyError), (hangs, fuzz.TooLongError), (warns, RuntimeWarning)],
)
def test_a_reader_that_breaks_or_hangs(
    reader: Any, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HistoryFile, "__iter__", reader)
    assert type(fuzz.failure(GOOD, tmp_path, seconds=0.3)) is error


@pytest.mark.parametrize(
    ("name", "other", "log"),
    [
        ("_printable", lambda text, file: text, Log(b'{"loss": 1, "\\u001b[2J": 1}\n')),
        ("_for_json", lambda content: {**content, "x": math.nan}, Log(GOOD.content, wants="json")),
        ("_fail", lambda reason: 1, Log(b"")),
        ("report", lambda path, diagnosis: (), GOOD),
    ],
    ids=["raw text", "loose JSON", "status", "silence"],
)
def test_a_command_that_answers_badly(
    name: str, other: Any, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(fuzz.failure(log, tmp_path), str)
    monkeypatch.setattr(doctor, name, other)
    assert isinstance(fuzz.failure(log, tmp_path), (fuzz.MalformedError, UnicodeError))


@pytest.mark.parametrize("answer", [["T1"], ("x",), ("dMRI", "T1"), ("T1", "T1")])
def test_an_answer_that_is_none(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tuple, no known name, not in order, twice the same."""
    monkeypatch.setattr(fuzz, "active_modalities", lambda batch, known: answer)
    assert isinstance(fuzz.failure((["T1"], ("T1", "dMRI")), tmp_path), Exception)


def test_answers_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a reader that uses up what it reads."""
    answers = iter([("T1",), ()])
    monkeypatch.setattr(fuzz, "active_modalities", lambda batch, known: next(answers))
    assert isinstance(fuzz.failure((["T1"], ("T1",)), tmp_path), fuzz.MalformedError)


GROWS = """
import sys
from modaldummy._diagnose.history import HistoryFile
from tests import fuzz

def grow(file):
    if b"loss" in open(file.path, "rb").read():
        kept = []
        while True:
            kept.append(bytearray(2**30))
    return iter([{"loss": 1.0}])

HistoryFile.__iter__ = grow
start = next(n for n in range(100, 200) if b"loss" in getattr(fuzz.make(0, n), "content", b""))
sys.exit(fuzz.main(["--first", str(start), "--inputs", "1", *sys.argv[1:]]))
"""


@linux
def test_a_reader_that_grows_is_written_down_with_its_input(tmp_path: Path) -> None:
    """Which is cut down to what the failure needs."""
    result = child("-c", GROWS, "--out", str(tmp_path), "--progress", str(tmp_path / "number"))
    assert "MemoryError" in result.stdout, result.stdout + result.stderr
    assert "0 of 1 inputs did as they" in result.stdout
    assert result.returncode == 1
    (log,) = tmp_path.glob("failure-0-*.log")
    assert log.read_bytes() == b"loss"
    assert "MemoryError" in log.with_suffix(".txt").read_text()


ENDS = "import sys, time; open(sys.argv[2], 'wb').write((42).to_bytes(8)); time.sleep(100)"


def test_a_worker_that_never_comes_back_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a loop in compiled code, which no alarm interrupts; the input is named."""
    monkeypatch.setattr(fuzz, "_SHRINKING", 2.0)
    assert fuzz.watch(argparse.Namespace(seconds=0.1), [sys.executable, "-c", ENDS]) == 1
    assert capsys.readouterr().out == "FAILED: input 42 ended the process with signal 9\n"


def test_a_log_is_cut_down_to_what_the_failure_needs() -> None:
    content = Random(0).randbytes(3000) + b"bad" + Random(1).randbytes(500)
    kept = fuzz.shrunk(Log(content, "pipe"), lambda log: b"bad" in log.content)
    assert kept == Log(b"bad", "pipe")
