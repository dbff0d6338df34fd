"""Everything that needs a CUDA device: the tests marked for it, the benchmarks, and a report.

Needs the source tree, PyTorch and, for the tests, pytest and Hypothesis: `make gpu`, or
`PYTHONPATH=src python benchmarks/gpu.py`. `--dry-run` goes the same way on the CPU, with few rounds
and into a folder that is thrown away, to see that all of it works.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch

from measure import RESULTS, pick_device

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_gpu.py", "tests/core/test_triton_kernels.py", "tests/core/test_parameter.py")
SHAPES: Sequence[str] = (
    "patches",
    "small",
    "norms",
    "vit_b",
    "lora",
    "mixed",
    "grow_100",
    "grow_1000",
    "billion",
)

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What became of one command: its name, its last line, and how it ended."""

    name: str
    last: str
    seconds: float
    ok: bool


def main() -> None:
    """Run tests and benchmarks, write the report, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, writing nothing to keep"
    )
    dry = parser.parse_args().dry_run
    device = pick_device("cpu" if dry else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if dry else RESULTS
        outcomes = run_all(folder, device, dry)
        text = report(folder, outcomes, device)
        (folder / f"report-{device.type}.md").write_text(text)
        print(text)
    sys.exit(0 if all(outcome.ok for outcome in outcomes) else 1)


def run_all(folder: Path, device: torch.device, dry: bool) -> list[Outcome]:
    """Tests, sums, steps, norms, one after the other; together they stay below nine minutes."""
    names = ("bench_sum", "bench_step", "bench_monitor")
    sums, steps, norms = (folder / f"{name}-{device.type}" for name in names)
    shapes = SHAPES[:2] if dry else SHAPES
    if not dry and torch.cuda.get_device_properties(device).total_memory < 24e9:
        shapes = tuple(shape for shape in shapes if shape != "billion")
    outcomes = []
    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        outcomes.append(Outcome("tests", f"not run: no {' and no '.join(missing)} here", 0, False))
    else:
        # Other versions of torch and Python have warnings of their own.
        outcomes.append(_run("tests", 150, "-m", "pytest", "-q", "-W", "default", *TESTS))
    picture = ("--plot", f"{sums}.png") if find_spec("matplotlib") else ()
    outcomes.append(
        _run(
            *("sums", 220, "benchmarks/bench_sum.py", "--device", device.type, "--no-compile"),
            *("--shapes", *shapes, "--seconds", "0.3" if dry else "4"),
            *("--csv", f"{sums}.csv", *picture),
        )
    )
    outcomes.append(
        _run(
            *("steps", 90, "benchmarks/bench_step.py", "--device", device.type),
            *("--rounds", "3" if dry else "60", "--csv", f"{steps}.csv"),
        )
    )
    outcomes.append(
        _run(
            *("norms", 60, "benchmarks/bench_monitor.py", "--device", device.type),
            *("--rounds", "1" if dry else "60", "--csv", f"{norms}.csv"),
        )
    )
    return outcomes


def _run(name: str, limit: float, *command: str) -> Outcome:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    print(f"{name}: {' '.join(command)}", file=sys.stderr)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        print(stopped.stdout, file=sys.stderr)
        return Outcome(name, f"stopped after {limit:.0f} s", limit, False)
    print(done.stdout, file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["no output"]
    last = lines[-1] if name == "tests" else f"exit status {done.returncode}"
    return Outcome(name, last, time.perf_counter() - start, done.returncode == 0)


def report(folder: Path, outcomes: Sequence[Outcome], device: torch.device) -> str:
    """Device and versions, caveats, targets, and the figures of `ours` in each shape."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "a CPU"
    triton = "not here"
    if find_spec("triton") is not None:
        import triton as found

        triton = found.__version__
    tests = "met" if all(o.ok for o in outcomes if o.name == "tests") else "NOT SHOWN"
    sums = _read(folder / f"bench_sum-{device.type}.csv")
    lines = [
        f"# The dummy term on {name}, {datetime.now(UTC).date().isoformat()}",
        "",
        f"torch {torch.__version__}, triton {triton}, Python {sys.version.split()[0]}. Written by",
        "`make gpu`; every figure is from the CSV files beside this one.",
        "",
        "Caveats: one machine, one run, medians of wall time with a wait for the device before and",
        "after each phase, so that a contender pays for its launches as well as for its work. The",
        "gradients are written by autograd in every contender but the limits. Why a target was",
        "missed is for docs/explanation/cost.md to say.",
        "",
        "| part | took | ended |",
        "|---|---|---|",
        *(
            f"| {o.name} | {o.seconds:.0f} s | {'' if o.ok else 'FAILED: '}{o.last} |"
            for o in outcomes
        ),
        "",
        "| target | found | |",
        "|---|---|---|",
        f"| nothing waits for the device | see the tests | {tests} |",
        *(f"| {target} | {found} | {verdict} |" for target, found, verdict in targets(sums)),
        "",
        "| shape, gradients | contender | forward ms | both ms | naive / it | of copy | launches |",
        "|---|---|---|---|---|---|---|",
        *figures(sums),
        "",
    ]
    return "\n".join(lines)


def _read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _find(rows: Rows, **wanted: str) -> dict[str, str] | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


def targets(rows: Rows) -> list[tuple[str, str, str]]:
    """What was aimed at, what was found, and whether it is met, for each of our contenders."""
    found = []
    for name in ("ours", "ours, fused kernels"):
        small = _find(rows, shape="small", gradients="fresh", contender=name, phase="both")
        if small is not None:
            speed = 1 / float(small["to_naive"])
            found.append((f"{name}: 10 x the naive loop at 300 x (768,)", speed, 10.0, "x"))
        large = _find(rows, shape="billion", gradients="fresh", contender=name, phase="forward")
        if large is not None:
            share = 100 * float(large["share_of_copy"])
            found.append((f"{name}: 85 % of a copy's bandwidth at 1B float32", share, 85.0, "%"))
    verdicts = {True: "met", False: "MISSED"}
    judged = [(what, f"{v:.1f} {unit}", verdicts[v >= aim]) for what, v, aim, unit in found]
    for name in ("ours", "ours, fused kernels"):
        for few, many in (("grow_100", "grow_1000"), ("grow_1000", "mixed")):
            found_rows = [
                _find(rows, shape=shape, gradients="fresh", contender=name, phase="both")
                for shape in (few, many)
            ]
            counts = [row["launches"] for row in found_rows if row is not None]
            if len(counts) == 2 and all(counts):
                what = f"{name}: as many launches in {many} as in {few}"
                judged.append((what, " and ".join(counts[::-1]), verdicts[len(set(counts)) == 1]))
    return judged


def figures(rows: Rows) -> list[str]:
    """A line of the table for each shape, mode and contender of interest."""
    lines = []
    names = ("naive loop", "ours", "ours, fused kernels", "ours, scale=None", "limit, fill each")
    for row in rows:
        if row["phase"] == "both" and row["contender"] in names:
            keys = ("shape", "gradients", "contender")
            forward = _find(rows, phase="forward", **{key: row[key] for key in keys})
            assert forward is not None
            cells = (
                f"{row['shape']}, {row['gradients']}",
                row["contender"],
                forward["p50_ms"],
                row["p50_ms"],
                f"{1 / float(row['to_naive']):.2f}",
                f"{float(forward['share_of_copy']):.0%}" if forward["share_of_copy"] else "-",
                row["launches"] or "-",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
