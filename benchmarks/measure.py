"""How the benchmarks measure: contenders that take turns, what they do, and rows of a CSV file."""

import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"
# glibc returns large freed buffers to the system at once, so that each backward would pay for page
# faults. The allocator reads these when a process starts.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Contender:
    """Something to be timed: `backward` gets what `forward` returned; `reset` runs before both."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None
    reset: Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of each round, of shape `[rounds]`.

    Attributes:
        forward: Until forward has ended.
        backward: From then on.
        processor: What this process kept processors busy in both, without the time that it waited.
    """

    forward: np.ndarray[Any, Any]
    backward: np.ndarray[Any, Any]
    processor: np.ndarray[Any, Any]

    @property
    def both(self) -> np.ndarray[Any, Any]:
        """Forward and backward."""
        total: np.ndarray[Any, Any] = self.forward + self.backward
        return total


def keep_memory() -> None:
    """Start this process again with an allocator that keeps large buffers, unless it is so already.

    Otherwise much of what the timings of backward show on a CPU is page faults.
    """
    if not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)


def pick_device(name: str) -> torch.device:
    """The device of that name; for `auto` CUDA where there is any."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        sys.exit("No CUDA device is here; pass --device cpu or auto.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and cuda) else "cpu")


def result_path(given: str, name: str, device: torch.device) -> Path:
    """The path that was given after --csv or --plot, or one in benchmarks/results."""
    stem, dot, ending = name.partition(".")
    return Path(given) if given else RESULTS / f"{stem}-{device.type}{dot}{ending}"


def take_turns(
    contenders: Mapping[str, Contender], rounds: int, device: torch.device
) -> dict[str, Times]:
    """Time all contenders in each round, in an order that is drawn anew.

    Each runs twice in a row and the second time counts, so that what ran before it does not matter.
    """
    order, draw = list(contenders), random.Random(0)
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        draw.shuffle(order)
        for name in order:
            _once(contenders[name], device)
            timed = _once(contenders[name], device)
            if number >= 2:  # the first rounds warm up
                seconds[name].append(timed)
    return {name: Times(*np.array(timed).T) for name, timed in seconds.items()}


def _once(contender: Contender, device: torch.device) -> tuple[float, float, float]:
    contender.reset()
    _wait(device)
    busy, start = time.process_time(), time.perf_counter()
    result = contender.forward()
    _wait(device)
    middle = time.perf_counter()
    if contender.backward is None:
        return middle - start, 0.0, time.process_time() - busy
    contender.backward(result)
    _wait(device)
    return middle - start, time.perf_counter() - middle, time.process_time() - busy


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times: Times, base: Times, phase: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return float(np.median(getattr(times, phase) / getattr(base, phase)))


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass make the machine do.

    Attributes:
        operators: Calls that reach a kernel of torch.
        launches: Kernels that a CUDA device was given, None on a CPU.
        peak_bytes: Memory at its highest, above what there was before.
    """

    operators: int
    launches: int | None
    peak_bytes: int


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def work(contender: Contender, device: torch.device) -> Work:
    """Operators, launches and memory of one pass, each counted in a pass of its own."""

    def run() -> None:
        result = contender.forward()
        if contender.backward is not None:
            contender.backward(result)

    contender.reset()
    with _Operators() as operators:
        run()
    contender.reset()
    if device.type != "cuda":
        return Work(operators.count, None, _peak_on_cpu(run))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    peak = torch.cuda.max_memory_allocated(device) - before
    contender.reset()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
        _wait(device)
    names = [event.name() for event in record.profiler.kineto_results.events()]
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)
    return Work(operators.count, launches, peak)


def _peak_on_cpu(run: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = np.cumsum([0, *(size for _, size in sorted(changes, key=lambda change: change[0]))])
    return int(held.max())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a copy of 256 MiB, the best of ten."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    copy = Contender(lambda: target.copy_(source), None, lambda: None)
    best = min(_once(copy, device)[0] for _ in range(10))
    return 2 * source.nbytes / best


def clear(params: Iterable[Tensor]) -> None:
    """Take the gradients away."""
    for param in params:
        param.grad = None


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, for each row of a CSV file."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def print_environment(row: Mapping[str, Any]) -> None:
    """The first lines of a table: where the rows like `row` were measured, and with what set."""
    print(f"{row['device']}, {row['threads']} threads, torch {row['torch']}")
    if row.get("launches") is None:
        print("set for this run:", *(f"{name}={value}" for name, value in ALLOCATOR.items()))


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def percentiles(seconds: np.ndarray[Any, Any]) -> dict[str, float]:
    """Milliseconds below which 20, 50 and 80 % of the rounds lie."""
    return {f"p{q}_ms": float(np.percentile(seconds, q)) * 1e3 for q in (20, 50, 80)}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows`, which have the same keys, numbers with five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
