"""Cost of the dummy term beside the line that everybody copies, on the CPU.

Both compute `scale * sum(p.sum())` over the same parameters and run backward. They take turns
within one run, so that a noisy machine disturbs both alike; compare the ratio, not the times.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper

SCALE = 1e-7
SHAPES = {"many small": (300, 64), "few large": (8, 1_000_000)}
# glibc returns large freed buffers to the system at once, so that each backward would pay for page
# faults. The allocator reads these when a process starts.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


def main() -> None:
    """Print median times and their ratio for each set of shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50, help="timed rounds (default: 50)")
    arguments = parser.parse_args()
    if not ALLOCATOR.keys() <= os.environ.keys():
        command = [sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of rounds in ms")
    print(f"{'parameters':>22} {'naive':>8} {'ours':>8} {'ours / naive':>13}")
    for name, (count, size) in SHAPES.items():
        naive, ours = compare(count, size, arguments.repeats)
        label = f"{name} ({count} x {size:,})"
        print(f"{label:>22} {naive * 1e3:8.2f} {ours * 1e3:8.2f} {ours / naive:13.2f}")


def compare(count: int, size: int, repeats: int) -> tuple[float, float]:
    """Median seconds of forward plus backward, naive and ours."""
    model = nn.ParameterDict({f"p{index}": torch.randn(size) for index in range(count)})
    wrapper = DummyLossWrapper(nn.ModuleDict({"T1": model}), {"T1": "T1"}, SCALE)
    params = list(model.values())

    def naive() -> Tensor:
        dummy = torch.zeros((), requires_grad=True)
        for param in params:
            dummy = dummy + param.sum() * SCALE
        return dummy

    contenders: tuple[Callable[[], Tensor], ...] = (naive, lambda: wrapper.dummy([]))
    times: tuple[list[float], ...] = ([], [])
    for round_ in range(repeats + 3):
        for contender, timings in zip(contenders, times, strict=True):
            for param in params:
                param.grad = None
            start = time.perf_counter()
            contender().backward()
            if round_ >= 3:  # the first rounds warm up
                timings.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


if __name__ == "__main__":
    main()
