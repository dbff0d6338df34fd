"""Logs that nobody meant: real ones that were spoilt, noise, and what is made to do harm."""

import contextlib
import functools
import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.diagnose.clinic import Run, plain

Rows = list[list[tuple[str, str]]]  # keys, and values as JSON writes them

VALUES = [
    *("1e999999", "-1e999999", "NaN", "Infinity", "-Infinity", "null", "true", "0", "-0.0", "-1"),
    *("1e-400", "5e-324", "1.7976931348623157e308", "-1.7e308", "9" * 400, "9" * 5000, "1e16"),
    *('""', '" "', '"x"', '"1e5"', '"NaN"', '"\\ud800"', '"\\u0000"', '"a,b\\n"', "'x'", "0x10"),
    *("[]", "{}", "[1, 2]", "[[1], [2]]", '{"loss": 1}', "[" * 900 + "]" * 900, "01", "1_0", ""),
]
KEYS = [
    *("loss", "train/loss", "training_loss", "step", "_step", "global_step", "train/step", "Step"),
    *("grad_norm/T1", "grad_norm/", "grad_norm", "grad_norm/T1-dMRI", "grad_norm/$x$", "grad/[]/w"),
    *("grad/[T1]/w", "grad/[inactive]/w", "grad/[active]/w", "grad/T1/w", "grad/a.b", "active/T1"),
    *("active/", "active/\n", "modaldummy/active/T1", "modaldummy/real", "modaldummy/dummy"),
    *("modaldummy/fraction", "modaldummy/uncapped", "modaldummy/num_params", "grad_missing/T1"),
    *("grad_ratio", "grad_ranks", "log_history", "run - loss", "loss__MIN", "a - b - step", "/"),
    *("", " ", "\ud800", "\x1b[31mred", "\x00", "\u202e", "0", "a" * 2000, "a/" * 400),
    *("active/a", "active/a-a", "grad_norm/" + "a-" * 30 + "b", "grad_norm/" + "a-" * 400 + "a"),
]
ALPHABET = '[]{}":,\n\r\t ;0123456789.eE+-aNuls\\/\x00\ufeffé'
PIECES = [
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"', b'""', b",", b";", b"\t"),
    *(b"[", b"]", b"{", b"}", b":", b"\\", b"\\u", b"\xed\xa0\x80", b"\xf0\x9f", b" ", b"\x1a"),
    *(b"NaN", b"1e999999", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"\x1b[2J", b"log_history"),
]


@dataclass(frozen=True)
class Log:
    """A file that the doctor is shown.

    Attributes:
        place: What it is: a `file`, a `pipe`, a `folder`, `unreadable`, or the path of a device.
        wants: Options of the command: `text`, `json` or `plot`.
    """

    content: bytes
    place: str = "file"
    wants: str = "text"


@contextlib.contextmanager
def placed(log: Log, folder: Path) -> Iterator[str]:
    """The path of a log; of a pipe, somebody writes into its other end."""
    path = folder / "log"
    if log.place.startswith("/"):
        yield log.place
    elif log.place == "pipe":
        os.mkfifo(path)
        writer = threading.Thread(target=_feed, args=(path, log.content), daemon=True)
        writer.start()
        yield str(path)
        path.unlink()
        writer.join()
    elif log.place == "missing":
        yield str(path)
    elif log.place == "folder":
        yield str(folder)
    else:
        path.write_bytes(log.content)
        path.chmod(0o200 if log.place == "unreadable" else 0o600)
        yield str(path)
        path.unlink()


