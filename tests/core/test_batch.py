"""Every form of batch metadata, and what is not read."""

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modaldummy import BatchMetadataError, active_modalities

KNOWN = ("T1", "rsfMRI", "dMRI")
X = torch.zeros(2, 3)

Named = namedtuple("Named", ["x", "modality"])  # what collate functions build
Scans = namedtuple("Scans", ["T1", "dMRI"])


@dataclass
class Batch:
    x: Tensor
    modalities: list[str]


@dataclass
class ByField:
    T1: Tensor | None = None
    dMRI: Tensor | None = None  # noqa: N815  # the name of a modality
    labels: list[int] = field(default_factory=list)


@dataclass
class WithProperty:
    x: Tensor

    @property
    def modality(self) -> str:
        return "dMRI"


@dataclass
class WithMethod:
    modality: str
    modalities: Any = None


class TensorDictLike(Mapping[str, Any]):
    """As in tensordict: a Mapping that iterates over rows, and whose length counts rows."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def keys(self) -> Any:
        return self.fields.keys()

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Any:
        raise TypeError("iteration over a 0-d tensordict")

    def __len__(self) -> int:
        return 0

    def tolist(self) -> Any:
        return list(self)

    def __bool__(self) -> bool:
        raise RuntimeError("a tensordict has no truth value")


class GraphLike:
    """As in PyTorch Geometric: `keys` is no Mapping's, and asking for a field creates it."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.created: list[str] = []

    def keys(self) -> list[str]:
        return [*self.fields, "edge_index"]

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            self.created.append(key)
        return self.fields.get(key, {})


class HeteroGraphLike(GraphLike):
    """Its keys are what its nodes have, and its items are kinds of nodes."""

    node_types = ("scan",)


class StackLike(TensorDictLike):
    """As a TensorDict that is stacked lazily: it has the keys that all of its samples have."""

    def __init__(self, *samples: TensorDictLike) -> None:
        shared = set.intersection(*(set(sample.keys()) for sample in samples))
        super().__init__(**dict.fromkeys(shared))
        self.tensordicts = list(samples)


class MakesFields(dict[str, Any]):
    """As some attribute dictionaries do, it answers for every attribute with an empty one."""

    def __getattr__(self, name: str) -> Any:
        return MakesFields()


class Modality(StrEnum):
    T1 = "T1"
    RSFMRI = "rsfMRI"


class OldModality(str, Enum):  # noqa: UP042  # still common, and prints in another way
    T1 = "T1"
    DIFFUSION = "dMRI"


FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "name": ("T1", ("T1",)),
    "list of names": (["dMRI", "T1"], ("T1", "dMRI")),
    "set of names": ({"dMRI", "T1"}, ("T1", "dMRI")),
    "keys of a dict": ({"T1": 0}.keys(), ("T1",)),
    "array of names": (np.array([["T1"], ["dMRI"]]), ("T1", "dMRI")),
    "names per sample": ([["T1"], [], ["dMRI", "T1"]], ("T1", "dMRI")),
    "names as collate transposes them": ([("T1", "T1"), ("dMRI", "rsfMRI")], KNOWN),
    "explicitly nothing": ([], ()),
    "active_modalities key": ({"active_modalities": "T1", "x": X}, ("T1",)),
    "modalities key": ({"modalities": ["T1", "dMRI"]}, ("T1", "dMRI")),
    "modality key per sample": ({"modality": ["T1", "T1", "dMRI"]}, ("T1", "dMRI")),
    "explicit key that says none": ({"modalities": [], "T1": X}, ()),
    "explicit key before keys by modality": ({"dMRI": X, "modality": "T1"}, ("T1",)),
    "explicit None is not given": ({"modalities": None, "modality": "T1"}, ("T1",)),
    "flags under an explicit key": ({"modalities": {"T1": True, "dMRI": False}}, ("T1",)),
    "mask under an explicit key": (
        {"active_modalities": torch.tensor([True, False, True])},
        ("T1", "dMRI"),
    ),
    "list as mask under an explicit key": ({"modalities": [True, False, True]}, ("T1", "dMRI")),
    "lists as masks per sample": (
        {"modalities": [[True, False, False], [False, False, True]]},
        ("T1", "dMRI"),
    ),
    "indexes under an explicit key": ({"modality": torch.tensor([0, 0, 2, -1])}, ("T1", "dMRI")),
    "samples under an explicit key": (
        {"modality": [{"modality": "T1"}, {"dMRI": X}]},
        ("T1", "dMRI"),
    ),
    "TensorDict-like": (TensorDictLike(modality=["T1"], x=X), ("T1",)),
    "TensorDict-like within": ({"T1": TensorDictLike(img=X), "dMRI": TensorDictLike()}, ("T1",)),
    "TensorDict-like one level down": (TensorDictLike(x=TensorDictLike(dMRI=X)), ("dMRI",)),
    "TensorDict-like of flags": ({"modality": TensorDictLike(T1=True, dMRI=False)}, ("T1",)),
    "TensorDict-like stacked lazily": (
        StackLike(TensorDictLike(T1=X), TensorDictLike(T1=X, dMRI=X)),
        ("T1", "dMRI"),
    ),
    "attribute dictionary": (MakesFields(T1=X, y=X), ("T1",)),
    "masks under an explicit key": (
        {"modalities": {"T1": torch.tensor([True, False]), "dMRI": torch.tensor([False, False])}},
        ("T1",),
    ),
    "graph-like": (GraphLike(T1=X, y=X), ("T1",)),
    "Enum": (OldModality.DIFFUSION, ("dMRI",)),
    "list of Enums": ([Modality.RSFMRI, OldModality.T1], ("T1", "rsfMRI")),
    "flags by Enum": ({"modalities": {OldModality.DIFFUSION: True, Modality.T1: False}}, ("dMRI",)),
    "column with nulls": ({"modality": ["T1", None, "dMRI"]}, ("T1", "dMRI")),
    "array with nulls": (np.array(["T1", None], dtype=object), ("T1",)),
    "dataclass": (Batch(X, ["dMRI"]), ("dMRI",)),
    "dataclass with a property": (WithProperty(X), ("dMRI",)),
    "dataclass by field": (ByField(T1=X), ("T1",)),
    "named tuple": (Named(X, "rsfMRI"), ("rsfMRI",)),
    "named tuple by field": (Scans(T1=None, dMRI=X), ("dMRI",)),
    "object": (SimpleNamespace(modality=["T1"], x=X), ("T1",)),
    "object with a mask": (SimpleNamespace(modality=[True, False, True], x=X), ("T1", "dMRI")),
    "keyed, None and empty": (
        {"T1": None, "rsfMRI": torch.zeros(0, 3), "dMRI": X, "y": X},
        ("dMRI",),
    ),
    "keyed, flags": ({"T1": False, "rsfMRI": True, "dMRI": np.bool_(False)}, ("rsfMRI",)),
    "keyed, all-False mask": (
        {"T1": torch.tensor([False, False]), "dMRI": np.array([False, True])},
        ("dMRI",),
    ),
    "keyed, 0-d bool": ({"T1": torch.tensor(True), "dMRI": torch.tensor(False)}, ("T1",)),
    "keyed, lists": ({"T1": [], "rsfMRI": [None, None], "dMRI": [None, X]}, ("dMRI",)),
    "keyed, array of objects": (
        {"T1": np.array([None, None]), "dMRI": np.array([None, "x"], dtype=object)},
        ("dMRI",),
    ),
    "keyed, arrays are data": ({"T1": np.zeros((2, 3)), "dMRI": np.zeros((0, 3))}, ("T1",)),
    "keyed, beside an unrelated mapping": ({"info": {"site": 1}, "scans": {"T1": X}}, ("T1",)),
    "keyed, numbers in a list are data": ({"T1": [0, 0], "dMRI": [False]}, ("T1",)),
    "keyed, integer tensors are data": ({"T1": torch.tensor([0, 0])}, ("T1",)),
    "keyed, nested inputs": ({"T1": {"pixel_values": X, "labels": X}, "dMRI": {}}, ("T1",)),
    "keyed, None inside": ({"T1": {"x": X, "y": None}, "dMRI": {"x": None, "y": [None]}}, ("T1",)),
    "keyed, numbers inside are data": ({"T1": {"id": 0}, "dMRI": [X[0, 0]]}, ("T1", "dMRI")),
    "keyed, paths": ({"T1": "sub-01_T1w.nii", "dMRI": ""}, ("T1",)),
    "keyed, other objects": ({"T1": object(), "dMRI": None}, ("T1",)),
    "keyed, all absent by name": ({"T1": None, "dMRI": None}, ()),
    "one level down": ({"pixel_values": {"T1": X, "dMRI": None}, "labels": X}, ("T1",)),
    "explicit key one level down": ({"meta": {"modality": "dMRI"}, "x": X}, ("dMRI",)),
    "two places that agree": ({"x": {"T1": X}, "mask": {"T1": X, "dMRI": None}}, ("T1",)),
    "samples": ([{"modality": "T1", "id": 1}, {"modality": ["dMRI"]}], ("T1", "dMRI")),
    "samples keyed by modality": ([{"T1": X}, {"rsfMRI": X, "T1": None}], ("T1", "rsfMRI")),
    "samples as objects": ([Batch(X, ["T1"]), Batch(X, [])], ("T1",)),
    "mask": (torch.tensor([False, True, False]), ("rsfMRI",)),
    "mask per sample": (np.array([[True, False, False], [False, False, True]]), ("T1", "dMRI")),
    "mask of an empty batch": (torch.zeros(0, 3, dtype=torch.bool), ()),
    "list of masks": ([torch.tensor([True, False, False])] * 2, ("T1",)),
    "indexes": (torch.tensor([2, 2, 0]), ("T1", "dMRI")),
    "indexes, -1 for none": (np.array([-1, 1]), ("rsfMRI",)),
    "no indexes": (torch.zeros(0, dtype=torch.int64), ()),
}


