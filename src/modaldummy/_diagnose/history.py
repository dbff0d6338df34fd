"""Reads files of logged metrics: JSON lines, CSV, JSON as Hugging Face's Trainer writes it."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from os import PathLike
from typing import IO, Any, TypeAlias

from modaldummy._diagnose.keys import STEPS, role_of
from modaldummy._errors import HistoryError

Row: TypeAlias = Mapping[str, Any]

_DELIMITERS = ",;\t"
_LONGEST = 2**24  # characters of a row's line; that of /dev/zero, for one, never ends
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
        blank = 0
        while (start := file.readline(_LONGEST)).isspace():
            blank += 1
        if not start:
            raise HistoryError(f"{self.path} is empty.")
        # What was read is not read again: a pipe has it only once.
        lines = chain(repeat("\n", blank), self._lines(file, start, blank + 1))
        if start.lstrip()[0] not in "[{":
            return self._csv(lines, start)
        try:
            first = json.loads(start)
        except json.JSONDecodeError:
            # A whole file, over several lines; or a single line that was cut off.
            return self._json(start + file.read(), blank)
        except (ValueError, RecursionError) as error:
            raise self._error(blank + 1, _reason(error)) from error
        whole = isinstance(first, list) or (isinstance(first, dict) and "log_history" in first)
        return self._json(start + file.read(), blank) if whole else self._json_lines(lines)

    def _lines(self, file: IO[str], line: str, number: int) -> Iterator[str]:
        """The lines from this one on, which has that number."""
        while line:
            if len(line) == _LONGEST:
                raise self._error(number, f"more than {_LONGEST:,} characters")
            yield line
            line = file.readline(_LONGEST)
            number += 1

    def _json(self, text: str, blank: int) -> Iterator[Row]:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._error(blank + error.lineno, _reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise HistoryError(f"{self.path}: {_reason(error)}.") from error
        rows = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise HistoryError(
                f"{self.path} holds neither a list of objects nor an object with such a list at "
                "`log_history`; write one JSON object a line, with a number for each metric."
            )
        yield from rows

    def _json_lines(self, lines: Iterable[str]) -> Iterator[Row]:
        broken: HistoryError | None = None
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            if broken:
                raise broken
            try:
                row = _decode(line)
            except json.JSONDecodeError as error:
                broken = self._error(number, _reason(error))
                continue
            except (ValueError, RecursionError) as error:
                raise self._error(number, _reason(error)) from error
            if not isinstance(row, dict):
                raise self._error(number, f"expected an object, got {line.strip()[:40]!r}")
            yield row
        if broken:
            self.notes.append(f"The last line was cut off and is left out: {broken}")

    def _csv(self, lines: Iterable[str], header: str) -> Iterator[Row]:
        # Names of runs, which stand in quotes, may hold anything.
        delimiter = max(_DELIMITERS, key=re.sub('"[^"]*"', "", header).count)
        names: list[str] = []
        broken: HistoryError | None = None
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
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
    whole: dict[str, Any] | None = None  # the last row, where it has been joined
    for row in rows:
        if type(row) is not dict and not isinstance(row, Mapping):
            raise TypeError(f"A row of `history` must be a mapping of metrics, got {row!r}.")
        if chunk and (more := _parts(chunk[-1], row)) is not None:
            if whole is None:
                chunk[-1] = whole = {**chunk[-1]}
            whole |= more
            continue
        if len(chunk) == size:
            yield chunk
            chunk = []
        whole = None
        chunk.append(row)
    if chunk:
        yield chunk


def _parts(last: Row, row: Row) -> dict[str, Any] | None:
    """What `row` adds to the last one if both are parts of one row; None if they are not.

    They are of the same step, and no known quantity is in both. Lightning writes a row of its own
    beside that of each callback.
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
    return told


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


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "brackets within brackets, too many of them"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)  # an integer of thousands of digits
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
