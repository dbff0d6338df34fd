"""Batches that nobody makes on purpose: they are read as they are meant, or refused."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from modaldummy import BatchMetadataError, active_modalities

KNOWN = ("T1", "rsfMRI", "dMRI")
HUGE = 10**12  # steps that would take for ever


@dataclasses.dataclass
class Unset:
    modality: Any
    inputs: Any = None
    other: Any = dataclasses.field(init=False)


class Piano:
    """Has items, and keys that are none of them."""

    keys = 88

    def __getitem__(self, index: int) -> str:
        return "T1"


TRUE, FALSE = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "field that was never set": (Unset(None, {"T1": True}), ("T1",)),
    "mask of one row, expanded": (torch.tensor([True, False, True]).expand(HUGE, 3), KNOWN[::2]),
    "mask of one row, broadcast": (np.broadcast_to([False, True, False], (HUGE, 3)), KNOWN[1:2]),
    "mask, the same in each column": (torch.tensor([[False], [True]]).expand(2, 3), KNOWN),
    "keyed mask, one flag later, expanded": (
        {"T1": torch.tensor([[False], [True]]).expand(2, HUGE), "dMRI": FALSE},
        KNOWN[:1],
    ),
    "names in the second row, broadcast": (
        np.broadcast_to([["T1"], ["dMRI"]], (2, HUGE)),
        KNOWN[::2],
    ),
    "one number": ({"T1": torch.zeros(1), "dMRI": np.zeros((1, 1))}, KNOWN[::2]),
    "mask of one flag": (TRUE.expand(2, 3), KNOWN),
    "index, expanded": (torch.tensor([1]).expand(HUGE), KNOWN[1:2]),
    "name, broadcast": (np.broadcast_to("T1", (HUGE, 2)), KNOWN[:1]),
    "keyed masks, expanded": ({"T1": FALSE.expand(HUGE), "dMRI": TRUE.expand(HUGE)}, KNOWN[2:]),
    "keyed nothing, broadcast": (
        {"T1": np.broadcast_to(np.array(None), (HUGE,)), "dMRI": "x"},
        KNOWN[2:],
    ),
    "matrix": (np.array([[True, False, False]]).view(np.matrix), KNOWN[:1]),
    "masked indexes": (np.ma.masked_array([0, 2], mask=[True, False]), KNOWN[2:]),
    "strings of any length": (np.array(["T1"], dtype=np.dtypes.StringDType()), KNOWN[:1]),
}


@pytest.mark.parametrize(("batch", "expected"), FORMS.values(), ids=FORMS)
def test_reads_rare_forms(batch: Any, expected: tuple[str, ...]) -> None:
    assert active_modalities(batch, KNOWN) == expected


MASK = torch.ones(3, dtype=torch.bool)
UNREADABLE = {
    "meta": MASK.to("meta"),
    "sparse": MASK.to_sparse(),
    "nested": torch.nested.nested_tensor([MASK], layout=torch.jagged),
}


@pytest.mark.parametrize("mask", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("place", [lambda mask: mask, lambda mask: {"T1": mask}])
def test_a_mask_that_cannot_be_read(mask: Any, place: Callable[[Any], Any]) -> None:
    with pytest.raises(BatchMetadataError, match="whose values cannot be read"):
        active_modalities(place(mask), KNOWN)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_data_are_not_read() -> None:
    """Where they are, and in which layout, is no matter."""
    data = torch.zeros(2, 3)
    nested = torch.nested.nested_tensor([data, data])  # it has no shape
    batch = {"T1": data.to("meta"), "rsfMRI": nested, "dMRI": data.to_sparse()}
    assert active_modalities(batch, KNOWN) == KNOWN


REFUSED = {
    "range": range(HUGE),
    "range under a key": {"modality": range(HUGE)},
    "buffer": memoryview(bytes(4)).cast("B", (2, 2)),
    "bytes": bytearray(),
    "items without keys": Piano(),
    "unset field": Unset(None),
    "integers that are no indexes": torch.empty(2, dtype=torch.bits8),
    "number of thousands of digits": 10**5000,
    "the same among names": ["T1", 10**5000],
    "nested tensor among names": [
        "T1",
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    ],
}


@pytest.mark.parametrize("batch", REFUSED.values(), ids=REFUSED)
def test_what_is_no_batch(batch: Any) -> None:
    with pytest.raises(
        BatchMetadataError, match=r"Known modalities|does not say which|integers could be"
    ):
        active_modalities(batch, KNOWN)


def test_no_modalities_are_known() -> None:
    with pytest.raises(BatchMetadataError, match=r"Known modalities: none\. Put"):
        active_modalities({}, [])
    assert active_modalities([], []) == active_modalities(np.zeros(0, dtype=bool), []) == ()


def test_a_slip_is_looked_for_among_some_keys() -> None:
    """Of a mapping by subject there may be a million."""
    keys = [f"sub-{number:05}" for number in range(1000)]
    for place, hint in ((999, True), (1000, False)):
        batch = dict.fromkeys([*keys[:place], "modalites", *keys[place:]], 1)
        with pytest.raises(BatchMetadataError) as error:
            active_modalities(batch, KNOWN)
        assert ("Did you mean 'modalities'" in str(error.value)) is hint


def test_what_a_batch_raises_is_passed_on() -> None:
    class Lazy:
        @property
        def modality(self) -> str:
            raise ConnectionError("the disk is gone")

    with pytest.raises(ConnectionError, match="the disk is gone"):
        active_modalities(Lazy(), KNOWN)


def test_a_collection_is_read_no_further_than_needed() -> None:
    class Endless(list[str]):
        def __iter__(self) -> Iterator[Any]:
            yield 1
            raise AssertionError

    with pytest.raises(BatchMetadataError):
        active_modalities(Endless(["x"]), KNOWN)
