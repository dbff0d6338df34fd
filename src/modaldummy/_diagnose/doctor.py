"""The command `python -m modaldummy doctor`."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, TextIO

from modaldummy._diagnose.diagnose import CHECKS, Diagnosis, examine
from modaldummy._errors import first_few

_IGNORED = 5  # names of columns that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("path", help="JSON lines, CSV, a JSON list or trainer_state.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw the run, and when what was found")
    parser.add_argument(
        "--scale", type=scale, default=1e-7, help="that of the wrapper, or none (default: 1e-7)"
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="another threshold than the usual one, such as unrest=3",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read a log, print what it says.

    Returns:
        0 if no check found an error or a warning, 1 if one did, 2 if the log cannot be read, the
        picture cannot be written or a threshold is unknown.
    """
    if arguments.plot and find_spec("matplotlib") is None:
        return _fail("--plot needs matplotlib: pip install matplotlib")
    try:
        diagnosis = examine(
            arguments.path, scale=arguments.scale, thresholds=dict(arguments.threshold)
        )
    except OSError as error:
        return _fail(f"{error.filename or arguments.path}: {error.strerror or error}.")
    except (TypeError, ValueError) as error:
        return _fail(str(error))
    if arguments.plot:
        from modaldummy._diagnose.picture import draw

        try:
            draw(diagnosis, str(arguments.path), arguments.plot)
        except (OSError, ArithmeticError, ValueError) as error:  # numbers near the ends, too
            return _fail(f"The run cannot be drawn: {error}.")
    if arguments.json:
        print(json.dumps(_for_json(_content(arguments.path, diagnosis)), indent=2))
    else:
        lines = report(arguments.path, diagnosis)
        print(*(_printable(line, sys.stdout) for line in lines), sep="\n")
    return 0 if diagnosis.is_healthy else 1


def report(path: object, diagnosis: Diagnosis) -> Iterator[str]:
    """The lines that people read."""
    signals = diagnosis.evidence.signals
    yield f"{path}: {signals.num_rows:,} rows"
    for note in diagnosis.notes:
        yield f"Note: {note}"
    for finding in diagnosis.findings:
        yield from ("", str(finding))
    for title, lines in (
        ("Healthy:", {name: sign.text for name, sign in diagnosis.signs.items()}),
        ("Not checked:", diagnosis.unchecked),
    ):
        if lines:
            yield from ("", title, *(f"  {name}: {text}" for name, text in lines.items()))
    if signals.ignored:
        yield f"\nColumns without a meaning here: {first_few(signals.ignored, _IGNORED)}"
    yield f"\n{verdict(diagnosis)}"


def verdict(diagnosis: Diagnosis) -> str:
    """One sentence."""
    if diagnosis.is_healthy:
        return f"Nothing wrong in {len(diagnosis.signs)} checks."
    bad = [finding for finding in diagnosis.findings if finding.severity != "info"]
    codes = ", ".join(finding.code for finding in bad)
    made = len(CHECKS) - len(diagnosis.unchecked)
    return f"{len(bad)} of {made} checks found something: {codes}."


def _content(path: str, diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "path": path,
        "rows": diagnosis.evidence.signals.num_rows,
        "healthy": diagnosis.is_healthy,
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "signs": {name: sign._asdict() for name, sign in diagnosis.signs.items()},
        "unchecked": diagnosis.unchecked,
        "ignored": list(diagnosis.evidence.signals.ignored),
        "notes": diagnosis.notes,
    }


def _for_json(value: Any) -> Any:
    """The same without NaN and infinity, of which JSON knows nothing."""
    if isinstance(value, Mapping):
        return {name: _for_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_for_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fail(reason: str) -> int:
    print(_printable(reason, sys.stderr), file=sys.stderr)
    return 2


def _printable(text: str, file: TextIO) -> str:
    """As it is, but for what would steer a terminal or cannot be shown: keys may be anything."""
    text = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )
    encoding = file.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def scale(text: str) -> float | None:
    """The value of `--scale`."""
    return None if text.lower() == "none" else float(text)


def threshold(text: str) -> tuple[str, float]:
    """The value of `--threshold`."""
    name, number = text.split("=")
    return name, float(number)
