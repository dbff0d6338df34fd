"""What it costs to run an absent tower on a fake input, beside a dummy gradient, and what it does.

Steps are those of `bench_step.py`: AdamW, batches of one of three modalities, so that two towers of
two layers are absent. They run on zeros, and their output, times zero, is added to the loss: on one
sample, on as many as the batch has, or on none. `statistics`: a batch norm that has seen volumes of
mean 2 and standard deviation 3 is a tower's first layer, and the modality is absent from then on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench_step import TOKENS, Add, Model, Way, contenders, interval, training
from measure import (
    Contender,
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
from modaldummy import DummyLossWrapper

# Of `bench_step.py`.
DUMMIES = ("bare", "ours", "ours, scale=0.0", "ours, scale=None", "ours, hold")
ABSENT_STEPS = (0, 10, 100)


def main() -> None:
    """Time the steps in turns, follow the statistics, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60, help="0: time nothing")
    parser.add_argument("--json", action="store_true", help="print rows, not tables")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    rows = statistics(device)
    if arguments.rounds:
        rows = steps(arguments.width, arguments.batch, arguments.rounds, device) + rows
    print(json.dumps(rows)) if arguments.json else print_tables(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "show_alternatives.csv", device), rows)


def fake(num_samples: int) -> Way:
    """A way to connect absent towers: run each on so many samples of zeros."""

    def make(model: Model, optimizer: Optimizer) -> Add:
        device = next(model.parameters()).device
        zeros = {n: torch.zeros(num_samples, *TOKENS[n], device=device) for n in TOKENS}

        def add(loss: Tensor, batch: dict[str, Tensor]) -> Tensor:
            absent = [name for name in model.towers if name not in batch]
            outputs = [model.towers[name](zeros[name]) for name in absent]
            total: Tensor = loss + 0.0 * sum(output.sum() for output in outputs)
            return total

        return add

    return make


def entrants(width: int, size: int, device: torch.device) -> dict[str, Contender]:
    """The dummies, and the fakes beside them."""
    dummies = contenders(width, size, device)
    fakes = {"fake, one sample": 1, "fake, whole batch": size, "empty batch": 0}
    return {name: dummies[name] for name in DUMMIES} | {
        name: training(fake(number), width, size, device) for name, number in fakes.items()
    }


def steps(width: int, size: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Step time of each contender, and its ratios with what chance would make of them."""
    print(f"timing {rounds} rounds ...", file=sys.stderr)
    times = take_turns(entrants(width, size, device), rounds, device)
    rows = []
    for name, own in times.items():
        found = percentiles(own.both)
        figures = {"step, ms": (found["p50_ms"], found["p20_ms"], found["p80_ms"])}
        for base in ("bare", "ours"):
            low, high = interval(own.both / times[base].both)
            figures[f"step / {base}"] = (ratio(own, times[base], "both"), low, high)
        rows += [row(what, name, rounds, *three, device) for what, three in figures.items()]
    return rows


def statistics(device: torch.device) -> list[dict[str, Any]]:
    """Running statistics of a batch norm, and what it makes of the same volumes afterwards."""
    rows = []
    for name, way in NORMS.items():
        norm = nn.BatchNorm3d(1).to(device)
        draw = torch.Generator().manual_seed(0)
        volumes = (3 * torch.randn(8, 1, 8, 8, 8, generator=draw) + 2).to(device)
        for _ in range(200):
            norm(volumes)
        connect, done = way(norm), 0
        for number in ABSENT_STEPS:
            for _ in range(number - done):
                connect(torch.ones((), device=device)).backward()
            done = number
            with torch.no_grad():
                output = norm.eval()(volumes)
            norm.train()
            mean, variance = (
                b.item() for b in (norm.running_mean, norm.running_var) if b is not None
            )
            found = {"running mean": mean, "running variance": variance}
            found["standard deviation of the output in evaluation"] = output.std().item()
            rows += [row(what, name, number, v, v, v, device) for what, v in found.items()]
    return rows


def _zeros(norm: nn.BatchNorm3d) -> Callable[[Tensor], Tensor]:
    data = torch.zeros(1, 1, 8, 8, 8, device=norm.weight.device)
    return lambda loss: loss + 0.0 * norm(data).sum()


def _dummy(norm: nn.BatchNorm3d) -> Callable[[Tensor], Tensor]:
    model = nn.ModuleDict({"here": nn.Linear(1, 1), "gone": norm})
    wrapper = DummyLossWrapper(model, {"here": "here", "gone": "gone"})
    return lambda loss: wrapper.total(loss, ["here"])


NORMS = {"fake, one sample": _zeros, "ours": _dummy}


def row(
    what: str,
    contender: str,
    count: int,
    value: float,
    low: float,
    high: float,
    device: torch.device,
) -> dict[str, Any]:
    """One figure; `count` is rounds of what is timed, and steps without the modality otherwise."""
    figure = {"what": what, "contender": contender, "count": count, "value": value}
    return figure | {"low": low, "high": high} | environment(device)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Times and ratios with their intervals; then statistics."""
    print_environment(rows[0] | {"launches": None})
    for what in dict.fromkeys(row["what"] for row in rows):
        print(f"\n{what}")
        for row in (row for row in rows if row["what"] == what):
            bounds = f"({row['low']:.3f} to {row['high']:.3f})" if "step" in what else ""
            print(f"{row['contender']:20}{row['count']:5}{row['value']:12.4g}  {bounds}".rstrip())


if __name__ == "__main__":
    main()
