"""What the checks say of trainings whose state is known, as a page of the reference.

`python -m tools.confusion` (`make confusion`) trains all runs of the clinic with several
seeds, sets all cases of preflight up, and writes docs/reference/confusion.md.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tests.diagnose import clinic
from tests.diagnose.clinic_healthy import HEALTHY
from tests.diagnose.clinic_sick import SICK
from tests.preflight import cases as preflight_cases

from modaldummy import diagnose, preflight

PAGE = Path(__file__).parents[1] / "docs/reference/confusion.md"
# The thresholds were chosen with the first in view, not with the others.
SEEDS = (0, 10_000, 20_000, 30_000)
_HEAD = """\
# What is found where

Trainings whose state is known, and what `diagnose` and `preflight` say of them. `make confusion`
makes this page.
"""
_TRAINED = f"""
## `diagnose`

Small models on a task that can be learned, each trained {len(SEEDS)} times, with other weights,
data and batches; the thresholds were chosen with one of these in view. Counts are of trainings.
A loss that oscillates (MD205) is found only where it jumps in bursts: that of small batches looks
the same otherwise.

"""
_SET_UP = """
## `preflight`

Trainings that are set up, where nothing is left to chance, each checked once.

"""


class Result(NamedTuple):
    """A training, what should be found, and what was, once for each time it was tried."""

    name: str
    expected: set[str]
    found: list[set[str]]


def diagnoses(seeds: Sequence[int] = SEEDS) -> list[Result]:
    """Of histories of runs that are really trained, each sickness a mistake in the loop."""
    builders = {name: (set[str](), build) for name, build in HEALTHY.items()} | SICK
    results = []
    for name, (codes, build) in builders.items():
        found = []
        for clinic.SEED in seeds:
            history, options = build()
            found.append({finding.code for finding in diagnose(history, **options)})
        results.append(Result(name, codes, found))
    clinic.SEED = 0
    return results


def preflights() -> list[Result]:
    """Of trainings that are set up, without chance; needs a process group."""
    healthy = {name: (set[str](), build) for name, build in preflight_cases.HEALTHY.items()}
    sick = {name: ({case.code}, case.build) for name, case in preflight_cases.SICK.items()}
    return [
        Result(name, codes, [{finding.code for finding in preflight(**build())}])
        for name, (codes, build) in (healthy | sick).items()
    ]


def page() -> str:
    """The page as Markdown; needs a process group."""
    parts = [_HEAD, _TRAINED, *_table(diagnoses()), _SET_UP, *_table(preflights())]
    return "".join(parts)


def _table(results: list[Result]) -> Iterator[str]:
    codes = sorted({code for _, expected, found in results for code in expected.union(*found)})
    yield "| code | there | found | missed | found in healthy ones | found in others |\n"
    yield "|---|---|---|---|---|---|\n"
    for code in codes:
        tries = [(e, one) for _, e, found in results for one in found]
        there = sum(code in expected for expected, _ in tries)
        found = sum(code in expected and code in one for expected, one in tries)
        healthy = sum(not expected and code in one for expected, one in tries)
        others = sum(bool(e) and code not in e and code in one for e, one in tries)
        yield f"| {code} | {there} | {found} | {there - found} | {healthy} | {others} |\n"
    yield "\n| training | should be found | found |\n|---|---|---|\n"
    for name, expected, found_here in sorted(results, key=lambda result: not result.expected):
        yield f"| {name} | {_words(expected)} | {_counts(found_here)} |\n"


def _counts(found: list[set[str]]) -> str:
    """Each code, with how often it was found where that is not always."""
    times = Counter(code for one in found for code in one)
    words = [
        code if times[code] == len(found) else f"{code} ({times[code]} of {len(found)})"
        for code in sorted(times)
    ]
    return ", ".join(words) or "nothing"


def _words(codes: set[str]) -> str:
    return ", ".join(sorted(codes)) or "nothing"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in the stubs
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    PAGE.write_text(page(), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
