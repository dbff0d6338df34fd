"""A hundred thousand inputs that nobody meant: half are logs for the doctor, half are batches.

Run by `make fuzz`; not collected by pytest. The same seed makes the same inputs. Of each input it
is required that

- no exception leaves but those that are documented (`HistoryError` and `OSError`, and
  `BatchMetadataError` and `UnknownModalityError`), and no warning;
- the result is well formed: findings with a code, text that steers no terminal, strict JSON, an
  exit status that fits; or a tuple of known names in their order, the same one if asked again;
- it takes no longer than `SECONDS`: an alarm ends Python code, and a process that watches ends what
  does not come back to Python;
- it takes no more than `MEMORY` beyond what the process had: its address space is limited.

The first failure of each kind is written to `--out`, cut down as far as that goes.
"""

import argparse
import contextlib
import io
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from modaldummy import BatchMetadataError, UnknownModalityError, active_modalities
from modaldummy._diagnose import doctor
from modaldummy._diagnose.diagnose import examine
from modaldummy._errors import HistoryError, describe
from modaldummy._findings import Finding
from tools import fuzz_batches, fuzz_logs
from tools.fuzz_logs import MONSTERS, Log, placed
from tools.fuzz_values import Planted

SECONDS = 20.0
MEMORY = 2 * 2**30
_MANY = 5  # failures of different kinds that end a run
_SHRINKING = 20.0  # seconds


class TooLongError(BaseException):
    """An input takes longer than it may; nothing that is tested can catch it."""


class MalformedError(Exception):
    """A result is not what it has to be."""


def make(seed: int, index: int) -> Any:
    """The input of that number: monsters first, then logs and batches in turns."""
    if index < len(MONSTERS):
        return list(MONSTERS.values())[index]()
    random = Random(f"{seed}-{index}")
    return fuzz_logs.make(random) if index % 2 else fuzz_batches.make(random)


def check(case: Any, folder: Path) -> str:
    """What became of an input, in a word; raises if that is wrong."""
    return check_log(case, folder) if isinstance(case, Log) else check_batch(*case)


def check_batch(batch: Any, known: tuple[str, ...]) -> str:
    """Show it to `active_modalities`, twice."""
    results = []
    for _ in range(2):
        try:
            results.append(active_modalities(batch, known))
        except (UnknownModalityError, BatchMetadataError, Planted) as error:
            return type(error).__name__
    places = [known.index(name) for name in results[0]]
    require(type(results[0]) is tuple and places == sorted(set(places)), results[0])
    require(results[0] == results[1], results)
    return "read" if places else "read, none active"


