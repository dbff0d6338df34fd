"""Runs a command as users do, so that nothing of it outlives the test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launched(
    folder: Path, script: Path, *options: str, by: Sequence[str] = (), timeout: float
) -> tuple[int, str]:
    """Exit code of a script that runs in `folder`, and what it wrote.

    Args:
        folder: Where it runs, with one thread for each process.
        script: What to run.
        *options: Its arguments.
        by: A launcher, as a module of Python with its arguments.
        timeout: Seconds after which it is given up.
    """
    command = [sys.executable, *(["-m", *by] if by else []), str(script), *options]
    folder.mkdir(exist_ok=True)
    # Not a pipe, which ranks that hang would keep open.
    path = folder / "output.txt"
    with path.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(timeout)
        finally:
            # Ranks are in sessions of their own; launchers take them along if asked to end.
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()
                process.wait()
    return process.returncode, path.read_text()
