"""Ranks answer together, and none that fails is waited for in vain."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fleet import Fleet, RankError


def product(rank: int, number: int) -> torch.Tensor:
    found = torch.tensor([float(number * (rank + 1))])
    dist.all_reduce(found)
    return found


def failing(rank: int, way: str) -> Any:
    if rank == 1:
        if way == "raises":
            raise LookupError("of rank 1")
        if way == "leaves":
            os._exit(3)
        return lambda: None  # cannot be sent
    time.sleep(0.1)
    return "an answer"


def waiting(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(600)


def test_all_ranks_are_asked_one_question_after_the_other(two: Fleet) -> None:
    for number in (1, 2):
        assert [answer.item() for answer in two.ask(product, number)] == [3 * number] * 2


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        ("raises", "LookupError", "of rank 1"),
        ("leaves", "gone", "the process has ended with exit code 3"),
        ("sends what cannot be sent", "AttributeError", "Can't"),
    ],
)
def test_a_rank_that_fails_is_told_from_others(way: str, kind: str, message: str) -> None:
    """And new ones answer the next question."""
    with Fleet(2) as fleet:
        first, second = fleet.answers(failing, way)
        assert first == "an answer"
        assert isinstance(second, RankError)
        assert (second.kind, message in second.message) == (kind, True)
        if way == "raises":
            with pytest.raises(RuntimeError, match=r"(?s)1 of 2 ranks.*rank 1, Lookup.*of rank 1"):
                fleet.ask(failing, way)
        assert [answer.item() for answer in fleet.ask(product, 1)] == [3, 3]


def test_a_rank_that_dies_ends_those_that_wait() -> None:
    """Long before the limit."""
    with Fleet(2, timeout=5) as fleet:
        kinds = [answer.kind for answer in fleet.answers(waiting)]
    assert kinds == ["hangs", "gone"]
