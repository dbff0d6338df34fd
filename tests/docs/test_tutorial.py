"""The tutorial shows what its code prints and draws."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/tutorial.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
PICTURE = PAGE.parent / "images/tutorial.png"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run() -> tuple[list[tuple[str, str]], Path]:
    """What each snippet printed beside what the page shows, and the folder of the log."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    pairs = []
    for (kind, code), (following, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(PAGE), "exec"), namespace)
            pairs.append((printed.getvalue(), shown if following == "text" else ""))
    log: Path = namespace["log"]
    return pairs, log.parent


@pytest.fixture(scope="module")
def doctor(run: tuple[list[tuple[str, str]], Path]) -> tuple[str, Path]:
    """What its command prints beside the log, and the folder with the picture."""
    _, folder = run
    (command,) = (line for _, code in BLOCKS for line in code.splitlines() if "doctor" in line)
    arguments = command.removeprefix("$ python").split()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return f"{command}\n{done.stdout}", folder


def assert_same(printed: str, shown: str) -> None:
    """Word by word; numbers may differ by five percent, as rounding differs between machines."""
    words, expected = (re.split(r"([\s:,%()]+)", text.strip()) for text in (printed, shown))
    assert len(words) == len(expected), printed
    for word, other in zip(words, expected, strict=True):
        try:
            assert float(word) == pytest.approx(float(other), rel=0.05), printed
        except ValueError:
            assert word == other, printed


def test_the_page_shows_what_its_snippets_print(run: tuple[list[tuple[str, str]], Path]) -> None:
    pairs, _ = run
    for printed, shown in pairs:
        assert_same(printed, shown)
    assert sum(bool(shown) for _, shown in pairs) == sum(kind == "text" for kind, _ in BLOCKS) == 6


def test_the_page_shows_what_the_doctor_prints(doctor: tuple[str, Path]) -> None:
    printed, _ = doctor
    (shown,) = (code for kind, code in BLOCKS if kind == "console" and "doctor" in code)
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip() in ("", "..."):  # some that the page leaves out
            continue
        label = line.partition(":")[0]
        assert_same(next(own for own in lines if own.startswith(label)), line)


def test_the_picture_is_that_of_the_log(doctor: tuple[str, Path]) -> None:
    """Where it is not, take the new one over: the path is in the message."""
    _, folder = doctor
    drawn, shown = (Image.open(path).convert("RGB") for path in (folder / "run.png", PICTURE))
    assert drawn.size == shown.size, f"draw {PICTURE} anew from {folder}"
    difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(shown, np.int16)).max(2)
    # Fonts and the palette may differ a little; a mark elsewhere counts some hundred pixels.
    assert (difference > 64).mean() < 5e-4, f"draw {PICTURE} anew from {folder / 'run.png'}"


def test_the_picture_is_small() -> None:
    assert PICTURE.stat().st_size < 100_000
