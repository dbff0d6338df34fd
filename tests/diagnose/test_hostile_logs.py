"""Logs that nobody writes on purpose: what they end in is a sentence."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modaldummy import __main__ as command
from modaldummy._diagnose import signals
from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.keys import role_of


@pytest.fixture
def log(tmp_path: Path) -> Callable[[str], str]:
    def write(content: str) -> str:
        path = tmp_path / "log"
        path.write_text(content, newline="")
        return str(path)

    return write


def test_a_long_key_has_no_meaning() -> None:
    assert role_of("x/" * 498 + "loss") == ("", "")
    assert role_of("x/" * 494 + "grad_norm/ab") == ("norm", "ab")
    assert role_of("x/" * 494 + "grad_norm/abc") == ("", "")


def test_a_name_that_can_be_split_in_many_ways() -> None:
    """Of `a` and `a-a`, as many as there are Fibonacci numbers."""
    name = "a-" * 300 + "b"
    assert signals._split(name, ["a", "a-a"]) == []
    assert signals._split(name, ["a", "a-a", "b"]) == ["a"] * 300 + ["b"]


@pytest.mark.parametrize("number", [500, 501])
def test_more_names_than_any_map_has(number: int) -> None:
    """Those beyond the first are left out, with a note. A loss is read wherever it stands."""
    rows = [{f"grad_norm/{name}": 1.0 for name in range(number)} | {"loss": 1.0}] * 3
    diagnosis = examine(rows)
    note = "More than 500 quantities of modalities; those beyond are left out."
    assert diagnosis.notes == [note] * (number - 500)
    assert len(diagnosis.evidence.signals.modalities) == 500
    assert diagnosis.evidence.column("loss").tolist() == [1, 1, 1]


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
