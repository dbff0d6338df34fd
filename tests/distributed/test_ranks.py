"""Ranks agree to go on or to stop: all raise the same error, and no rank waits for another."""

import os
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from modaldummy import DummyLossWrapper, ModalDummyError, check_ranks, hold_inactive
from tests.fleet import Fleet, RankError
from tests.holding import NAMES
from tests.preflight.models import Model, mapped

TIMEOUT = 4  # seconds


def sharded_towers() -> DummyLossWrapper:
    """Each tower but that of T1 is sharded by itself."""
    model = Model()
    for name in NAMES[1:]:
        fully_shard(model.towers[name])
    return mapped(model)


def outcome(wrapper: DummyLossWrapper, batch: Any, **options: Any) -> str:
    """The error of `check_ranks`, or nothing."""
    try:
        check_ranks(wrapper, batch, **options)
    except ModalDummyError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_turn(rank: int, steps: list[list[Any]]) -> list[str]:
    """The error of a rank at each step; `steps` gives the modalities of each rank."""
    wrapper = sharded_towers()
    return [outcome(wrapper, batches[rank % len(batches)]) for batches in steps]


def test_all_ranks_raise_the_same_or_nothing(fleet: Fleet) -> None:
    """And go on with the next step, if they like."""
    steps = [[["T1"], ["rsfMRI"]], [["T1"], []], [["dMRI"], ["dMRI"]], [["T1"], ["dMRI", "T1"]]]
    first, *others = fleet.ask(in_turn, steps)
    assert all(texts == first for texts in others)
    size = fleet.num_ranks
    even, odd = ("rank 0", "rank 1") if size == 2 else ("ranks 0, 2", "ranks 1, 3")
    assert first[1] == first[2] == ""
    assert f"{even}: T1; {odd}: rsfMRI. These parameters are in their own FSDP2 unit." in first[0]
    assert "This concerns rsfMRI (towers.rsfMRI.bias, towers.rsfMRI.weight)." in first[0]
    assert f"{even}: T1; {odd}: T1, dMRI. These parameters are in their own FSDP2 unit." in first[3]


def test_a_rank_that_cannot_read_its_batch_stops_all_at_once(fleet: Fleet) -> None:
    """It says why, and the others say who; then all go on."""
    steps = [[["T1"], "PET"], [["T1"], ["T1"]], [["T1"], ["rsfMRI"]]]
    for rank, (first, second, third) in enumerate(fleet.ask(in_turn, steps)):
        if rank % 2:
            assert "UnknownModalityError" in first
            assert "'PET'" in first
        else:
            who = "rank 1." if fleet.num_ranks == 2 else "ranks 1, 3."
            assert first.startswith("RankDisagreementError: The batch could not be read on")
            assert who in first
        assert second == ""
        assert third.startswith("RankDisagreementError: Ranks have different modalities")


def counted(rank: int) -> list[tuple[int, int]]:
    """How many ranks and bytes each collective of a call takes."""
    sizes = []
    gather = dist.all_gather

    def count(everyone: list[Any], own: Any, group: Any) -> None:
        sizes.append((len(everyone), own.numel() * own.element_size()))
        gather(everyone, own, group=group)

    wrapper = sharded_towers()
    with patch.object(dist, "all_gather", count):
        check_ranks(wrapper, ["T1"])
        outcome(wrapper, NAMES[rank % 2])
    return sizes


def test_a_call_takes_one_gather_of_a_few_bytes(fleet: Fleet) -> None:
    """The first call also compares a digest of the maps."""
    for sizes in fleet.ask(counted):
        assert sizes == [(fleet.num_ranks, 16), *[(fleet.num_ranks, len(NAMES) + 1)] * 2]


def in_pairs(rank: int) -> tuple[str, str]:
    """Ranks 0 and 3, and ranks 1 and 2, agree with each other; then with the neighbour."""
    pairs = [[0, 3], [1, 2]], [[0, 1], [2, 3]]
    wrapper = sharded_towers()
    texts = []
    for groups in pairs:
        made = [dist.new_group(ranks) for ranks in groups]
        (group,) = (g for g, ranks in zip(made, groups, strict=True) if rank in ranks)
        texts.append(outcome(wrapper, ["T1"] if rank in (0, 3) else ["rsfMRI"], group=group))
    return texts[0], texts[1]


def test_a_group_agrees_without_the_others(fleets: Callable[[int], Fleet]) -> None:
    """Ranks are named as they are in the whole."""
    for rank, (first, second) in enumerate(fleets(4).ask(in_pairs)):
        assert first == ""
        active = "rank 0: T1; rank 1: rsfMRI" if rank < 2 else "rank 2: rsfMRI; rank 3: T1"
        assert f": {active}. These parameters are in their own FSDP2 unit." in second


