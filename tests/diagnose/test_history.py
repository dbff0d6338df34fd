"""Files of logged metrics: whatever wrote them, the rows are the same; what is broken is named."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._diagnose.history import HistoryFile, Row, in_chunks
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


@pytest.fixture
def refused(read: Read, path: Path) -> Callable[[str | bytes], str]:
    """What the error says of a file of that content, after the path that it begins with."""

    def message(content: str | bytes) -> str:
        with pytest.raises(HistoryError) as error:
            read(content)
        assert str(error.value).startswith(str(path))
        return str(error.value).removeprefix(str(path))

    return message


def table(rows: list[Row], delimiter: str = ",", end: str = "\r\n") -> str:
    """As CSV."""
    file = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, names, delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def lines(rows: list[Row], end: str = "\n") -> str:
    """As JSON lines."""
    return end.join(map(json.dumps, rows)) + end


def state(rows: list[Row], indent: int | None) -> str:
    """As `trainer_state.json`."""
    content = {"best_metric": None, "is_hyper_param_search": False, "log_history": rows}
    return json.dumps(content, indent=indent)


# --- formats ------------------------------------------------------------------------------------

JSON = {
    "lines": lines(ROWS),
    "lines with CRLF": lines(ROWS, "\r\n"),
    "lines without a last line end": lines(ROWS).rstrip(),
    "lines apart": "\n \n" + lines(ROWS, "\n\n \n"),
    "list in one line": json.dumps(ROWS),
    "list over several lines": json.dumps(ROWS, indent=2),
    "list below blank lines": "\n\n" + json.dumps(ROWS, indent=2),
    "state in one line": state(ROWS, None),
    "state over several lines": state(ROWS, 2),
}
CSV = {
    "commas": table(ROWS),
    "commas and LF": table(ROWS, end="\n"),
    "semicolons": table(ROWS, ";"),
    "tabs": table(ROWS, "\t"),
    "no last line end": table(ROWS).rstrip(),
    "quotes": '"step","loss"\n"1","0.5"\n"2","0.25"\n',
    "blank lines": "\n \nstep,loss\n\n1,0.5\n  \n2,0.25\n\n",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json(read: Read, content: str, mark: str) -> None:
    assert read(mark + content) == ROWS


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("content", CSV.values(), ids=CSV)
def test_csv_has_strings(read: Read, content: str, mark: str) -> None:
    """What they mean is left to what reads the rows."""
    assert read(mark + content) == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.25"}]


@pytest.mark.parametrize("as_string", [True, False])
def test_a_path_may_be_a_string(path: Path, as_string: bool) -> None:
    path.write_text(lines(ROWS))
    assert list(HistoryFile(str(path) if as_string else path)) == ROWS


def test_an_empty_cell_is_absent(read: Read) -> None:
    assert read("step,loss,note\n1,,\n") == [{"step": "1", "loss": None, "note": None}]


@pytest.mark.parametrize("run", ["a, b, c", "a; b; c", "a\tb\tc", "a\nb"])
def test_the_name_of_a_run_may_hold_any_delimiter(read: Read, run: str) -> None:
    """Weights & Biases writes the names that people gave into the header, in quotes."""
    assert read(f'"Step","{run} - loss"\n"1","0.5"\n') == [{"Step": "1", f"{run} - loss": "0.5"}]


def test_a_single_json_line_is_a_row(read: Read) -> None:
    assert read('{"step": 1, "loss": NaN}')[0].keys() == {"step", "loss"}


def test_a_file_without_rows(read: Read) -> None:
    assert read("[]") == read('{"log_history": []}') == read("step,loss\n") == []


keys = st.text("abc/_-[] ;,\"'\t", min_size=1, max_size=8)
numbers = st.none() | st.integers(-99, 99) | st.floats(allow_nan=False)


@given(st.lists(keys, min_size=2, max_size=4, unique=True), st.data())
def test_every_format_gives_the_rows_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    """Also where keys hold quotes, blanks and delimiters, and some values are absent."""
    one = st.fixed_dictionaries(dict.fromkeys(names, numbers))
    rows: list[Row] = data.draw(st.lists(one, min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("formats") / "log"
    indent = data.draw(st.sampled_from([None, 2]))
    for content in (lines(rows), json.dumps(rows, indent=indent), state(rows, indent)):
        path.write_text(content, newline="")
        assert list(HistoryFile(path)) == rows
    if names[0].strip() and names[0].lstrip()[0] != "[":  # else the header looks like JSON
        path.write_text(quoted(rows), newline="")
        strings = [{k: None if v is None else str(v) for k, v in row.items()} for row in rows]
        assert list(HistoryFile(path)) == strings


def quoted(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


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
    content = lines(rows)[: 20 + size]
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    path.write_text(content)
    whole = content.count("\n")
    found = list(HistoryFile(path)) if whole else []
    assert found in (rows[:whole], rows[: whole + 1])


# --- errors -------------------------------------------------------------------------------------

BROKEN = {
    "empty": ("", " is empty."),
    "white space": (" \n\t\n", " is empty."),
    "BOM alone": ("\ufeff", " is empty."),
    "JSON line": (
        '{"a": 1}\n\n{"a": oops}\n{"a": 2}\n',
        ", line 3: Expecting value at column 7.",
    ),
    "two JSON lines": ('{"a": 1}\n{"a\n{"b', ", line 2: Invalid control character at column 4."),
    "list in a JSON line": ('{"a": 1}\n[2, 3]\n', ", line 2: expected an object, got '[2, 3]'."),
    "number in a JSON line": ('{"a": 1}\n17\n', ", line 2: expected an object, got '17'."),
    "first JSON line": ('{"a": 1} x\n{"a": 1}\n', ", line 1: Extra data at column 10."),
    "list that was cut off": ('[\n{"a": 1},\n{"a":', ", line 3: Expecting value at column 6."),
    "state that was cut off": (state(ROWS, None)[:-5], ", line 1: Expecting ',' delimiter"),
    "few values": ("a,b\n1,2\n\n3\n4,5\n", ", line 4: 1 values under 2 columns."),
    "many values": ("a,b\n1,2\n3,4,5\n6,7\n", ", line 3: 3 values under 2 columns."),
    "many values at the end": ("a,b\n1,2\n3,4,5\n", ", line 3: 3 values under 2 columns."),
    "few values below a value of two lines": (
        'a,b\n"1\n",2\n3\n4,5\n',
        ", line 4: 1 values under 2 columns.",
    ),
    "quote that is never closed": (
        'a,b\n1,"' + "2" * 140_000,
        ", line 2: field larger than field limit (131072).",
    ),
    "text": (
        "\nStep 1: the loss is 0.5\n",
        ", line 2: neither JSON nor a CSV header of several columns: 'Step 1: the loss is 0.5'.",
    ),
    "long text": ("x" * 500, f"of several columns: '{'x' * 40}'."),
    "binary": (b"\x80\x02}q\x00X\x04", " is no UTF-8 text: 'utf-8' codec can't decode"),
    "binary further down": (b'{"a": 1}\n' * 9999 + b"\xff", " is no UTF-8 text: "),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), " is no UTF-8 text: "),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(refused: Callable[[Any], str], content: str | bytes, message: str) -> None:
    """The line and the reason are named."""
    assert message in refused(content)


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", '[{"a": 1}, 2]', '{\n"a": 1\n}', '{"log_history": 5}', '{\n"log_history": [1]\n}'],
)
def test_json_of_another_shape(refused: Callable[[Any], str], content: str) -> None:
    assert "holds neither a list of objects nor" in refused(content)


def test_rows_before_a_broken_line_can_be_had(path: Path) -> None:
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"\n{"a": 3}\n')
    rows = iter(HistoryFile(path))
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(HistoryError, match="line 3"):
        next(rows)


def test_what_cannot_be_opened_raises_as_open_does(tmp_path: Path) -> None:
    """When it is read, not before."""
    with pytest.raises(FileNotFoundError):
        next(iter(HistoryFile(tmp_path / "nothing.jsonl")))
    with pytest.raises(OSError, match="directory"):
        next(iter(HistoryFile(tmp_path)))


# --- chunks -------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(1, 8))
def test_chunks_are_the_rows_in_order(number: int, size: int) -> None:
    """All are of that size but the last, and none is empty."""
    rows: list[Row] = [{"step": step} for step in range(number)]
    chunks = list(in_chunks(iter(rows), size))
    assert [row for chunk in chunks for row in chunk] == rows
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(1 <= len(chunk) <= size for chunk in chunks)


def test_chunks_are_made_as_they_are_asked_for() -> None:
    """So that a file of any length takes the memory of one, and of the next row."""
    rows = iter([{"step": step} for step in range(10)])
    next(in_chunks(rows, 4))
    assert next(rows) == {"step": 5}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_rows_of_one_step_that_complete_each_other_are_one(size: int) -> None:
    """As Lightning writes them into a CSV, where each has all columns."""
    rows: list[Row] = [
        {"step": 1, "loss": 3.0, "epoch": 0, "grad_norm/T1": ""},
        {"step": 1, "loss": "", "epoch": 0, "grad_norm/T1": 0.5},
        {"step": 2, "loss": 2.0, "epoch": None},
    ]
    found = [row for chunk in in_chunks(rows, size) for row in chunk]
    assert found == [{"step": 1, "loss": 3.0, "epoch": 0, "grad_norm/T1": 0.5}, rows[2]]


def test_gradients_of_two_ranks_are_no_parts_of_one_row() -> None:
    rows: list[Row] = [
        {"step": 1, "grad/[T1]/T1.weight": 0.5},
        {"step": 1, "grad/[inactive]/T1.weight": 1e-7},
    ]
    assert list(in_chunks(rows, 4)) == [rows]


@pytest.mark.parametrize(
    "second",
    [
        {"step": 1, "loss": 2.0},
        {"step": 2, "grad_norm/T1": 0.5},
        {"step": "", "grad_norm/T1": 0.5},
        {"grad_norm/T1": 0.5},
        {"global_step": 1, "grad_norm/T1": 0.5},
    ],
    ids=["loss again", "next step", "empty step", "no step", "another kind of step"],
)
def test_other_rows_stay_apart(second: Row) -> None:
    """Two ranks that write into one file have the same steps; what they say stays apart."""
    first: Row = {"step": 1, "loss": 3.0}
    assert list(in_chunks([first, second], 4)) == [[first, second]]


def test_any_mapping_is_a_row_and_nothing_else() -> None:
    (chunk,) = in_chunks([MappingProxyType({"a": 1})], 4)
    assert chunk == [{"a": 1}]
    for row in ("a", 1, None, [("a", 1)]):
        with pytest.raises(TypeError, match="`history` must be a mapping of metrics, got "):
            list(in_chunks([{}, row], 4))  # type: ignore[list-item]
