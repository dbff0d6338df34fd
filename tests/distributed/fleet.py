"""Gloo ranks that stay, and work off one case after the other: a group takes seconds to start."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds until a rank that waits gives up


class RankError(Exception):
    """What a rank raised: the name of its type, and its traceback as text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


class Fleet:
    """Ranks that call what they are asked to, all at once.

    Args:
        world_size: How many ranks.
        timeout: Seconds until a rank that waits for another gives up.
    """

    def __init__(self, world_size: int, timeout: float = TIMEOUT) -> None:
        self.world_size = world_size
        self._timeout = timeout
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folders: list[TemporaryDirectory[str]] = []

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank.

        Raises:
            AssertionError: From what the first of the ranks raised that did; new ranks are started
                for the next question.
        """
        answers = self.answers(function, *arguments)
        for rank, answer in enumerate(answers):
            if isinstance(answer, RankError):
                others = [a.kind if isinstance(a, RankError) else "an answer" for a in answers]
                raise AssertionError(f"rank {rank} of {others}:\n{answer.text}")
        return answers

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank, or the `RankError` it made.

        The kind is "gone" for a rank that left, "hangs" for one that neither answers nor gives up.
        """
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, arguments))
        answers = [self._receive(connection) for _, connection in self._ranks]
        if any(isinstance(answer, RankError) for answer in answers):
            self.close()  # the ranks may be out of step
        return answers

    def close(self) -> None:
        """End all ranks; the next question starts new ones."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        for folder in self._folders:
            folder.cleanup()
        self._ranks, self._folders = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = TemporaryDirectory()
        self._folders.append(folder)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, folder.name, rank, self.world_size, self._timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _receive(self, connection: Connection) -> Any:
        try:
            # Time to start, and for one rank after the other to give up.
            if connection.poll(2 * self._timeout + 60):
                return connection.recv()
        except (EOFError, ConnectionResetError):
            return RankError("gone", "the process has ended")
        return RankError("hangs", "no answer")


def _serve(connection: Connection, folder: str, rank: int, world_size: int, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            sys.exit()
        try:
            answer = function(rank, *arguments)
        except Exception as error:
            answer = RankError(type(error).__name__, traceback.format_exc())
        connection.send(answer)
