"""What the dummy term is meant to cost on a CPU, and what it does cost: met or missed.

Each figure is the best of three processes, since the pages that a process gets from the system
decide about 10 % of its speed for as long as it lives. About seven minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GROWTH = {"grow_100": 100, "grow_1000": 1000, "grow_10000": 10_000}
SHAPES = ("patches", "small", "norms", "vit_b", "lora", "mixed")
FLAT_AND_FILLS = "limit, fill each"
OURS = ("ours", "ours, gradient_only", "ours, scale=0.0", "ours, scale=None")

Rows = list[dict[str, Any]]


def main() -> None:
    """Run the benchmarks in processes of their own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape and mode")
    parser.add_argument("--rounds", type=int, default=100, help="of training steps")
    arguments = parser.parse_args()
    options = ("--device", "cpu", "--no-compile", "--seconds", str(arguments.seconds))
    sums = [
        run("bench_sum.py", *options, "--shapes", *SHAPES)
        + run("bench_sum.py", *options, "--shapes", *GROWTH, "--modes", "fresh")
        for _ in range(arguments.processes)
    ]
    half = run(
        *("bench_sum.py", *options, "--shapes", "vit_b", "--modes", "fresh", "--dtype", "bfloat16")
    )
    steps = run("bench_step.py", "--device", "cpu", "--rounds", str(arguments.rounds))
    print("| target | aim | found | |\n|---|---|---|---|")
    for what, aim, found in [*sum_targets(sums), half_target(half)]:
        print(f"| {what} | {aim:.2f} | {found:.2f} | {verdict(found, found, aim)} |")
    for what, aim, found, low in step_targets(steps):
        print(f"| {what} | {aim:.2f} | {found:.2f} | {verdict(found, low, aim)} |")


def verdict(found: float, low: float, aim: float) -> str:
    """Whether `found` is at most `aim`; it may be more by chance if `low`, its lower bound, is."""
    return "met" if found <= aim else "within chance" if low <= aim else "MISSED"


def run(script: str, *options: str) -> Rows:
    """Rows that a benchmark prints."""
    command = [sys.executable, str(HERE / script), *options, "--json"]
    print(" ".join(command[1:]), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: Rows = json.loads(done.stdout)
    return rows


def sum_targets(processes: Sequence[Rows]) -> list[tuple[str, float, float]]:
    """Targets of single terms: what, the most that it may be, and what it is."""

    def best(
        name: str, base: str, phase: str = "both", shape: str = "small", mode: str = "fresh"
    ) -> float:
        return min(
            time(rows, shape, mode, name, phase) / time(rows, shape, mode, base, phase)
            for rows in processes
        )

    found = [
        ("300 x (768,), both / naive", 0.38, best("ours", "naive loop")),
        ("300 x (768,), both / `0 * sum`", 0.58, best("ours", "0 * sum")),
        ("300 x (768,), `scale=None` / naive", 0.20, best("ours, scale=None", "naive loop")),
        ("the same in LayerNorms, both / naive", 0.38, best("ours", "naive loop", shape="norms")),
        ("ViT-B, forward / flat sum", 1.15, best("ours", "limit", "forward", "vit_b")),
        ("ViT-B, both / flat sum and fills", 1.15, best("ours", FLAT_AND_FILLS, shape="vit_b")),
    ]
    for mode in ("fresh", "accumulate"):
        worst = {
            (shape, name): best(name, "naive loop", "both", shape, mode)
            for shape in SHAPES
            for name in OURS
        }
        (shape, name), value = max(worst.items(), key=lambda item: item[1])
        found.append((f"worst / naive, {mode} gradients ({shape}, {name})", 1.05, value))
    per_tensor = {
        count: min(time(rows, shape, "fresh", "ours", "both") / count for rows in processes)
        for shape, count in GROWTH.items()
    }
    times = ", ".join(f"{1e3 * value:.1f} us at {count:,}" for count, value in per_tensor.items())
    growth = max(per_tensor.values()) / min(per_tensor.values())
    return [*found, (f"time per tensor, most / least ({times})", 1.3, growth)]


def half_target(rows: Rows) -> tuple[str, float, float]:
    """The ViT-B in bfloat16, whose sum the naive loop rounds to eight bits."""
    ours, naive = (time(rows, "vit_b", "fresh", name, "both") for name in ("ours", "naive loop"))
    return "ViT-B in bfloat16, both / naive", 1.05, ours / naive


def time(rows: Rows, shape: str, mode: str, contender: str, phase: str) -> float:
    """Median milliseconds of one row."""
    wanted = {"shape": shape, "gradients": mode, "contender": contender, "phase": phase}
    return float(next(row["p50_ms"] for row in rows if wanted.items() <= row.items()))


def step_targets(rows: Rows) -> list[tuple[str, float, float, float]]:
    """Targets of whole training steps, with the lower end of the interval that chance leaves."""
    found = []
    for row in rows:
        name = row["contender"]
        if name in OURS:
            bounds = f"{row['to_naive_low']:.2f} to {row['to_naive_high']:.2f}"
            what = f"training step, {name} / naive ({bounds})"
            found.append((what, 1.0, row["to_naive"], row["to_naive_low"]))
        if ", hold" in name:
            bounds = f"{row['to_unheld_low']:.3f} to {row['to_unheld_high']:.3f}"
            what = f"training step, {name} / without hold ({bounds})"
            found.append((what, 1.0, row["to_unheld"], row["to_unheld_low"]))
        if name == "ours, scale=None":
            bounds = f"{row['to_bare_low']:.2f} to {row['to_bare_high']:.2f}"
            what = f"training step, {name} / bare ({bounds})"
            found.append((what, 1.05, row["to_bare"], row["to_bare_low"]))
    return found


if __name__ == "__main__":
    main()
