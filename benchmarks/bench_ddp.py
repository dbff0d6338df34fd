"""What a training step under DistributedDataParallel costs where ranks have different modalities.

A model has three towers of one size and a trunk; at each step a rank has one modality, never that
of its neighbour. `find_unused_parameters` is DDP's own answer, without any dummy; all others add a
dummy term and, but for `attach_to_outputs`, leave that search out.

A step is forward, loss, dummy term, backward with the reduction between ranks, and SGD. SGD has a
learning rate of zero, which is the same work, so that the contenders, each with a DDP of its own,
can share the memory of their parameters.

All contenders are timed in one run and take turns as in the other benchmarks. Ranks wait for each
other before each step, and its time is that of the slowest rank. Each rank is a process with one
thread; with more ranks than cores they share these, and times are those of a crowded machine.
glibc returns large freed buffers to the system at once, so that each step would pay for page
faults: the benchmark starts itself again with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_
set high, which the ranks inherit.

Before anything is timed, the gradients of each contender are compared on each rank with those of
`find_unused_parameters` and the dummy. Peak memory is what a rank has at its highest in a few steps
beyond what it had before the first: resident memory on a CPU, allocated memory on CUDA. It is
measured in a process group for each contender, with glibc as it is by default, and is that of the
rank with the most.

On CUDA each rank needs a GPU of its own, since NCCL does; with fewer it is said that nothing was
measured.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench_step import interval
from ddp import FIND_UNUSED, NAIVE, NAMES, SHAPES, WAYS, Model, check, trainings
from from_tests import Fleet, rank_device
from measure import (
    ALLOCATOR,
    Times,
    environment,
    keep_memory,
    percentiles,
    pick_device,
    print_environment,
    ratio,
    result_path,
    take_turns,
    write_csv,
)
from targets import verdict

USUAL = ("vit", "norms")
LIMIT = 3600  # seconds for all rounds of a shape
# Those that hand out 1e-7, the value read or not.
OURS = ("ours", "ours, gradient_only")

Rows = list[dict[str, Any]]


def main() -> None:
    """Measure all shapes between all numbers of ranks, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(USUAL))
    parser.add_argument("--rounds", type=int, help="by default what suits each shape")
    parser.add_argument(
        "--memory", nargs="*", choices=SHAPES, default=["vit"], help="shapes whose peak is measured"
    )
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)  # as each rank, for the rows
    device = pick_device(arguments.device)
    rows: Rows = []
    for num_ranks in arguments.ranks:
        if not enough(num_ranks, device):
            continue
        for shape in arguments.shapes:
            rounds = arguments.rounds or SHAPES[shape].rounds
            rows += measure(num_ranks, shape, rounds, device, shape in arguments.memory)
    if not rows:
        sys.exit("Nothing was measured.")
    print_table(rows)
    print_targets(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_ddp.csv", device), rows)


def enough(num_ranks: int, device: torch.device) -> bool:
    """Whether there are devices for so many ranks; if not it is said."""
    if device.type != "cuda" or num_ranks <= torch.cuda.device_count():
        return True
    print(
        f"{num_ranks} ranks: not measured. NCCL needs a GPU for each rank, and "
        f"{torch.cuda.device_count()} of them are here."
    )
    return False


def measure(num_ranks: int, shape: str, rounds: int, device: torch.device, memory: bool) -> Rows:
    """One row for each contender."""
    print(f"{num_ranks} ranks, {shape}", file=sys.stderr)
    with Fleet(num_ranks, device.type, limit=LIMIT) as fleet:
        seconds = fleet.ask(timed, shape, rounds, device.type)
    slowest = {name: np.max([found[name] for found in seconds], axis=0) for name in WAYS}
    nothing = np.zeros(rounds)
    times = {name: Times(each, nothing, nothing) for name, each in slowest.items()}
    with torch.device("meta"):
        params = list(Model(SHAPES[shape]).parameters())
    rows = []
    for name in WAYS:
        row: dict[str, Any] = {"what": "DDP training step", "ranks": num_ranks}
        row |= {"shape": shape, "contender": name} | percentiles(times[name].both)
        for kind, base in {"find_unused": FIND_UNUSED, "naive": NAIVE}.items():
            low, high = interval(times[name].both / times[base].both)
            row[f"to_{kind}"] = ratio(times[name], times[base], "both")
            row |= {f"to_{kind}_low": low, f"to_{kind}_high": high}
        row |= {"rounds": rounds, "peak_MB": None}
        if memory:
            row["peak_MB"] = peak(num_ranks, shape, name, device)
        row |= {"tensors": len(params), "elements": sum(p.numel() for p in params)}
        row["size"] = "x".join(map(str, SHAPES[shape].size))
        row["backend"] = "nccl" if device.type == "cuda" else "gloo"
        rows.append(row | environment(device))
    return rows


def timed(rank: int, shape: str, rounds: int, kind: str) -> dict[str, list[float]]:
    """Seconds of each round on this rank, once the contenders have proved to be right."""
    device = rank_device(kind, rank)
    found = trainings(tuple(WAYS), SHAPES[shape], device)
    check(found)
    times = take_turns({name: one.contender for name, one in found.items()}, rounds, device)
    return {name: each.both.tolist() for name, each in times.items()}


def peak(num_ranks: int, shape: str, name: str, device: torch.device) -> float | None:
    """Megabytes that steps need on the rank that needs most, None where that is not known."""
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    with patch.dict(os.environ, plain, clear=True), Fleet(num_ranks, device.type) as fleet:
        found = fleet.ask(held, shape, name, device.type)
    return None if None in found else max(found) / 1e6


def held(rank: int, shape: str, name: str, kind: str) -> int | None:
    """Bytes that this rank has at its highest, beyond those before the first step."""
    device = rank_device(kind, rank)
    (training,) = trainings((name,), SHAPES[shape], device).values()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    elif not Path("/proc/self/clear_refs").exists():
        return None
    else:
        # Not `ru_maxrss`: that begins with the parent's, and set-up may need more than steps.
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated(device) if cuda else _resident("VmRSS")
    for _ in range(len(NAMES)):
        training.step()
    return (torch.cuda.max_memory_allocated(device) if cuda else _resident("VmHWM")) - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def print_table(rows: Rows) -> None:
    """Median times, ratios with their intervals, memory."""
    print_environment(rows[0])
    for row in rows:
        if row["contender"] == FIND_UNUSED:
            print(
                f"\n{row['ranks']} ranks, {row['backend']}, {row['shape']}: three towers and a "
                f"trunk, each {SHAPES[row['shape']].what}; {row['elements'] / 1e6:.1f}M elements "
                f"in {row['tensors']} tensors, {row['size']} activations, {row['rounds']} rounds"
            )
            titles = ("/ find_unused (95 %)", "/ naive (95 %)")
            print(f"{'':24}{'ms':>9}" + "".join(f"{t:>22}" for t in titles) + f"{'peak MB':>9}")
        cells = "".join(
            f"{row[key]:8.3f} ({row[f'{key}_low']:.3f}-{row[f'{key}_high']:.3f})"
            for key in ("to_find_unused", "to_naive")
        )
        held = "-" if row["peak_MB"] is None else f"{row['peak_MB']:.1f}"
        print(f"{row['contender']:24}{row['p50_ms']:9.2f}{cells}{held:>9}")


def print_targets(rows: Rows) -> None:
    """What was aimed at, and whether it is met."""
    found = [("target", "aim", "found", "")]
    for what, aim, value, low in targets(rows):
        found.append((what, f"{aim:.2f}", f"{value:.3f}", verdict(value, low, aim)))
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    print()
    for cells in found:
        print("  ".join(f"{cell:{n}}" for cell, n in zip(cells, widths, strict=True)).rstrip())


def targets(rows: Rows) -> list[tuple[str, float, float, float]]:
    """What, the most that it may be, what it is, and the least that it may be but for chance."""
    found = []
    for row in rows:
        where = f"{row['ranks']} ranks, {row['shape']}"
        if row["contender"] == FIND_UNUSED and row["shape"] == "vit":
            best = _best(rows, row)
            what = f"{where}, {best['contender']} / find_unused"
            figures = best["to_find_unused"], best["to_find_unused_low"]
            found += [(what, 1.05, *figures), (f"{what}, goal", 0.95, *figures)]
        if row["contender"] == "ours, scale=None":
            what = f"{where}, scale=None / naive"
            found.append((what, 0.9, row["to_naive"], row["to_naive_low"]))
    return found


def _best(rows: Sequence[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    own = [row for row in rows if all(row[key] == like[key] for key in ("ranks", "shape"))]
    ours = [row for row in own if row["contender"] in OURS]
    return min(ours, key=lambda row: float(row["to_find_unused"]))


if __name__ == "__main__":
    main()
