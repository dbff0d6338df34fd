"""Logs that nobody writes on purpose: what they end in is a sentence."""

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modaldummy import __main__ as command
from modaldummy._diagnose import history, signals
from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.history import HistoryFile, in_chunks
from modaldummy._diagnose.keys import role_of
from modaldummy._diagnose.signals import Signals
from modaldummy._errors import HistoryError


@pytest.fixture
def log(tmp_path: Path) -> Callable[[str], str]:
    def write(content: str) -> str:
        path = tmp_path / "log"
        path.write_text(content, newline="")
        return str(path)

    return write


# --- logs -------------------------------------------------------------------------------------

DEEP, DIGITS = "[" * 100_000, "9" * 5000
BROKEN = {
    "brackets in the first line": (DEEP, ", line 1: brackets within brackets, too many of them."),
    "brackets in a line": (f'{{"loss": 1}}\n{{"x": {DEEP}', ", line 2: brackets within brackets"),
    "brackets in a list": (f"[\n{DEEP}", ": brackets within brackets, too many of them."),
    "digits in the first line": (f'\n{{"loss": {DIGITS}}}\n', ", line 2: Exceeds the limit"),
    "digits in a list": (f'[\n{{"loss": {DIGITS}}}]', ": Exceeds the limit"),
    "line below blank lines": (
        '\n \n{"a": 1}\n{"a": oops}\n{"a": 1}\n',
        ", line 4: Expecting value at column 7.",
    ),
    "list below blank lines": ("\n\r\n\n[\n{]", ", line 5: Expecting property name"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_no_parser_takes(log: Callable[[str], str], content: str, message: str) -> None:
    path = log(content)
    with pytest.raises(HistoryError) as error:
        list(HistoryFile(path))
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("start", ["", "a,b\n", '{"loss": 1}\n'], ids=["first", "CSV", "JSON"])
def test_a_line_without_end(
    log: Callable[[str], str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of it is read than a row could be long."""
    monkeypatch.setattr(history, "_LONGEST", 100)
    with pytest.raises(HistoryError, match=f"line {1 + bool(start)}: more than 100 characters"):
        list(HistoryFile(log(start + "x" * 100)))


def test_a_file_without_end() -> None:
    with pytest.raises(HistoryError, match="line 1: more than 16,777,216 characters"):
        list(HistoryFile("/dev/zero"))


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]', " \nb,a\n,1\n,2"]
)
def test_a_pipe_is_read_like_a_file(tmp_path: Path, text: str) -> None:
    """It cannot be wound back."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    assert [int(row["a"]) for row in HistoryFile(path)] == [1, 2]
    writer.join(10)


def test_rows_of_one_step_are_joined_in_place() -> None:
    """A copy for each row would take the square of their number."""
    rows: list[dict[str, Any]] = [{"step": 1, f"x{number}": 1} for number in range(50_000)]
    ((row,),) = in_chunks(rows, 4)
    assert len(row) == 50_001
    assert rows[0] == {"step": 1, "x0": 1}


def test_joined_rows_are_those_of_one_step() -> None:
    rows = [{"step": step, "abc"[part]: part} for step in (1, 2) for part in range(3)]
    assert list(in_chunks(rows, 4)) == [[{"step": s, "a": 0, "b": 1, "c": 2} for s in (1, 2)]]


def test_a_long_key_has_no_meaning() -> None:
    assert role_of("x/" * 498 + "loss") == ("", "")
    assert role_of("x/" * 494 + "grad_norm/ab") == ("norm", "ab")
    assert role_of("x/" * 494 + "grad_norm/abc") == ("", "")


def test_a_name_that_can_be_split_in_many_ways() -> None:
    """Of `a` and `a-a`, as many as there are Fibonacci numbers."""
    name = "a-" * 300 + "b"
    assert signals._split(name, ["a", "a-a"]) == []
    assert signals._split(name, ["a", "a-a", "b"]) == ["a"] * 300 + ["b"]
    assert signals._split("a-b-c", ["c", "a-b", "b-c", "a"]) == ["a-b", "c"]
    assert signals._split("a-b-c", ["c", "b-c", "a"]) == ["a", "b-c"]
    assert signals._split("a", ["a"]) == []


def test_more_names_than_any_map_has() -> None:
    """Those beyond the first are left out, with a note; a loss is read wherever it stands."""
    rows = [{f"grad_norm/{number}": 1.0 for number in range(2000)} | {"loss": 1.0}] * 3
    diagnosis = examine(rows)
    assert diagnosis.notes == ["More than 500 quantities of modalities; those beyond are left out."]
    assert len(diagnosis.evidence.signals.modalities) == 500
    assert diagnosis.evidence.column("loss").tolist() == [1, 1, 1]


def test_as_many_names_as_are_read_are_no_matter() -> None:
    found = Signals()
    for name in "ab":
        found.add([{f"active/{name}{number}": 1 for number in range(250)}] * 2)
    assert not found.is_cut
    assert len(found.modalities) == 500


@pytest.mark.parametrize("loss", [1e308, -1e308, 5e-324])
def test_numbers_near_the_ends_make_no_warnings(loss: float) -> None:
    rows = [
        {"step": step, "loss": loss * (-1) ** step, "grad_norm/a": 1e308, "active/a": step % 2}
        | {"grad_norm/b": 5e-324, "active/b": 1, "grad_ratio": 1e308}
        for step in range(60)
    ]
    assert examine(rows).evidence.signals.num_rows == 60


# --- the command ------------------------------------------------------------------------------


def test_keys_cannot_steer_a_terminal(
    log: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are they in its way, if no encoding has them."""
    path = log(json.dumps({"loss": 1, "\x1b[2J": 1, "\ud800": 1, "a\tb": 1, "é": 1}))
    assert command.main(["doctor", path]) == 0
    assert "here: \\x1b[2J, \\ud800, a\\tb, é\n" in capsys.readouterr().out


def test_a_terminal_of_few_letters(log: Callable[[str], str]) -> None:
    path, out = log('{"loss": 1, "é": 1}'), io.BytesIO()
    terminal = io.TextIOWrapper(out, encoding="ascii", write_through=True)
    with contextlib.redirect_stdout(terminal):
        assert command.main(["doctor", path]) == 0
    assert b"here: \\xe9\n" in out.getvalue()


def test_errors_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor", str(tmp_path / "\x1b[2J\udcff")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/\\x1b[2J\\udcff: No such file or directory.\n"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="such a file is only on Linux")
def test_a_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It can be opened, so that the error has no name in it."""
    assert command.main(["doctor", "/proc/self/mem"]) == 2
    assert capsys.readouterr().err == "/proc/self/mem: Input/output error.\n"


def test_a_run_that_cannot_be_drawn(
    log: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses are farther apart than a number can be."""
    rows = [{"step": 1e308 * (-1) ** n, "loss": 1e308 * (-1) ** n} for n in range(60)]
    path = log("".join(json.dumps(row) + "\n" for row in rows))
    assert command.main(["doctor", path, "--plot", str(tmp_path / "run.png")]) == 2
    assert capsys.readouterr().err.startswith("The run cannot be drawn: ")


def test_a_name_is_drawn_as_it_is(log: Callable[[str], str], tmp_path: Path) -> None:
    r"""Between dollars it would be a formula, and `\frac` alone is none."""
    row = {"loss": 1.0, r"grad_norm/$\frac$": 1.0, r"active/$\frac$": 1}
    path = log(json.dumps(row) + "\n")
    assert command.main(["doctor", path, "--plot", str(tmp_path / "$x_$ $.png")]) == 0
    assert (tmp_path / "$x_$ $.png").exists()
