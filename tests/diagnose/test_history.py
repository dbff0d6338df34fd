"""Files of logged metrics: whatever wrote them, the rows are the same. What is broken is named."""

import csv
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._diagnose import history
from modaldummy._diagnose.history import HistoryFile, Row, join_parts
from modaldummy._errors import HistoryError

ROWS: list[Row] = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
Read = Callable[[str | bytes], list[Row]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def read(path: Path) -> Read:
    """The rows of a file of that content, which has no notes."""

    def rows(content: str | bytes) -> list[Row]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        file = HistoryFile(path)
        found = list(file)
        assert file.notes == []
        return found

    return rows


def table(rows: list[Row], end: str = "\r\n", **options: Any) -> str:
    """As CSV."""
    file = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, names, lineterminator=end, **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def lines(rows: list[Row], end: str = "\n") -> str:
    """As JSON lines."""
    return end.join(map(json.dumps, rows)) + end


def state(rows: list[Row], indent: int | None) -> str:
    """As `trainer_state.json`."""
    return json.dumps({"best_metric": None, "log_history": rows}, indent=indent)


# --- formats ------------------------------------------------------------------------------------

JSON = {
    "lines with CRLF": lines(ROWS, "\r\n"),
    "lines without a last line end": lines(ROWS).rstrip(),
    "lines apart": "\n \n" + lines(ROWS, "\n\n \n"),
    "list below blank lines": "\n\n" + json.dumps(ROWS, indent=2),
}
CSV = {
    "LF": table(ROWS, "\n"),
    "semicolons": table(ROWS, delimiter=";"),
    "tabs": table(ROWS, delimiter="\t"),
    "no last line end": table(ROWS).rstrip(),
    "quotes": table(ROWS, quoting=csv.QUOTE_ALL),
    "blank lines": "\n \nstep,loss\n\n1,0.5\n  \n2,0.25\n\n",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("name", [*JSON, *CSV])
def test_formats(read: Read, name: str, mark: str) -> None:
    """CSV has strings: what they mean is left to what reads the rows."""
    strings = [{key: str(value) for key, value in row.items()} for row in ROWS]
    assert read(mark + (JSON | CSV)[name]) == (ROWS if name in JSON else strings)


@pytest.mark.parametrize("run", ["a, b, c", "a; b; c", "a\tb\tc", "a\nb"])
def test_the_name_of_a_run_may_contain_any_delimiter(read: Read, run: str) -> None:
    """Weights & Biases writes the names that people gave into the header, in quotes."""
    assert read(f'"Step","{run} - loss"\n"1","0.5"\n') == [{"Step": "1", f"{run} - loss": "0.5"}]


keys = st.text("abc/_-[] ;,\"'\t", min_size=1, max_size=8)
numbers = st.none() | st.integers(-99, 99) | st.floats(allow_nan=False)


@given(st.lists(keys, min_size=2, max_size=4, unique=True), st.data())
def test_every_format_gives_the_rows_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    """Also where keys contain quotes, blanks and delimiters, and some values are absent."""
    one = st.fixed_dictionaries(dict.fromkeys(names, numbers))
    rows: list[Row] = data.draw(st.lists(one, min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("formats") / "log"
    indent = data.draw(st.sampled_from([None, 2]))
    for content in (lines(rows), json.dumps(rows, indent=indent), state(rows, indent)):
        path.write_text(content, newline="")
        assert list(HistoryFile(path)) == rows
    if names[0].strip() and names[0].lstrip()[0] != "[":  # else the header looks like JSON
        path.write_text(table(rows, quoting=csv.QUOTE_ALL), newline="")
        strings = [{k: None if v is None else str(v) for k, v in row.items()} for row in rows]
        assert list(HistoryFile(path)) == strings


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]', " \nb,a\n,1\n,2"]
)
def test_a_pipe_is_read_like_a_file(path: Path, text: str) -> None:
    """It cannot be wound back."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    assert [int(row["a"]) for row in HistoryFile(path)] == [1, 2]
    writer.join(10)


# --- cut off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize(
    ("start", "cut", "reason"),
    [
        (lines(ROWS), '{"step": 3, "lo', "line 3: "),
        (lines(ROWS), '{"step": 3, "loss": 0.1', "line 3: Expecting ',' delimiter at column"),
        (lines(ROWS), "\0\0\0", "line 3: Expecting value at column 1."),
        (table(ROWS), "3", "line 4: 1 values under 2 columns."),
    ],
    ids=["key", "number", "zeros", "CSV"],
)
def test_a_last_line_that_was_cut_off_is_left_out(
    path: Path, start: str, cut: str, reason: str, end: str
) -> None:
    """As where a run was killed; a note says so."""
    path.write_text(start + cut + end, newline="")
    file = HistoryFile(path)
    assert len(list(file)) == 2
    (note,) = file.notes
    assert note.startswith(f"The last line was cut off and is left out: {path}, {reason}")


@given(st.integers(1, 200))
def test_json_lines_cut_anywhere_lose_at_most_a_row(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    rows: list[Row] = [{"step": step, "loss": 1 / step} for step in range(1, 7)]
    content = lines(rows)[: 40 + size]
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    path.write_text(content)
    whole = content.count("\n")
    assert list(HistoryFile(path)) in (rows[:whole], rows[: whole + 1])


# --- errors -------------------------------------------------------------------------------------

DEEP, DIGITS, LINE = "[" * 100_000, "9" * 5000, '{"a": 1}\n'
NO_LIST = " contains neither a list of objects nor"
BROKEN: list[tuple[str | bytes, str]] = [
    *(("", " is empty."), (" \n\t\n", " is empty."), ("\ufeff", " is empty.")),
    (LINE + '\n{"a": oops}\n' + LINE, ", line 3: Expecting value at column 7."),
    (LINE + '{"a\n{"b', ", line 2: Invalid control character at column 4."),
    (LINE + "[2, 3]\n", ", line 2: expected an object, got '[2, 3]'."),
    ('{"a": 1} x\n' + LINE, ", line 1: Extra data at column 10."),
    ('[\n{"a": 1},\n{"a":', ", line 3: Expecting value at column 6."),
    ("\n\r\n\n[\n{]", ", line 5: Expecting property name"),
    (state(ROWS, None)[:-5], ", line 1: Expecting ',' delimiter"),
    *(("[1, 2]", NO_LIST), ('[{"a": 1}, 2]', NO_LIST), ('{\n"a": 1\n}', NO_LIST)),
    *(('{"log_history": 5}', NO_LIST), ('{\n"log_history": [1]\n}', NO_LIST)),
    ("a,b\n1,2\n\n3\n4,5\n", ", line 4: 1 values under 2 columns."),
    ("a,b\n1,2\n3,4,5\n", ", line 3: 3 values under 2 columns."),
    ('a,b\n"1\n",2\n3\n4,5\n', ", line 4: 1 values under 2 columns."),
    ('a,b\n1,"' + "2" * 140_000, ", line 2: field larger than field limit (131072)."),
    (
        "\nStep 1: 0.5\n",
        ", line 2: neither JSON nor a CSV header of several columns: 'Step 1: 0.5'",
    ),
    ("x" * 500, f", line 1: neither JSON nor a CSV header of several columns: '{'x' * 40}'."),
    (b"\x80\x02}q\x00X\x04", " is no UTF-8 text: 'utf-8' codec can't decode"),
    (LINE.encode() * 9999 + b"\xff", " is no UTF-8 text: "),
    (LINE + f'{{"x": {DEEP}', ", line 2: brackets within brackets, too many of them."),
    (f"[\n{DEEP}", ": brackets within brackets, too many of them."),
    (LINE + f'{{"loss": {DIGITS}}}\n', ", line 2: Exceeds the limit"),
    (f'[\n{{"loss": {DIGITS}}}]', ": Exceeds the limit"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_broken_file(read: Read, path: Path, content: str | bytes, message: str) -> None:
    """The line and the reason are named."""
    with pytest.raises(HistoryError) as error:
        read(content)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("start", ["", "a,b\n", LINE], ids=["first", "CSV", "JSON"])
def test_a_line_without_end(read: Read, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of it is read than a row could be long."""
    monkeypatch.setattr(history, "_LONGEST", 100)
    with pytest.raises(HistoryError, match=f"line {1 + bool(start)}: more than 100 characters"):
        read(start + "x" * 100)


def test_a_file_without_end() -> None:
    with pytest.raises(HistoryError, match="line 1: more than 16,777,216 characters"):
        list(HistoryFile("/dev/zero"))


# --- rows of one step ---------------------------------------------------------------------------


def test_rows_of_one_step_that_complete_each_other_are_one() -> None:
    """As Lightning writes them into a CSV, where each has all columns."""
    rows: list[Row] = [
        {"step": 1, "loss": 3.0, "epoch": 0, "grad_norm/T1": ""},
        {"step": 1, "loss": "", "epoch": 0, "grad_norm/T1": 0.5},
        {"step": 2, "loss": 2.0, "epoch": None},
    ]
    before = [dict(row) for row in rows]
    joined = {"step": 1, "loss": 3.0, "epoch": 0, "grad_norm/T1": 0.5}
    assert list(join_parts(rows)) == [joined, rows[2]]
    assert rows == before
    assert list(join_parts([])) == []


def test_many_rows_of_one_step_are_joined_in_place() -> None:
    """A copy for each row would take the square of their number."""
    (row,) = join_parts({"step": 1, f"x{number}": 1} for number in range(50_000))
    assert len(row) == 50_001


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"step": 1, "loss": 3.0}, {"step": 1, "loss": 2.0}),
        ({"step": 1, "loss": 3.0}, {"step": 2, "grad_norm/T1": 0.5}),
        ({"step": 1, "loss": 3.0}, {"step": "", "grad_norm/T1": 0.5}),
        ({"step": 1, "loss": 3.0}, {"grad_norm/T1": 0.5}),
        ({"step": 1, "loss": 3.0}, {"global_step": 1, "grad_norm/T1": 0.5}),
        ({"step": 1, "grad/[T1]/T1.w": 0.5}, {"step": 1, "grad/[inactive]/T1.w": 1e-7}),
    ],
)
def test_other_rows_stay_apart(first: Row, second: Row) -> None:
    """Two ranks that write into one file have the same steps; what they say stays apart."""
    assert list(join_parts([first, second])) == [first, second]
