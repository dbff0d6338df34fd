"""Ranks of a process group, each a process, which work off one question after the other."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds until a rank that waits for another gives up
LIMIT = 300  # seconds until ranks that do not answer are given up


class RankError(Exception):
    """What a rank raised.

    Attributes:
        kind: The name of its type; "gone" for a rank that has ended, "hangs" for one that neither
            answers nor gives up.
        message: What it says.
        text: With the traceback.
    """

    def __init__(self, kind: str, message: str, text: str) -> None:
        super().__init__(kind, message, text)
        self.kind, self.message, self.text = kind, message, text


class Fleet:
    """Ranks that call what they are asked to, all at once; started with the first question.

    They meet in a file, so that no port is needed, and have one thread each.

    Args:
        num_ranks: How many ranks.
        kind: "cpu" for gloo, "cuda" for NCCL with a GPU a rank.
        timeout: Seconds until a rank that waits for another gives up.
        limit: Seconds until ranks that do not answer are given up; once one has failed, the others
            have no more than `timeout`.
        quiet: Whether what ranks print goes nowhere.
    """

    def __init__(
        self,
        num_ranks: int,
        kind: str = "cpu",
        *,
        timeout: float = TIMEOUT,
        limit: float = LIMIT,
        quiet: bool = False,
    ) -> None:
        self.num_ranks = num_ranks
        self._timeout, self._limit = timeout, limit
        self._options = (num_ranks, kind, timeout, quiet)
        self._ranks: list[tuple[SpawnProcess, Connection]] = []
        self._folder: TemporaryDirectory[str] | None = None

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank.

        The function is at the top level of a module; all that is sent must be fit to be pickled.

        Raises:
            RuntimeError: A rank failed; the message has the traceback of each that did.
        """
        answers = self.answers(function, *arguments)
        failed = {rank: a for rank, a in enumerate(answers) if isinstance(a, RankError)}
        if failed:
            texts = (f"rank {rank}, {error.kind}: {error.text}" for rank, error in failed.items())
            raise RuntimeError(f"{len(failed)} of {len(answers)} ranks failed\n" + "\n".join(texts))
        return answers

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank, or the `RankError` it made."""
        if not self._ranks:
            self._start()
        question = pickle.dumps((function, arguments))
        for _, connection in self._ranks:
            connection.send_bytes(question)
        hanging = RankError("hangs", "no answer", "no answer")
        answers: list[Any] = [hanging] * self.num_ranks
        waiting: dict[Any, int] = {own[1]: rank for rank, own in enumerate(self._ranks)}
        end = time.monotonic() + self._limit
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for answering in ready:
                rank = waiting.pop(answering)
                answers[rank] = self._received(rank)
                if isinstance(answers[rank], RankError):
                    end = min(end, time.monotonic() + self._timeout + 2)
        if any(isinstance(answer, RankError) for answer in answers):
            self.close()  # the ranks may be out of step
        return answers

    def close(self) -> None:
        """End all ranks; the next question starts new ones."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = TemporaryDirectory()
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._folder.name, rank, *self._options)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _received(self, rank: int) -> Any:
        process, connection = self._ranks[rank]
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            process.join(5)
            text = f"the process has ended with exit code {process.exitcode}"
            return RankError("gone", text, text)


def rank_device(kind: str, rank: int) -> torch.device:
    """Where a rank has its tensors."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def _serve(
    connection: Connection,
    folder: str,
    rank: int,
    num_ranks: int,
    kind: str,
    timeout: float,
    quiet: bool,
) -> None:
    torch.set_num_threads(1)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    if kind == "cuda":
        torch.cuda.set_device(rank_device(kind, rank))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), num_ranks),  # type: ignore[attr-defined]
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            sys.exit()
        try:
            answer = pickle.dumps(function(rank, *arguments))
        except Exception as error:
            failure = RankError(type(error).__name__, str(error), traceback.format_exc())
            answer = pickle.dumps(failure)
        connection.send_bytes(answer)
