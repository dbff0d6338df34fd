"""How the time of each call grows with the keys of the map, which own one layer each.

`growth` is the time in comparison with the smallest map, divided by the same ratio of keys: 1 where
time is linear in keys, and less where a part of it is the same for each map. One key is active.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from measure import environment, percentiles, print_environment, result_path, write_csv
from modaldummy import (
    DummyLossWrapper,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)

SAMPLES = 10  # for each key, in a batch of names


def main() -> None:
    """Measure, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    rows = [row for keys in arguments.keys for row in measure(keys, arguments.rounds)]
    smallest = {row["call"]: row for row in reversed(rows)}
    for row in rows:
        first = smallest[row["call"]]
        row["growth"] = row["p50_ms"] / first["p50_ms"] / (row["keys"] / first["keys"])
    print_table(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_maps.csv", torch.device("cpu")), rows)


def measure(keys: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each call."""
    rows = []
    for name, call in calls(keys).items():
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        times = percentiles(np.array(seconds[1:]))  # the first round warms up
        rows.append({"call": name, "keys": keys, **times, **environment(torch.device("cpu"))})
    return rows


def calls(keys: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    names = [f"m{number}" for number in range(keys)]
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    wrapper = DummyLossWrapper(model, dict(zip(names, names, strict=True)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def total() -> None:
        wrapper.total(model["m0"](torch.ones(1, 2)).sum(), ["m0"]).backward()

    def held_step() -> None:
        with hold_inactive(wrapper, optimizer):
            optimizer.zero_grad()
            total()
            optimizer.step()

    return {
        "constructor, paths": lambda: DummyLossWrapper(model, {name: name for name in names}),
        "constructor, globs": lambda: DummyLossWrapper(
            model, {name: f"{name}.*" for name in names}
        ),
        "constructor, modules": lambda: DummyLossWrapper(model, {n: model[n] for n in names}),
        "total and backward": total,
        f"read, {SAMPLES} names a key": lambda: wrapper.reader.read(names * SAMPLES),
        "read, mapping": lambda: wrapper.reader.read(dict.fromkeys(names, True)),
        "gradient_norms": lambda: gradient_norms(wrapper),
        "missing_gradients": lambda: missing_gradients(wrapper),
        "hold_inactive, one step": held_step,
        "preflight": lambda: preflight(wrapper),
        "repr": lambda: repr(wrapper),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how they grow."""
    print_environment({**rows[0], "launches": 0})
    print("\n| call | keys | ms (p50) | growth |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row['call']} | {row['keys']:,} | {row['p50_ms']:.2f} | {row['growth']:.2g} |")


if __name__ == "__main__":
    main()