def _feed(path: Path, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(path, "wb") as pipe:
        pipe.write(content)


def make(random: Random) -> Log:
    """Any log; the same for the same state of `random`."""
    wants = random.choices(["text", "json", "plot"], [150, 150, 1])[0]
    place = random.choices(["file", "pipe"], [200, 1])[0]
    kind = random.random()
    if kind < 0.05:
        content = random.randbytes(random.randrange(200))
    elif kind < 0.15:
        text = "".join(random.choices(ALPHABET, k=random.randrange(120)))
        content = text.encode()
    else:
        content = write(random, _rows(random))
    for _ in range(random.choice([0, 0, 0, 0, 1, 1, 2, 5])):
        content = _spoil(random, content)
    if random.random() < 0.02:
        content = gzip.compress(content) if random.random() < 0.5 else _utf_16(content)
    return Log(content, place, wants)


@functools.cache
def _real() -> tuple[Rows, ...]:
    """What small runs log, with labels and without."""
    runs = [Run(steps=40), Run(steps=40, label=False), Run(steps=40, scale=1e-2)]
    return tuple(
        [[(key, json.dumps(value)) for key, value in row.items()] for row in plain(run)]
        for run in runs
    )


def _rows(random: Random) -> Rows:
    """A part of a real log, in which some values, keys and rows are others."""
    real = random.choice(_real())
    start, step = random.randrange(len(real)), random.choice([1, 1, 1, 3])
    rows = [list(row) for row in real[start : start + random.choice([1, 2, 6, 40]) : step]]
    if random.random() < 0.1:
        rows = [[(random.choice(KEYS), _value(random)) for _ in range(4)] for _ in rows]
    for _ in range(random.choice([0, 1, 2, 4, 16])):
        row = random.choice(rows)
        edit = random.randrange(6)
        if edit == 0:
            row.append((random.choice(KEYS), _value(random)))
        elif edit == 1:
            rows.insert(random.randrange(len(rows) + 1), list(row))
        elif edit == 2:
            random.shuffle(row)
        elif row:
            place = random.randrange(len(row))
            key, value = row[place]
            new = {3: (key, _value(random)), 4: (random.choice(KEYS), value)}.get(edit)
            row[place : place + 1] = [new] if new else []
    if random.random() < 0.1:  # a column of nothing but one value
        key, value = random.choice(KEYS), _value(random)
        for row in rows:
            row.append((key, value))
    return rows


def _value(random: Random) -> str:
    return random.choice(VALUES) if random.random() < 0.7 else repr(random.gauss(0, 10) ** 9)


def write(random: Random, rows: Rows) -> bytes:
    """Rows in one of the forms that are read."""
    form = random.choice(["lines", "lines", "list", "state", "csv", "wandb"])
    end = random.choice(["\n", "\n", "\n", "\r\n", "\r", "\n\n", "\n\r"])
    if form in ("csv", "wandb"):
        return _table(random, rows, end, "run, 1 - " if form == "wandb" else "").encode(
            errors="surrogatepass"
        )
    objects = [
        "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in row) + "}" for row in rows
    ]
    if form == "lines":
        return (end.join(objects) + end).encode()
    text = "[" + random.choice([", ", ",\n"]).join(objects) + "]"
    return (f'{{"best_metric": null, "log_history": {text}}}' if form == "state" else text).encode()


def _table(random: Random, rows: Rows, end: str, prefix: str) -> str:
    delimiter = random.choice([",", ",", ";", "\t"])
    names = list(dict.fromkeys(key for row in rows for key, _ in row))
    table = [[f'"{prefix}{name}"' for name in names]]
    for row in rows:
        values = dict(row)
        table.append([values.get(name, "").strip('"') for name in names])
    return end.join(delimiter.join(cells) for cells in table) + end


def _spoil(random: Random, content: bytes) -> bytes:
    """Bytes that are lost, doubled, moved, put in or others."""
    start = random.randrange(len(content) + 1)
    stop = min(len(content), start + random.choice([1, 1, 8, 100, 1000]))
    head, middle, tail = content[:start], content[start:stop], content[stop:]
    edit = random.randrange(6)
    if edit == 0:
        return head + tail
    if edit == 1:
        return head + middle + middle + tail
    if edit == 2:
        return head + random.choice(PIECES) + middle + tail
    if edit == 3:
        return head + bytes(byte ^ 1 << random.randrange(8) for byte in middle[:1]) + middle[1:]
    if edit == 4:
        return head
    return middle + head + tail


