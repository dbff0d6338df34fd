"""Reads files of logged metrics: JSON lines, CSV, JSON as Hugging Face's Trainer writes it."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import IO, Any, TypeAlias

from modaldummy._diagnose.keys import STEPS, role_of
from modaldummy._errors import HistoryError

Row: TypeAlias = Mapping[str, Any]

_DELIMITERS = ",;\t"
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # not in the stubs


class HistoryFile:
    """The rows of a file of logged metrics, one after the other.

    The content tells the format: one JSON object a line, or a header and comma-separated values
    below it (semicolons and tabs work too), or JSON as a whole: a list of objects, or an object
    with such a list at `log_history`. Only the last is held in memory. A last line that was cut
    off, as where a run was killed, is left out.

    Attributes:
        notes: What a reader should be told, once the rows have been read.

    Raises:
        OSError: From iteration: the file cannot be opened.
        HistoryError: From iteration: a line cannot be read; it says which and why.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = path
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            try:
                yield from self._rows(file)
            except UnicodeDecodeError as error:
                raise HistoryError(f"{self.path} is no UTF-8 text: {error}.") from error

    def _rows(self, file: IO[str]) -> Iterator[Row]:
        start = ""
        while start.isspace() or not start:
            if not (start := file.readline()):
                raise HistoryError(f"{self.path} is empty.")
        file.seek(0)
        if start.lstrip()[0] not in "[{":
            return self._csv(file, start)
        try:
            first = json.loads(start)
        except json.JSONDecodeError:
            # A whole file, over several lines; or a single line that was cut off.
            return self._json(file)
        whole = isinstance(first, list) or (isinstance(first, dict) and "log_history" in first)
        return self._json(file) if whole else self._json_lines(file)

    def _json(self, file: IO[str]) -> Iterator[Row]:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise self._error(error.lineno, _reason(error)) from error
        rows = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise HistoryError(
                f"{self.path} holds neither a list of objects nor an object with such a list at "
                "`log_history`; write one JSON object a line, with a number for each metric."
            )
        yield from rows

    def _json_lines(self, file: IO[str]) -> Iterator[Row]:
        broken: HistoryError | None = None
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            if broken:
                raise broken
            try:
                row = _decode(line)
            except json.JSONDecodeError as error:
                broken = self._error(number, _reason(error))
                continue
            except ValueError as error:  # an integer of thousands of digits
                raise self._error(number, str(error)) from error
            if not isinstance(row, dict):
                raise self._error(number, f"expected an object, got {line.strip()[:40]!r}")
            yield row
        if broken:
            self.notes.append(f"The last line was cut off and is left out: {broken}")

    def _csv(self, file: IO[str], header: str) -> Iterator[Row]:
        # Names of runs, which stand in quotes, may hold anything.
        delimiter = max(_DELIMITERS, key=re.sub('"[^"]*"', "", header).count)
        names: list[str] = []
        broken: HistoryError | None = None
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if len(row) < 2 and not "".join(row).strip():
                    continue
                if broken:
                    raise broken
                if not names and len(row) < 2:
                    reason = "neither JSON nor a CSV header of several columns"
                    raise self._error(reader.line_num, f"{reason}: {row[0].strip()[:40]!r}")
                if names and len(row) != len(names):
                    reason = f"{len(row)} values under {len(names)} columns"
                    broken = self._error(reader.line_num, reason)
                    if len(row) > len(names):
                        raise broken
                elif names:
                    yield {name: value or None for name, value in zip(names, row, strict=True)}
                else:
                    names = row
        except csv.Error as error:
            raise self._error(reader.line_num, str(error)) from error
        if broken:
            self.notes.append(f"The last line was cut off and is left out: {broken}")

    def _error(self, line: int, reason: str) -> HistoryError:
        return HistoryError(f"{self.path}, line {line}: {reason}.")


def in_chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of up to `size` rows, of which those that are parts of one are joined.

    Raises:
        TypeError: A row is no mapping.
    """
    chunk: list[Row] = []
    for row in rows:
        if type(row) is not dict and not isinstance(row, Mapping):
            raise TypeError(f"A row of `history` must be a mapping of metrics, got {row!r}.")
        whole = _joined(chunk[-1], row) if chunk else None
        if whole is not None:
            chunk[-1] = whole
            continue
        if len(chunk) == size:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _joined(last: Row, row: Row) -> Row | None:
    """Two rows of the same step of which no known quantity is in both, as one; None of others.

    Lightning writes a row of its own beside that of each callback.
    """
    step = next((key for key in STEPS if _says_something(row.get(key))), None)
    if step is None or last.get(step) != row[step]:
        return None
    told = {key: value for key, value in row.items() if _says_something(value)}
    both = (key for key in told if _says_something(last.get(key)))
    if any(role_of(str(key))[0] not in ("", "step") for key in both):
        return None
    # Labels differ from batch to batch, and so from rank to rank.
    if _has_gradients(told) and _has_gradients(last):
        return None
    return {**last, **told}


def _has_gradients(row: Row) -> bool:
    kinds = ("label", "whole", "constant")
    return any(_says_something(row[key]) and role_of(str(key))[0] in kinds for key in row)


def _says_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value)


def _decode(line: str) -> Any:
    """As `json.loads`, which makes three calls more for each line."""
    try:
        value, end = _scan(line, 0)
    except StopIteration:
        return json.loads(line)
    return value if end == len(line) or line[end:].isspace() else json.loads(line)


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