# --- ranks with other maps -----------------------------------------------------------------------

# The map of each rank, with which calls go on or stop.
PATHS: dict[Any, Any] = {
    "T1": ["towers.T1.weight", "towers.T1.bias"],
    "rsfMRI": "towers.rsfMRI",
    "dMRI": "towers.dMRI",
    ("T1", "dMRI"): "trunk",
}
SAME: dict[str, dict[Any, Any]] = {
    "backwards": dict(reversed(PATHS.items())),
    "a tuple backwards": {("dMRI", "T1"): "trunk"} | {n: PATHS[n] for n in NAMES},
    "paths backwards": PATHS | {"T1": ["towers.T1.bias", "towers.T1.weight"]},
}
OTHER: dict[str, tuple[dict[Any, Any], str]] = {
    "another key": (
        {"PET" if key == "T1" else key: path for key, path in PATHS.items()},
        "in PET, T1. The paths of PET are on rank 0: nothing; rank 1: towers.T1.bias, towers.",
    ),
    "fewer keys": (
        {name: PATHS[name] for name in ("T1", "rsfMRI")},
        "in T1-dMRI, dMRI. The paths of T1-dMRI are on rank 0: trunk; rank 1: nothing. Give",
    ),
    "another path": (
        PATHS | {"T1": "towers.dMRI"},
        "in T1. The paths of T1 are on rank 0: towers.T1.bias, towers.T1.weight; rank 1: towers.dM",
    ),
}


def with_other_maps(rank: int, others: dict[Any, Any]) -> list[str]:
    """`check_ranks` on batches that differ, that agree, and a step with a hold."""
    model = Model()
    for tower in model.towers.values():
        fully_shard(tower)
    wrapper = DummyLossWrapper(model, others if rank else PATHS)
    texts = [outcome(wrapper, batch) for batch in (NAMES[rank % 2], "T1")]
    model = Model()
    wrapper = DummyLossWrapper(model, others if rank else PATHS)
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    model.total(wrapper, NAMES[rank % 2]).backward()
    try:
        optimizer.step()
    except ModalDummyError as error:
        return [*texts, str(error)]
    return [*texts, str(sorted(handle.held))]


@pytest.mark.parametrize("others", SAME.values(), ids=SAME)
def test_the_order_of_a_map_does_not_matter(fleet: Fleet, others: dict[Any, Any]) -> None:
    """A map that is made from a set has another order in each process."""
    answers = fleet.ask(with_other_maps, others)
    for differing, agreeing, held in answers:
        assert "Ranks have different modalities" in differing
        assert differing == answers[0][0]
        assert agreeing == ""
        assert held == "['towers.dMRI.bias', 'towers.dMRI.weight', 'trunk.bias', 'trunk.weight']"


@pytest.mark.parametrize(("others", "text"), OTHER.values(), ids=OTHER)
def test_ranks_with_other_keys_or_paths_are_refused(
    two: Fleet, others: dict[Any, Any], text: str
) -> None:
    """Each time, and on all ranks in the same words."""
    answers = two.ask(with_other_maps, others)
    for first, second, step in answers:
        assert f"`modality_param_map` differs among ranks {text}" in first
        assert first == second == f"RankDisagreementError: {step}" == answers[0][0]


# --- ranks that do not come ----------------------------------------------------------------------


def ending(rank: int, fault: str) -> tuple[str, str]:
    """The error of a rank whose neighbour does not come, and its cause."""
    wrapper = sharded_towers()
    check_ranks(wrapper, ["T1"])
    if rank == 1 and fault == "dies":
        os._exit(1)
    if rank == 1 and fault == "hangs":
        time.sleep(2 * TIMEOUT)
    try:
        check_ranks(wrapper, ["T1"])
    except Exception as error:
        return f"{type(error).__name__}: {error}", type(error.__cause__).__name__
    return "", ""


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_the_others_wait_no_longer_than_their_group(fault: str) -> None:
    with Fleet(2, timeout=TIMEOUT) as fleet:
        (text, cause), other = fleet.answers(ending, fault)
    assert text.startswith("RankDisagreementError: Not all ranks called `check_ranks`")
    assert cause in ("RuntimeError", "DistBackendError", "DistNetworkError")
    if fault == "dies":
        assert isinstance(other, RankError)
        assert other.kind == "gone"
    else:
        assert other[0].startswith("RankDisagreementError: Not all ranks called `check_ranks`")
