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

# What rank 1 says of its batch at the second step.
FAULTS: dict[str, tuple[Any, str]] = {
    "unknown modality": ({"modality": "PET"}, "UnknownModalityError"),
    "no metadata": ({}, "BatchMetadataError"),
    "a batch of nothing": (None, "BatchMetadataError"),
}


def train(rank: int, fault: str, checked: bool, group: Any) -> str:
    ddp = DistributedDataParallel(Model(), process_group=group)
    wrapper = DummyLossWrapper(ddp, MAP)
    for step in range(3):
        active = ("T1", "dMRI")[: rank + 1]
        failing = rank == 1 and step == 1
        metadata = FAULTS[fault][0] if failing and fault in FAULTS else {"modality": active}
        if checked:
            check_ranks(wrapper, metadata, group=group)
        loss = loss_of(ddp(batch_of(active, step, rank)))
        if failing and fault == "dies":
            os._exit(1)
        if failing and fault == "hangs":
            time.sleep(2 * TIMEOUT)
        wrapper.total(loss, metadata).backward()
    return "finished"


def ending(rank: int, fault: str, checked: bool) -> tuple[str, float]:
    """The type of the error, and how long it took."""
    # A group of its own, since the timeout spoils it.
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    begin = time.monotonic()
    try:
        return train(rank, fault, checked, group), 0.0
    except Exception as error:
        return type(error).__name__, time.monotonic() - begin


def test_without_a_fault_all_finish(two: Fleet) -> None:
    """A batch without modalities is none."""
    for checked in (False, True):
        assert two.ask(ending, "none", checked) == [("finished", 0.0)] * 2


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_one_rank_cannot_read_stop_all_at_once(two: Fleet, fault: str) -> None:
    """`check_ranks` has nobody wait."""
    (first, elapsed), (second, _) = two.ask(ending, fault, True)
    assert (first, second) == ("RankDisagreementError", FAULTS[fault][1])
    assert elapsed < TIMEOUT


def test_without_a_check_the_others_give_up(two: Fleet) -> None:
    (first, _), (second, _) = two.ask(ending, "unknown modality", False)
    assert (first, second) == ("RuntimeError", "UnknownModalityError")


def test_a_rank_that_hangs_does_not_hang_the_others(two: Fleet) -> None:
    (first, elapsed), (second, _) = two.ask(ending, "hangs", True)
    assert (first, second) == ("RuntimeError", "RuntimeError")
    assert elapsed < 2 * TIMEOUT


def test_a_rank_that_dies_does_not_hang_the_others() -> None:
    with Fleet(2, timeout=TIMEOUT) as fleet:
        first, second = fleet.answers(ending, "dies", False)
    assert first[0] == "RuntimeError"
    assert isinstance(second, RankError)
    assert second.kind == "gone"
