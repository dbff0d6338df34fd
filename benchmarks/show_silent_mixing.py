"""How wrong gradients get where ranks hold different modalities, without us and with us.

Three towers and a trunk run for a few steps under an engine, on gloo ranks of this machine. After
each backward pass every gradient is held against the truth: the average over ranks that one process
computes in float64. Shown is the largest error, over the largest true gradient, for

- no help: the loss is backwarded as it is;
- total: `wrapper.total(loss, batch)` is;
- check_ranks: that, with `check_ranks(wrapper, batch, model=engine)` before forward.

A dummy of 1e-7 counts as an error of 1e-7, and a gradient that is None as zero. Each cell is the
worst of several cases: towers of one shape, where all that is mixed up fits, and of three; ranks
that hold one modality each, one or all, and one or none. A case need not end in a number: `refused`
and the name of our error, `process ended`, `stops` and the first words of the error, or `hangs`,
where a rank gave up waiting. Parameters are not moved, so that no step depends on another.

ZeRO takes DeepSpeed, with its default configuration, and is left out where that is not installed.
All takes some minutes: each case that ends a process is followed by new ones.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from from_tests import Fleet, RankError
from measure import environment, result_path, write_csv
from mixing import ENGINES, HOLDINGS, STEPS, TOWERS, WAYS, measured
from modaldummy import ModalDummyError

TIMEOUT = 8  # seconds until a rank that waits for another gives up
LIMIT = 120  # seconds until ranks that do not answer are given up

FINISHED = "finished"

Rows = list[dict[str, Any]]


def main() -> None:
    """Measure all engines, and print and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as each rank, for the rows
    rows: Rows = []
    # DeepSpeed logs a lot, and what gloo prints as it ends a process is told anyway.
    with Fleet(arguments.ranks, timeout=TIMEOUT, limit=LIMIT, quiet=True) as fleet:
        for engine in arguments.engines:
            if engine.startswith("ZeRO") and find_spec("deepspeed") is None:
                print(f"{engine}: not measured, DeepSpeed is not installed.")
            else:
                rows += measure(fleet, engine)
    if not rows:
        sys.exit("Nothing was measured.")
    print_table(rows)
    if arguments.csv is not None:
        path = result_path(arguments.csv, "show_silent_mixing.csv", torch.device("cpu"))
        write_csv(path, rows)


def measure(
    fleet: Fleet,
    engine: str,
    towers: Sequence[str] = tuple(TOWERS),
    holdings: Sequence[str] = tuple(HOLDINGS),
) -> Rows:
    """One row for each way and case."""
    print(engine, file=sys.stderr)
    surroundings = environment(torch.device("cpu"))
    surroundings["deepspeed"] = version("deepspeed") if engine.startswith("ZeRO") else None
    rows: Rows = []
    for way, shape, holding in itertools.product(WAYS, towers, holdings):
        found = ending_of(fleet, engine, way, shape, holding)
        row: dict[str, Any] = {"what": "gradients", "engine": engine, "ranks": fleet.num_ranks}
        row |= {"way": way, "towers": shape, "ranks_hold": holding, "steps": STEPS}
        if isinstance(found, str):
            row |= {"error": None, "largest_gradient": None, "ending": found}
        else:
            row |= {"error": found[0], "largest_gradient": found[1], "ending": FINISHED}
        rows.append(row | surroundings)
    return rows


def print_table(rows: Rows) -> None:
    """A cell for each engine and way."""
    first = rows[0]
    print(f"{first['device']}, {first['ranks']} gloo ranks, torch {first['torch']}")
    print("largest error / largest true gradient, and what did not end in numbers")
    cells = [["", *WAYS]]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        cells.append([engine, *(cell([r for r in own if r["way"] == way]) for way in WAYS)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(" | ".join(f"{word:{n}}" for word, n in zip(line, widths, strict=True)).rstrip())


def cell(rows: Rows) -> str:
    """Such as `0.52 / 1.3; in 2 of 6 process ended`."""
    finished = [row for row in rows if row["ending"] == FINISHED]
    parts = []
    if finished:
        # NaN is the worst of all.
        worst = max(finished, key=lambda r: math.inf if math.isnan(r["error"]) else r["error"])
        parts.append(f"{worst['error']:.2g} / {worst['largest_gradient']:.2g}")
    endings = [row["ending"] for row in rows if row["ending"] != FINISHED]
    for ending in dict.fromkeys(endings):
        number = endings.count(ending)
        parts.append(ending if number == len(rows) else f"in {number} of {len(rows)} {ending}")
    return "; ".join(parts)


def ending_of(fleet: Fleet, *case: str) -> tuple[float, float] | str:
    """Largest error and largest gradient over all ranks; or how it ended."""
    answers = [_ending(answer) for answer in fleet.answers(tried, fleet.num_ranks, *case)]
    endings = [answer for answer in answers if isinstance(answer, str)]
    if not endings:
        errors, sizes = zip(*answers, strict=True)
        # Of the built-in `max` a NaN may go unseen.
        return float(torch.tensor(errors).max()), max(sizes)
    # Where one has gone, the others say that they wait or were left.
    order = ("refused", "process ended", "stops", "hangs")
    return min(endings, key=lambda ending: order.index(ending.partition(":")[0]))


def tried(rank: int, *case: Any) -> tuple[float, float] | str:
    """What was measured; or which error of ours it was, after which all ranks can go on."""
    try:
        return measured(rank, *case)
    except ModalDummyError as error:
        return f"refused: {type(error).__name__}"


def _ending(answer: Any) -> Any:
    if not isinstance(answer, RankError):
        return answer
    if answer.kind == "gone":
        return "process ended"
    waited = any(words in answer.message for words in ("Timed out", "Connection", "no answer"))
    return "hangs" if waited else f"stops: {' '.join(answer.message.split()[:6])}"


if __name__ == "__main__":
    main()