def check_log(log: Log, folder: Path) -> str:
    """Show it to `examine`, and to the command."""
    with placed(log, folder) as path:
        try:
            diagnosis = examine(path)
            status, kind = (0, "healthy") if diagnosis.is_healthy else (1, "not healthy")
            require(all(map(_is_finding, diagnosis.findings)), diagnosis.findings)
        except (HistoryError, OSError) as error:
            status, kind = 2, type(error).__name__
    out, err = _stream(), _stream()
    plot = str(folder / "run.png") if log.wants == "plot" else None
    with (
        placed(log, folder) as path,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        asked = argparse.Namespace(
            path=path, json=log.wants == "json", plot=plot, scale=1e-7, threshold=[]
        )
        found = doctor.run(asked)
    shown, told = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    if found == 2 and "The run cannot be drawn: " in told:
        return f"{kind}, not drawn"
    require(found == status, (found, status, told))
    require(bool(shown.strip()) is (status < 2) and bool(told) is (status == 2), (shown, told))
    require(all(char.isprintable() or char == "\n" for char in shown + told), shown + told)
    if log.wants == "json" and status < 2:
        content = json.loads(shown, parse_constant=lambda name: require(False, name))
        require(content["healthy"] is (status == 0), content)
    return kind


def require(holds: bool, what: object) -> None:
    """Raise unless it holds."""
    if not holds:
        raise MalformedError(describe(what))


def _is_finding(finding: Finding) -> bool:
    known = finding.severity in ("error", "warning", "info")
    words = finding.message and finding.remedy and json.dumps(finding.evidence)
    return bool(re.fullmatch(r"MD2\d\d", finding.code) and known and words)


def _stream() -> io.TextIOWrapper:
    """As a terminal, it cannot show everything."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLongError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failure(case: Any, folder: Path, seconds: float = SECONDS) -> BaseException | str:
    """What became of an input, or the exception that should not have left."""
    try:
        with _alarm(seconds), warnings.catch_warnings():
            drawn = isinstance(case, Log) and case.wants == "plot"  # there may be no such letters
            warnings.simplefilter("ignore" if drawn else "error")
            return check(case, folder)
    except (Exception, TooLongError) as error:
        return error


def signature(error: BaseException) -> tuple[str, str]:
    """Errors that have it in common have the same cause: their type, and where they come from."""
    if isinstance(error, TooLongError):
        return type(error).__name__, ""  # anywhere in a loop
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return type(error).__name__, f"{Path(frame.filename).name}, line {frame.lineno}"


def shrunk(log: Log, fails: Callable[[Log], bool]) -> Log:
    """The log without pieces that the failure does not need."""
    end, size = time.monotonic() + _SHRINKING, len(log.content) // 2
    while size and time.monotonic() < end:
        for start in reversed(range(0, len(log.content), size)):
            rest = log.content[:start] + log.content[start + size :]
            if time.monotonic() < end and fails(other := Log(rest, log.place, log.wants)):
                log = other
        size //= 2
    return log


def write(case: Any, error: BaseException, name: str, out: Path, folder: Path) -> str:
    """Write a failure, and an input that has it; returns a line about it."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(case, Log):
        wanted = signature(error)

        def fails(other: Log) -> bool:
            found = failure(other, folder, SECONDS / 4)
            return isinstance(found, BaseException) and signature(found) == wanted

        case = shrunk(case, fails) if len(case.content) < 2**20 else case
        (out / f"{name}.log").write_bytes(case.content)
        words = f"a {case.place}, {len(case.content)} bytes, {case.wants}"
    else:
        words = describe(case)
    told = "".join(traceback.format_exception(error))
    (out / f"{name}.txt").write_text(f"{words}\n\n{told}", errors="backslashreplace")
    return f"FAILED: {name}: {type(error).__name__}: {str(error)[:200]}\n  with {words}"


def work(arguments: argparse.Namespace) -> int:
    """Show all inputs; each is announced in a file, for the process that watches."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of making inputs
    fuzz_logs.make(Random(0))  # loads what there is to load
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, -1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds: Counter[str] = Counter()
    failures: set[tuple[str, str]] = set()
    start = time.monotonic()
    first, last = arguments.first, arguments.first + arguments.inputs
    with tempfile.TemporaryDirectory() as name, open(arguments.progress, "wb", 0) as progress:
        for index in range(first, last):
            progress.seek(0)
            progress.write(index.to_bytes(8))
            case = make(arguments.seed, index)
            found = failure(case, Path(name), arguments.seconds)
            if isinstance(found, str):
                kinds[f"{'log' if isinstance(case, Log) else 'batch'}: {found}"] += 1
            elif signature(found) not in failures:
                failures.add(signature(found))
                title = f"failure-{arguments.seed}-{index}"
                print(write(case, found, title, arguments.out, Path(name)), flush=True)
                if len(failures) == _MANY:
                    break
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    for kind, number in kinds.most_common():
        print(f"{number:>8}  {kind}")
    took = time.monotonic() - start
    print(f"seed {arguments.seed}: {kinds.total():,} of {arguments.inputs:,} inputs did as they")
    print(f"should, in {took:.0f} s; memory rose by {peak:.0f} MiB at most")
    return 1 if failures else 0


def watch(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the worker; end it where it hangs, and say at which input it ended."""
    with tempfile.TemporaryDirectory() as name:
        progress = Path(name) / "progress"
        progress.touch()
        worker = subprocess.Popen([*command, "--progress", str(progress)])
        seen, since = b"", time.monotonic()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = worker.wait(0.2)
                    break
                if (now := progress.read_bytes()) != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > 2 * arguments.seconds + _SHRINKING:
                    worker.kill()
        finally:
            worker.kill()
        if status < 0:
            index = int.from_bytes(progress.read_bytes())
            print(f"FAILED: input {index} ended the process with signal {-status}")
    return 1 if status else 0


def main(argv: list[str] | None = None) -> int:
    """Watch a worker, or be one; the exit status is 1 if an input failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for an input, at most")
    parser.add_argument("--out", type=Path, default=Path("fuzz-output"))
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.progress:
        return work(arguments)
    given = sys.argv[1:] if argv is None else argv
    return watch(arguments, [sys.executable, "-m", "tools.fuzz", *given])


if __name__ == "__main__":
    sys.exit(main())
