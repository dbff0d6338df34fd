"""Ranks compare their maps once for each wrapper and group; the other rank is made up."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from modaldummy import DummyLossWrapper, RankDisagreementError
from modaldummy._ranks.agreement import check_same_map, gather_objects, is_same_text
from tests.fake_ranks import pretend
from tests.preflight.models import Model

PATHS = {"T1": "towers.T1", "dMRI": ["towers.dMRI.weight", "towers.dMRI.bias"]}


class OtherRank:
    """A second rank that sends what this one sent, with some bytes replaced."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.old = self.new = b""

    def all_gather(self, received: list[Tensor], sent: Tensor, group: object) -> None:
        self.num_calls += 1
        received[0].copy_(sent)
        row = bytes(sent.tolist()).replace(self.old, self.new) if self.old else bytes(sent.tolist())
        if self.old and len(row) == 16:
            row = bytes(16)  # another digest
        received[1].copy_(sent.new_tensor(list(row)))


@pytest.fixture
def other(process_group: None, monkeypatch: pytest.MonkeyPatch) -> OtherRank:
    rank = OtherRank()
    pretend(monkeypatch, 2, rank.all_gather)
    return rank


def wrapper_of(paths: dict[Any, Any] = PATHS) -> DummyLossWrapper:
    return DummyLossWrapper(Model(), paths)


def test_maps_that_agree_are_compared_once_for_each_wrapper_and_group(other: OtherRank) -> None:
    wrapper = wrapper_of()
    for group in (None, None, dist.group.WORLD):  # all are the same group
        check_same_map(wrapper, group, "it")
    assert other.num_calls == 1
    check_same_map(wrapper, dist.new_group([0]), "it")
    assert other.num_calls == 2
    check_same_map(wrapper_of(), None, "it")
    assert other.num_calls == 3


def test_maps_that_differ_are_refused_each_time(other: OtherRank) -> None:
    wrapper = wrapper_of()
    other.old, other.new = b"towers.T1", b"towers.T2"
    text = (
        r"differs among ranks in T1\. The paths of T1 are on rank 0: towers\.T1; rank 1: "
        r"towers\.T2\. Give every rank the same keys and paths\."
    )
    for _ in range(2):
        with pytest.raises(RankDisagreementError, match=text):
            check_same_map(wrapper, None, "it")
    other.old = b""
    check_same_map(wrapper, None, "it")


def test_texts_are_compared_by_their_digests(other: OtherRank) -> None:
    assert is_same_text(wrapper_of(), "the same", None, "it")
    assert other.num_calls == 1
    other.old = b"anything"
    assert not is_same_text(wrapper_of(), "another", None, "it")


def test_a_rank_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, group: Any) -> None:
        raise RuntimeError("Timed out")

    monkeypatch.setattr(dist, "all_gather_object", fail)
    with pytest.raises(RankDisagreementError, match="Not all ranks called it before the timeout"):
        gather_objects("anything", None, "it")
