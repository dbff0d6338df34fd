"""What `import modaldummy` takes beyond `import torch, numpy`, each time in a fresh process.

`statement` is the import itself, behind the other two in the same process. `process` is the
difference between two processes in processor time, start and end of the interpreter included: one
that imports all three, one that imports the two, run in turns; torch itself, over a second, makes
it vary by more than it is. Modules are by their own time, as `-X importtime` tells, which makes all
of it somewhat slower; what is not ours is what we import first. A first run, which does not count,
compiles the files and brings them into memory.
"""

import argparse
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from measure import environment, percentiles, result_path, write_csv

BASE = "import torch, numpy"
OURS = "import modaldummy"
# Without compiled files, which a package that pip installed has, the import takes thrice as long.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
_TIMED = f"{BASE}, time; start = time.perf_counter(); {OURS}; print(time.perf_counter() - start)"
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|( +)(\S+)$", re.M)


def main() -> None:
    """Measure, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--modules", type=int, default=15, help="how many to show (default: 15)")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    rows = measure(arguments.rounds, arguments.modules)
    print_table(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_import.csv", torch.device("cpu")), rows)


def measure(rounds: int, num_modules: int) -> list[dict[str, Any]]:
    """One row for each way to look at it, then one for each of the slowest modules."""
    python("-c", _TIMED)
    draw = random.Random(0)
    statement, process = [], []
    modules: dict[str, list[float]] = {}
    for _ in range(rounds):
        statement.append(float(python("-c", _TIMED)[0]))
        seconds = {}
        for code in draw.sample([BASE, f"{BASE}; {OURS}"], 2):
            seconds[code] = python("-c", code)[1]
        process.append(seconds[f"{BASE}; {OURS}"] - seconds[BASE])
        for name, own in own_times(python("-X", "importtime", "-c", f"{BASE}; {OURS}")[0]):
            modules.setdefault(name, []).append(own)
    found = {"statement": statement, "process": process}
    found |= dict(sorted(modules.items(), key=lambda item: -np.median(item[1]))[:num_modules])
    return [
        {
            "what": what,
            "p20_ms": (times := percentiles(np.array(seconds)))["p20_ms"],
            "p50_ms": times["p50_ms"],
            "p80_ms": times["p80_ms"],
            "rounds": rounds,
            **environment(torch.device("cpu")),
        }
        for what, seconds in found.items()
    ]


def python(*arguments: str) -> tuple[str, float]:
    """What a fresh interpreter printed, and how much processor time it took in seconds.

    Raises:
        RuntimeError: It failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(arguments)}` failed:\n{done.stdout}")
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return done.stdout, user + system


def own_times(log: str) -> Iterator[tuple[str, float]]:
    """Modules that `import modaldummy` alone loads, and the seconds that each takes by itself."""
    lines = _LINE.findall(log)
    # A module is printed once it is done, behind all that it imports: ours come last.
    depths = [len(indent) for _, indent, _ in lines]
    start = max(place for place, depth in enumerate(depths[:-1]) if depth == depths[-1]) + 1
    if lines[-1][2] != "modaldummy":
        raise ValueError(f"The last module is `{lines[-1][2]}`, not `modaldummy`.")
    for microseconds, _, name in lines[start:]:
        yield name, int(microseconds) * 1e-6


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds below which 20, 50 and 80 % of the rounds lie."""
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, python {rows[0]['python']}\n")
    print("| what | p20 ms | p50 ms | p80 ms |\n|---|---|---|---|")
    for row in rows:
        times = " | ".join(f"{row[f'p{q}_ms']:.2f}" for q in (20, 50, 80))
        print(f"| {row['what']} | {times} |")


if __name__ == "__main__":
    main()
