"""Each benchmark runs, on little, as its command does."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
# Script to its options, and a line that its output contains.
RUNS: dict[str, tuple[str, str]] = {
    "bench_sum.py": ("--device cpu --shapes patches --seconds 0.02 --no-compile", "patches: 6 t"),
    "bench_step.py": ("--device cpu --width 16 --rounds 2", "ours, hold"),
    "bench_monitor.py": ("--device cpu --rounds 1 --cases '1,000 x (16,)'", "gradient_norms"),
    "bench_maps.py": ("--rounds 1 --keys 5 10", "| total and backward | 10 |"),
    "bench_drift.py": ("--optimizers Adam --steps 10 --workers 1", "| Adam | never active"),
    "bench_ddp.py": ("--ranks 2 --shapes tiny --rounds 2", "2 ranks, gloo, tiny"),
    "bench_shadow.py": (
        "--engine fsdp2 --rounds 1 --width 24 --layers 1 --patches 4 --tokens 4",
        "| fsdp2 | shadow / fake image, one patch |",
    ),
    "bench_fake.py": ("--seeds 2 --steps 3", "| shadow + hold | 0.000"),
    "bench_zero_hold.py": ("--rounds 1 --width 16", "| 3 | a group for each tower, hold | 50% |"),
    "bench_import.py": ("--rounds 1", "modaldummy"),
    "show_alternatives.py": ("--device cpu --width 8 --batch 2 --rounds 1", "fake, one sample"),
    "show_silent_mixing.py": ("--engines 'FSDP2, the whole'", "FSDP2, the whole"),
}
# The others take 10 to 100 s each: `make test-integrations` runs them.
SHORT = ("bench_sum.py", "bench_maps.py")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in RUNS]
)
def test_a_benchmark_runs(script: str, tmp_path: Path) -> None:
    options, line = RUNS[script]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *shlex.split(options)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
