"""Reads files of logged metrics: JSON lines, CSV, JSON as Hugging Face's Trainer writes it."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from os import PathLike
from typing import IO, Any, TypeAlias

from modaldummy._diagnose.keys import STEPS, role_of
from modaldummy._errors import HistoryError

Row: TypeAlias = Mapping[str, Any]

_DELIMITERS = ",;\t"
_LONGEST = 2**24  # characters of a row's line; that of /dev/zero, for one, never ends


class HistoryFile:
    """The rows of a file of logged metrics, one after the other.

    The content tells the format: one JSON object a line, or a header and comma-separated values
    below it (semicolons and tabs work too), or JSON as a whole: a list of objects, or an object
    with such a list at `log_history`. Only the last is read into memory as a
    whole. A last line that was cut off, as where a run was killed, is left out.

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
        cut: HistoryError | None = None
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            try:
                for row in self._rows(file):
                    if cut:
                        raise cut
                    if isinstance(row, HistoryError):
                        cut = row
                    else:
                        yield row
            except UnicodeDecodeError as error:
                raise HistoryError(f"{self.path} is no UTF-8 text: {error}.") from error
        if cut:
            self.notes.append(f"The last line was cut off and is left out: {cut}")

    def _rows(self, file: IO[str]) -> Iterator[Row | HistoryError]:
        """The rows; for a line that is no row, unless it is the last one, an error."""
        read = [file.readline(_LONGEST)]
        while read[-1].isspace():
            read.append(file.readline(_LONGEST))
        if not read[-1]:
            raise HistoryError(f"{self.path} is empty.")
        is_json = read[-1].lstrip()[0] in "[{"
        if is_json and _is_whole(read[-1]):
            return self._json("".join(read) + file.read())
        # What was read is not read again: a pipe has it only once.
        lines = self._lines(chain(read, iter(lambda: file.readline(_LONGEST), "")))
        return self._json_lines(lines) if is_json else self._csv(lines, read[-1])

    def _lines(self, lines: Iterable[str]) -> Iterator[str]:
        """The same, none of which is too long."""
        for number, line in enumerate(lines, start=1):
            if len(line) == _LONGEST:
                raise self._error(number, f"more than {_LONGEST:,} characters")
            yield line

    def _json(self, text: str) -> Iterator[Row]:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._error(error.lineno, _reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise HistoryError(f"{self.path}: {_reason(error)}.") from error
        rows = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise HistoryError(
                f"{self.path} contains neither a list of objects nor an object with such a list at "
                "`log_history`; write one JSON object a line, with a number for each metric."
            )
        yield from rows

    def _json_lines(self, lines: Iterable[str]) -> Iterator[Row | HistoryError]:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield self._error(number, _reason(error))
                continue
            except (ValueError, RecursionError) as error:
                raise self._error(number, _reason(error)) from error
            if not isinstance(row, dict):
                raise self._error(number, f"expected an object, got {line.strip()[:40]!r}")
            yield row

    def _csv(self, lines: Iterable[str], header: str) -> Iterator[Row | HistoryError]:
        # Names of runs, which stand in quotes, may contain anything.
        delimiter = max(_DELIMITERS, key=re.sub('"[^"]*"', "", header).count)
        names: list[str] = []
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if len(row) < 2 and not "".join(row).strip():
                    continue
                if not names and len(row) < 2:
                    reason = "neither JSON nor a CSV header of several columns"
                    raise self._error(reader.line_num, f"{reason}: {row[0].strip()[:40]!r}")
                if not names:
                    names = row
                elif len(row) == len(names):
                    yield {name: value or None for name, value in zip(names, row, strict=True)}
                else:
                    reason = f"{len(row)} values under {len(names)} columns"
                    wrong = self._error(reader.line_num, reason)
                    if len(row) > len(names):  # not cut off
                        raise wrong
                    yield wrong
        except csv.Error as error:
            raise self._error(reader.line_num, str(error)) from error

    def _error(self, line: int, reason: str) -> HistoryError:
        return HistoryError(f"{self.path}, line {line}: {reason}.")


def join_parts(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, where those that are parts of one are joined.

    Raises:
        TypeError: A row is not a mapping.
    """
    last: dict[str, Any] | None = None
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"A row of `history` must be a mapping of metrics, got {row!r}.")
        if last is not None and _are_parts(last, row):
            last |= {key: value for key, value in row.items() if _says_something(value)}
            continue
        if last is not None:
            yield last
        last = dict(row)
    if last is not None:
        yield last


def _are_parts(last: Row, row: Row) -> bool:
    """Whether both are parts of one row: of the same step, and no known quantity is in both.

    Lightning writes a row of its own beside that of each callback.
    """
    step = next((key for key in STEPS if _says_something(row.get(key))), None)
    if step is None or last.get(step) != row[step]:
        return False
    both = (key for key in row if _says_something(row[key]) and _says_something(last.get(key)))
    repeated = any(role_of(str(key))[0] not in ("", "step") for key in both)
    # Labels differ from batch to batch, and so from rank to rank.
    return not repeated and not (_has_gradients(row) and _has_gradients(last))


def _has_gradients(row: Row) -> bool:
    kinds = ("label", "whole", "constant")
    return any(_says_something(row[key]) and role_of(str(key))[0] in kinds for key in row)


def _says_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value)


def _is_whole(line: str) -> bool:
    """Whether a file whose first line this is, is JSON as a whole, and not an object a line."""
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # it goes on; or it is a single line that was cut off
        return True
    return isinstance(first, list) or "log_history" in first


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "brackets within brackets, too many of them"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)  # an integer of thousands of digits
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
