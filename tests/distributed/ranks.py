"""Runs a function on several gloo ranks, each a process of its own."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds until a rank that waits gives up, and until the others are killed


def run_on_ranks(function: Callable[[int], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """What `function(rank)` returns on each rank, or the tracebacks of those that raised.

    Args:
        function: At the top level of a module; what it returns must fit into `torch.save`.
        folder: Empty; the ranks meet there, so that no port is needed.
        world_size: How many ranks.
    """
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_run, args=(function, folder, rank, world_size), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(2 * TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    codes = [process.exitcode for process in ranks]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(errors)
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _run(function: Callable[[int], Any], folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        torch.save(function(rank), folder / f"{rank}.result")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
