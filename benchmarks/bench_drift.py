"""What optimizers make of dummy gradients: how far they move a modality that no batch holds.

A matrix gets nothing but the dummy for up to 10,000 steps, either from the start ("never active")
or after 1,000 steps in which it got gradients that are noise of size 1e-3 ("trained before"). The
learning rate is 1e-4, the weights have a standard deviation of 0.02; everything else is the
optimizer's default. Computed in float64, so that rounding does not hide what is small.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from from_tests import OPTIMIZERS
from measure import environment, result_path, write_csv
from modaldummy import DummyLossWrapper, hold_inactive

LR = 1e-4
STD = 0.02
NOISE = 1e-3
WARM_UP = 1000
STEPS = (1, 10, 100, 1000, 10_000)
STARTS = ("never active", "trained before")
NO_DUMMY = "no dummy"
HOLD = "1e-7 + hold"
# The scale of the dummy of each arm, where there is one.
SCALES: dict[str, float | None] = {"1e-7": 1e-7, "0.0": 0.0, "None": None, HOLD: 1e-7}
ARMS = (NO_DUMMY, *SCALES)

Rows = list[dict[str, Any]]


def main() -> None:
    """Measure all combinations, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=max(STEPS), help="the most inactive steps")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows, not a table")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    parser.add_argument("--plot", nargs="?", const="", help="the same for a picture")
    arguments = parser.parse_args()
    jobs = list(product(arguments.optimizers, ARMS, STARTS))
    marks = [steps for steps in STEPS if steps <= arguments.steps]
    torch.set_num_threads(1)  # as in the workers, so that rows say what was used
    where = environment(torch.device("cpu"))
    spawn = get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn, torch.set_num_threads, (1,)) as pool:
        found = sum(pool.map(partial(measure, marks=marks), jobs), Rows())
    rows = [row | where for row in found]
    print(json.dumps(rows)) if arguments.json else print_table(rows)
    device = torch.device("cpu")
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_drift.csv", device), rows)
    if arguments.plot is not None:
        from plots import draw_drift

        draw_drift(rows, result_path(arguments.plot, "bench_drift.png", device))


class Model(nn.Module):
    """A matrix for each of two modalities, `seen` and `absent`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def matrix() -> nn.Parameter:
            return nn.Parameter(STD * torch.randn(16, 16, generator=generator, dtype=torch.float64))

        self.seen, self.absent = matrix(), matrix()

    def loss(self, active: Sequence[str], generator: torch.Generator) -> Tensor:
        """A loss of about 1 whose gradients are noise."""
        total = torch.ones((), dtype=torch.float64)
        for name in active:
            parameter = self.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            total = total + (NOISE * noise * parameter).sum()
        return total


def measure(job: tuple[str, str, str], marks: Sequence[int]) -> Rows:
    """Displacement of the absent modality after each number of steps in `marks`."""
    kind, arm, start = job
    model = Model()
    optimizer = OPTIMIZERS[kind](list(model.parameters()), LR)
    step = stepper(model, optimizer, arm)
    for _ in range(WARM_UP if start == STARTS[1] else 0):
        step(["seen", "absent"])
    before = model.absent.detach().clone()
    state = copy.deepcopy(dict(optimizer.state.get(model.absent, {})))
    rows = []
    for count in range(1, max(marks) + 1):
        step(["seen"])
        if count in marks:
            moved = (model.absent.detach() - before).square().mean().sqrt().item()
            rows.append(
                {"optimizer": kind, "dummy": arm, "start": start, "steps": count}
                | {"displacement_lr": moved / LR}
                | {"displacement_relative": moved / before.square().mean().sqrt().item()}
                | {"state_untouched": same(optimizer.state.get(model.absent, {}), state)}
            )
    return rows


def stepper(model: Model, optimizer: Optimizer, arm: str) -> Callable[[Sequence[str]], None]:
    """A training step on a batch of given modalities, with the dummy of an arm."""
    generator = torch.Generator().manual_seed(1)
    wrapper = DummyLossWrapper(model, {"seen": "seen", "absent": "absent"}, SCALES.get(arm))
    if arm == HOLD:
        hold_inactive(wrapper, optimizer)

    def step(active: Sequence[str]) -> None:
        loss = model.loss(active, generator)
        (loss if arm == NO_DUMMY else wrapper.total(loss, active)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def same(state: Any, before: Any) -> bool:
    """Whether two states of an optimizer have the same entries, tensors bit for bit."""
    if isinstance(before, dict):
        keys = state.keys() == before.keys()
        return keys and all(same(state[key], before[key]) for key in before)
    if isinstance(before, Tensor):
        return torch.equal(state, before)
    return bool(state == before)


def print_table(rows: Rows) -> None:
    """One line for each optimizer and start, displacement in learning rates after most steps."""
    most = max(row["steps"] for row in rows)
    print(f"displacement in learning rates after {most:,} inactive steps, torch {rows[0]['torch']}")
    print("| optimizer | start | " + " | ".join(ARMS) + " |")
    print("|---|---|" + "---|" * len(ARMS))
    found = {
        (row["optimizer"], row["start"], row["dummy"]): row for row in rows if row["steps"] == most
    }
    for kind, start in dict.fromkeys((row["optimizer"], row["start"]) for row in rows):
        cells = [f"{found[kind, start, arm]['displacement_lr']:.3g}" for arm in ARMS]
        print(f"| {kind} | {start} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