def _utf_16(content: bytes) -> bytes:
    return content.decode(errors="replace").encode("utf-16")


def _lines(number: int, line: str) -> bytes:
    return "".join(line % (step, step) for step in range(number)).encode()


_DEEP, _LONG = 100_000, 50_000_000
# What takes long to make or to read; each is shown once, at the start of a run.
MONSTERS: dict[str, Callable[[], Log]] = {
    "empty": lambda: Log(b""),
    "white space": lambda: Log(b" \n" * 100_000),
    "NUL bytes": lambda: Log(b"\0" * 100_000),
    "gzip": lambda: Log(gzip.compress(b'{"loss": 1.0}\n' * 1000)),
    "a folder": lambda: Log(b"", "folder"),
    "unreadable": lambda: Log(b'{"loss": 1.0}', "unreadable"),
    "missing": lambda: Log(b"", "missing"),
    "endless zeros": lambda: Log(b"", "/dev/zero"),
    "nothing": lambda: Log(b"", "/dev/null"),
    "noise without end": lambda: Log(b"", "/dev/urandom"),
    "memory of a process": lambda: Log(b"", "/proc/self/mem"),
    "open brackets": lambda: Log(b"[" * _DEEP),
    "brackets": lambda: Log(b"[" * _DEEP + b"]" * _DEEP),
    "open braces": lambda: Log(b'{"loss":' * _DEEP),
    "brackets in a value": lambda: Log(b'{"loss": 1}\n{"loss": ' + b"[" * _DEEP + b"]" * _DEEP),
    "brackets over lines": lambda: Log(b"[\n" * _DEEP),
    "digits in a line": lambda: Log(b'{"loss": 1}\n{"loss": ' + b"9" * _DEEP + b"}\n"),
    "digits in the first line": lambda: Log(b'{"loss": ' + b"9" * _DEEP + b"}\n"),
    "digits in a list": lambda: Log(b'[\n{"loss": ' + b"9" * _DEEP + b"}]"),
    "digits in a table": lambda: Log(b"step,loss\n1," + b"9" * _DEEP),
    "a line of cells": lambda: Log(b"x," * (_LONG // 2)),
    "a line of text": lambda: Log(b'{"loss": 1, "x": "' + b"x" * _LONG + b'"}\n'),
    "a second line of text": lambda: Log(b'{"loss": 1}\n{"x": "' + b"x" * _LONG + b'"}\n'),
    "an open quote": lambda: Log(b'a,b\n1,"' + b"x" * 1_000_000),
    "empty lists": lambda: Log(b"[" + b"[]," * 300_000 + b"[]]"),
    "columns": lambda: Log(json.dumps([{f"active/m{i}": i % 2 for i in range(9000)}] * 3).encode()),
    "columns of a table": lambda: Log((",".join(f"grad_norm/{i}" for i in range(9000))).encode()),
    "another column in each row": lambda: Log(_lines(3000, '{"grad_norm/%d": %d}\n')),
    "another unknown column in each row": lambda: Log(_lines(9000, '{"step": 1, "x%d": %d}\n')),
    "a parameter in each row": lambda: Log(_lines(1500, '{"grad/[T1]/w%d": 1, "step": %d}\n')),
    "a name that can be split in many ways": lambda: Log(
        json.dumps({"active/a": 1, "active/a-a": 1, f"grad_norm/{'a-' * 200}b": 1}).encode()
    ),
    "slashes": lambda: Log(json.dumps({"grad/" * 200_000 + "\n": 1, "loss": 1}).encode()),
    "keys that are double": lambda: Log(b'{"loss": 1' + b', "loss": 2' * 100_000 + b"}"),
    "numbers near the ends": lambda: Log(
        _lines(30, '{"step": %d, "loss": 1e308}\n{"step": %de307, "loss": -1e308}\n'), wants="plot"
    ),
}