@pytest.mark.parametrize(("batch", "expected"), FORMS.values(), ids=FORMS.keys())
def test_reads_every_form(batch: Any, expected: tuple[str, ...]) -> None:
    """And leaves the batch as it was."""
    before = repr(batch)
    assert active_modalities(batch, KNOWN) == expected
    assert repr(batch) == before


@given(active=st.sets(st.sampled_from(KNOWN)), samples=st.integers(1, 4), data=st.data())
def test_all_forms_agree(active: set[str], samples: int, data: st.DataObject) -> None:
    """However the same sets per sample are written down, the same modalities are active."""
    per_sample = [
        data.draw(st.sets(st.sampled_from(sorted(active or KNOWN)))) for _ in range(samples)
    ]
    union = set().union(*per_sample)
    mask = [[name in names for name in KNOWN] for names in per_sample]
    forms: list[Any] = [
        [sorted(names) for names in per_sample],
        {"modalities": per_sample},
        [{"modality": sorted(names)} for names in per_sample],
        torch.tensor(mask),
        np.array(mask),
        {"modality": mask},
        {name: name in union for name in KNOWN},
        {name: torch.tensor([name in names for names in per_sample]) for name in KNOWN},
        {"pixel_values": {name: X if name in union else None for name in KNOWN}},
        torch.tensor([KNOWN.index(name) for name in sorted(union)] or [-1]),
    ]
    expected = tuple(name for name in KNOWN if name in union)
    assert [active_modalities(form, KNOWN) for form in forms] == [expected] * len(forms)


def in_array(inner: Any) -> Any:
    """The key, the array, and the list that it becomes count as three levels."""
    array = np.empty(1, dtype=object)
    array[0] = inner
    return {"modality": array}


# Ways to nest metadata, and how many levels each adds.
NESTINGS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "lists": (lambda inner: [inner], 1),
    "objects": (lambda inner: SimpleNamespace(modality=inner), 1),
    "explicit keys": (lambda inner: {"modality": inner}, 1),
    "arrays of objects": (in_array, 3),
}
TOPS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "alone": (lambda inner: inner, 0),
    "one level down": (lambda inner: {"inputs": {"modality": inner}}, 2),
}


@pytest.mark.parametrize(("nest", "levels"), NESTINGS.values(), ids=NESTINGS)
@pytest.mark.parametrize(("top", "above"), TOPS.values(), ids=TOPS)
def test_sixteen_levels_are_read_and_no_more(
    nest: Callable[[Any], Any], levels: int, top: Callable[[Any], Any], above: int
) -> None:
    inner: Any = "T1"
    for _ in range((16 - above) // levels):
        inner = nest(inner)
    assert active_modalities(top(inner), KNOWN) == ("T1",)
    with pytest.raises(BatchMetadataError, match="nested more than 16 levels deep"):
        active_modalities(top(nest(inner)), KNOWN)


@pytest.mark.parametrize("make", [SimpleNamespace, WithMethod])
def test_a_callable_attribute_is_no_metadata(make: Any) -> None:
    """Objects have methods called `modalities`; a method says nothing about a batch."""
    batch = make(modality="dMRI")
    batch.modalities = lambda: ["T1"]
    assert active_modalities(batch, KNOWN) == ("dMRI",)


@pytest.mark.parametrize("fields", [{"modality": "T1"}, {"T1": X}, {"x": X}])
def test_nothing_is_created_by_looking(fields: dict[str, Any]) -> None:
    """A graph that makes the fields it is asked for has no more of them afterwards."""
    graph = GraphLike(**fields)
    try:
        active_modalities(graph, KNOWN)
    except ValueError:
        assert fields == {"x": X}
    assert graph.created == []


@pytest.mark.parametrize("field", ["modality", "T1"])
def test_what_nodes_of_a_graph_have_is_no_metadata(field: str) -> None:
    graph = HeteroGraphLike(**{field: X})
    with pytest.raises(BatchMetadataError, match="resolver"):
        active_modalities(graph, KNOWN)
    assert graph.created == []
