"""Runs a function on the ranks of a process group, each a process of its own."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds until a rank that waits for another gives up
LIMIT = 3600  # seconds until all ranks are killed


def run_on_ranks(
    function: Callable[[torch.device], Any], num_ranks: int, device: torch.device
) -> list[Any]:
    """What `function` returns on each rank, with gloo on a CPU and NCCL, a GPU a rank, on CUDA.

    The ranks meet in a file, so that no port is needed, and have one thread each. Where one fails
    the others are killed at once.

    Args:
        function: At the top level of a module; it gets the device of its rank, and what it returns
            must be fit to be pickled.
        num_ranks: How many ranks.
        device: Any device of the kind that is wanted.

    Raises:
        RuntimeError: A rank failed or took too long; the message has the traceback of each.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(function, folder, rank, num_ranks, device.type))
            for rank in range(num_ranks)
        ]
        try:
            for process in ranks:
                process.start()
            _join(ranks)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
            raise RuntimeError(f"exit codes of the ranks: {codes}\n" + "\n".join(errors))
        found = [folder / f"{rank}.result" for rank in range(num_ranks)]
        return [pickle.loads(path.read_bytes()) for path in found]


def _join(ranks: Sequence[SpawnProcess]) -> None:
    """Wait until all have ended, one has failed, or time is up."""
    running = {process.sentinel: process for process in ranks}
    end = time.monotonic() + LIMIT
    while running:
        ended = wait(list(running), max(0.0, end - time.monotonic()))
        for sentinel in ended:
            assert isinstance(sentinel, int)
            running.pop(sentinel).join()
        if not ended or any(process.exitcode for process in ranks):
            return


def _rank(
    function: Callable[[torch.device], Any], folder: Path, rank: int, num_ranks: int, kind: str
) -> None:
    torch.set_num_threads(1)
    try:
        cuda = kind == "cuda"
        device = torch.device(kind, rank) if cuda else torch.device(kind)
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.FileStore(str(folder / "store"), num_ranks),  # type: ignore[attr-defined]
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=TIMEOUT),
        )
        (folder / f"{rank}.result").write_bytes(pickle.dumps(function(device)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
