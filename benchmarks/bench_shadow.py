"""What a step costs where a rank has no images: with a shadow, and with fakes written by hand.

A model has a tower for images and a trunk for texts. Rank 0 has texts and images, rank 1 has texts.
On rank 1 the tower runs as a shadow, recorded on one patch, or the model itself runs it on zeros
and adds its output times zero: on one patch, or on as many images as rank 0 has. Contenders without
a shadow do not use the library. The last two have images on both ranks, so that no rank is
inactive.

A step is forward, loss, backward with all collectives, and SGD with a learning rate of zero. All
contenders are timed in one run and take turns. Ranks wait for each other before each step. Its time
is that of the slowest rank, and that is the rank with images; `busy` is the processor time of the
process of rank 1, without what it waits. Before anything is timed, gradients of contenders are
compared on each rank.

`peak` is the memory that torch allocates in a step of rank 1, at its highest, beyond what it had
before. torch's profiler counts it, the lowest of five steps: the profiler misses what threads of
gloo free, and it does not see what they allocate. `record` is what stays alive because of the
shadow: the bytes of all tensors of the process with it, less those without.

glibc returns large freed buffers to the system at once: the benchmark starts itself again with
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set high, which the ranks inherit.
"""

import argparse
import itertools
from typing import Any

import numpy as np
import torch

from bench_step import interval, with_interval
from from_tests import Fleet
from measure import (
    Times,
    environment,
    keep_memory,
    percentiles,
    print_environment,
    result_path,
    take_turns,
    work,
    write_csv,
)
from shadow_steps import (
    ALL,
    ALL_SHADOW,
    BOTH_RANKS,
    CONTENDERS,
    ENGINES,
    ONE_RANK,
    REAL,
    SHADOW,
    SMALLEST,
    Size,
    Training,
    check,
)
from targets import verdict

CPU = torch.device("cpu")
LIMIT = 3600  # seconds for all rounds of an engine
# What a contender is compared with, and in what.
BASES = {"smallest": SMALLEST, "real": REAL, "all": ALL}
KINDS = ("step", "forward", "busy")
COMPARED = ((SHADOW, "smallest"), (SHADOW, "real"), (SHADOW, "all"), (ALL_SHADOW, "all"))
# The most that a ratio may be.
AIMS = {
    (SHADOW, "step_to_smallest"): 1.05,
    (SHADOW, "busy_to_smallest"): 1.05,
    (SHADOW, "busy_to_real"): 0.8,
    (ALL_SHADOW, "step_to_all"): 1.02,
    (ALL_SHADOW, "forward_to_all"): 1.02,
    (ALL_SHADOW, "busy_to_all"): 1.02,
}

Rows = list[dict[str, Any]]
Seconds = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    """Measure under each engine, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--width", type=int, default=192, help="a multiple of 12")
    parser.add_argument("--layers", type=int, default=4, help="of the tower, and of the trunk")
    parser.add_argument("--samples", type=int, default=2, help="in the batch of a rank")
    parser.add_argument("--patches", type=int, default=196, help="in an image")
    parser.add_argument("--tokens", type=int, default=32, help="in a text")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)  # as each rank, for the rows
    size = Size(given.width, given.layers, given.samples, given.patches, given.tokens)
    rows = [row for engine in given.engine for row in measure(engine, size, given.rounds)]
    print_tables(rows)
    if given.csv is not None:
        write_csv(result_path(given.csv, "bench_shadow.csv", CPU), rows)


def measure(engine: str, size: Size, rounds: int) -> Rows:
    """One row for each contender."""
    with Fleet(2, limit=LIMIT, quiet=True) as fleet:  # engines and profiler print much
        ranks = fleet.ask(measured, engine, size, rounds)
    found = {name: seconds([rank[name]["times"] for rank in ranks]) for name in CONTENDERS}
    rows = []
    for name in CONTENDERS:
        row: dict[str, Any] = {"what": "training step", "engine": engine, "contender": name}
        row |= percentiles(found[name]["step"])
        row["busy_ms"] = percentiles(found[name]["busy"])["p50_ms"]
        for kind, (base, other) in itertools.product(KINDS, BASES.items()):
            ratios, title = found[name][kind] / found[other][kind], f"{kind}_to_{base}"
            low, high = interval(ratios)
            row |= {title: float(np.median(ratios)), f"{title}_low": low, f"{title}_high": high}
        row |= ranks[1][name]["counts"] | {"rounds": rounds} | vars(size)
        rows.append(row | environment(CPU))
    return rows


def measured(rank: int, engine: str, size: Size, rounds: int) -> dict[str, dict[str, Any]]:
    """Times and counts of each contender on this rank, once their gradients are right."""
    found = {name: Training(name, engine, size) for name in CONTENDERS}
    check(found, ONE_RANK)
    check(found, BOTH_RANKS)
    times = take_turns({name: one.contender for name, one in found.items()}, rounds, CPU)
    return {name: {"times": times[name], "counts": counts(one)} for name, one in found.items()}


def counts(training: Training) -> dict[str, float]:
    """What a step and the record take on this rank."""
    done = [work(training.contender, CPU) for _ in range(5)]
    peak = min(each.peak_bytes for each in done)
    record = training.record_bytes
    return {"peak_MB": peak / 1e6, "record_bytes": record, "operators": done[0].operators}


def seconds(ranks: list[Times]) -> Seconds:
    """Of each round: the step and its forward on the slowest rank, processor time of rank 1."""
    return {
        "step": np.max([times.both for times in ranks], axis=0),
        "forward": np.max([times.forward for times in ranks], axis=0),
        "busy": ranks[1].processor,
    }


def print_tables(rows: Rows) -> None:
    """Medians, ratios with their intervals, and what was aimed at."""
    print_environment(rows[0])
    print(f"\n2 ranks, gloo, {rows[0]['rounds']} rounds\n")
    print_row("engine", "contender", "ms", "busy ms", "peak MB", "record bytes", "operators")
    print_row(*["---"] * 7)
    for row in rows:
        figures = (f"{row['p50_ms']:.0f}", f"{row['busy_ms']:.0f}", f"{row['peak_MB']:.1f}")
        counted = row["record_bytes"], row["operators"]
        print_row(row["engine"], row["contender"], *figures, *counted)
    print()
    print_row("engine", "ratio", *KINDS)
    print_row(*["---"] * 5)
    for row in rows:
        for base in (base for contender, base in COMPARED if contender == row["contender"]):
            cells = (with_interval(row, f"{kind}_to_{base}") for kind in KINDS)
            print_row(row["engine"], f"{row['contender']} / {BASES[base]}", *cells)
    print()
    print_row("engine", "target", "aim", "found", "")
    print_row(*["---"] * 5)
    for row, ((contender, title), aim) in itertools.product(rows, AIMS.items()):
        if row["contender"] == contender:
            met = verdict(row[title], row[f"{title}_low"], aim)
            what = f"{contender}, {title.replace('_', ' ')}"
            print_row(row["engine"], what, f"{aim:.2f}", with_interval(row, title), met)


def print_row(*cells: object) -> None:
    """Of a table in Markdown."""
    print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
