"""A rank that fails ends in an error on every rank, within the timeout of the group."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, check_ranks
from tests.distributed.oracle import MAP, Model, batch_of, loss_of
from tests.fleet import Fleet, RankError

TIMEOUT = 4  # seconds


def train(rank: int, fault: str, checked: bool, group: Any) -> str:
    ddp = DistributedDataParallel(Model(), process_group=group)
    wrapper = DummyLossWrapper(ddp, MAP)
    for step in range(3):
        active = ("T1", "dMRI")[: rank + 1]
        failing = rank == 1 and step == 1
        metadata = {"modality": "PET" if failing and fault == "unknown modality" else active}
        if checked:
            check_ranks(wrapper, metadata, group=group)
        loss = loss_of(ddp(batch_of(active, step, rank)))
        if failing and fault == "dies":
            os._exit(1)
        if failing and fault == "hangs":
            time.sleep(2 * TIMEOUT)
        wrapper.total(loss, metadata).backward()
    return "finished"


def ending(rank: int, fault: str, checked: bool) -> str:
    """The type of the error in which training ends."""
    # A group of its own, since the timeout spoils it.
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    try:
        return train(rank, fault, checked, group)
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("checked", [False, True])
def test_without_a_fault_all_finish(two: Fleet, checked: bool) -> None:
    assert two.ask(ending, "none", checked) == ["finished"] * 2


def test_if_one_rank_cannot_read_its_batch_all_stop(two: Fleet) -> None:
    """With `check_ranks` at once; otherwise the others give up after the timeout."""
    checked = two.ask(ending, "unknown modality", True)
    assert checked == ["RankDisagreementError", "UnknownModalityError"]
    unchecked = two.ask(ending, "unknown modality", False)
    assert unchecked == ["RuntimeError", "UnknownModalityError"]


def test_a_rank_that_hangs_does_not_hang_the_others(two: Fleet) -> None:
    assert two.ask(ending, "hangs", True) == ["RuntimeError"] * 2


def test_a_rank_that_dies_does_not_hang_the_others() -> None:
    with Fleet(2, timeout=TIMEOUT) as fleet:
        first, second = fleet.answers(ending, "dies", False)
    assert first == "RuntimeError"
    assert isinstance(second, RankError)
    assert second.kind == "gone"
