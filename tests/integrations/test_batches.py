"""Batches as other libraries make them, with their own classes: what is read, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from modaldummy import BatchMetadataError, UnknownModalityError
from tests.integrations.batches import NAMES, Resolver, X, active, resolver_for

LIBRARIES: tuple[str, ...] = ()  # of each test: what it imports

# --- PyTorch's default collation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([{"modality": "T1"}, {"modality": "dMRI"}], ("T1", "dMRI")),
        ([{"modality": 0}, {"modality": 2}], ("T1", "dMRI")),
        ([{"modalities": ["T1", "dMRI"]}, {"modalities": ["T1", "rsfMRI"]}], NAMES),
        ([{"modalities": torch.tensor([True, False, False])}] * 2, ("T1",)),
        ([{"modalities": {"T1": True, "dMRI": False}}] * 2, ("T1",)),
        ([{"T1": X, "label": 1}] * 2, ("T1",)),
        ([{"T1": True, "dMRI": False}] * 2, ("T1",)),
        ([{"inputs": {"T1": X}, "label": 1}] * 2, ("T1",)),
    ],
    ids=["names", "indexes", "transposed", "masks", "flags", "data", "bools", "nested"],
)
def test_default_collate(samples: list[Any], expected: tuple[str, ...]) -> None:
    """Names, indexes, masks, flags and data of samples, transposed and nested by PyTorch."""
    assert active(default_collate(samples)) == expected


@pytest.mark.parametrize(
    "samples",
    [
        [{"T1": X}, {"dMRI": X}],
        [{"T1": X, "dMRI": None}, {"T1": None, "dMRI": X}],
        [{"modalities": ["T1", "dMRI"]}, {"modalities": ["T1"]}],
    ],
    ids=["keys", "None", "lengths"],
)
def test_what_default_collate_refuses_is_read_as_a_list(samples: list[Any]) -> None:
    with pytest.raises((KeyError, TypeError, RuntimeError)):
        default_collate(samples)
    (batch,) = DataLoader(samples, batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    assert active(batch) == ("T1", "dMRI")


def test_integers_are_data_once_collated() -> None:
    """The page warns of it: only in a sample or under an explicit key they could be told."""
    sample = {"T1": 1, "dMRI": 0}
    with pytest.raises(BatchMetadataError, match="Use True or False for a flag"):
        active(sample)
    with pytest.raises(BatchMetadataError, match="Use bools"):
        active(default_collate([{"modalities": sample}]))
    assert active(default_collate([sample])) == ("T1", "dMRI")


def test_a_pair_asks_for_the_part_that_says_it() -> None:
    batch = default_collate([({"T1": X}, 0), ({"T1": X}, 1)])
    with pytest.raises(BatchMetadataError, match=r"a tuple such as \(inputs, targets\), pass the"):
        active(batch)
    assert active(batch[0]) == ("T1",)


# --- transformers --------------------------------------------------------------------------------


def test_outputs_of_processors() -> None:
    """`BatchFeature` and `BatchEncoding`, keyed by modality, explicit, and nested."""
    from transformers import BatchEncoding, BatchFeature

    for kind in (BatchFeature, BatchEncoding):
        assert active(kind({"T1": X, "dMRI": None})) == ("T1",)
        assert active(kind({"input_ids": X, "modality": ["T1", "dMRI"]})) == ("T1", "dMRI")
        assert active(kind({"pixel_values": {"T1": X}, "input_ids": X})) == ("T1",)


def test_an_output_that_names_no_modality_asks_for_a_resolver() -> None:
    """`pixel_values` is nobody's name; the page shows the resolver."""
    from transformers import BatchFeature

    batch = BatchFeature({"pixel_values": X, "input_ids": X})
    with pytest.raises(BatchMetadataError, match=r"needs `DummyLossWrapper\(\.\.\., resolver="):
        active(batch)


def test_llavas_flat_list_of_modalities() -> None:
    """Its "text" is not in a map of towers: an error without a resolver, and left out with one."""
    batch = {"input_ids": X, "modalities": ["text", "image", "video"]}
    names = ("image", "video", "audio")
    with pytest.raises(UnknownModalityError, match="names the modality 'text'"):
        active(batch, names=names)
    resolver = resolver_for("LLaVA")
    assert active(batch, names=names, resolver=resolver) == ("image", "video")
    assert active({"modalities": ["text"]}, names=names, resolver=resolver) == ()


# --- datasets ------------------------------------------------------------------------------------


@pytest.mark.long
def test_rows_of_datasets() -> None:
    """Rows, slices and batches of `map`, where a missing column is filled with None."""
    from datasets import Dataset

    data = Dataset.from_dict({"T1": [[1.0], None, [1.0]], "dMRI": [None, [2.0], [2.0]]})
    assert [active(row) for row in data] == [("T1",), ("dMRI",), ("T1", "dMRI")]
    assert active(data[0:1]) == ("T1",)
    assert active(data[0:2]) == ("T1", "dMRI")
    assert active(data.with_format("torch")[0]) == ("T1",)
    seen = []
    data.map(lambda rows: seen.append(active(rows)), batched=True, batch_size=2)
    assert seen == [("T1", "dMRI")] * 2
    named = Dataset.from_list([{"modalities": ["T1"]}, {"modalities": []}]).with_format("torch")
    assert [active(named[i]) for i in range(2)] == [("T1",), ()]


# --- tensordict ----------------------------------------------------------------------------------


@pytest.mark.long
def test_tensordicts() -> None:
    """Nested ones, of which empty ones are inactive; flags; strings, whole and for each sample."""
    from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack

    empty = TensorDict({}, [4])
    nested = TensorDict({"T1": TensorDict({"pixels": X}, [4]), "dMRI": empty}, [4])
    assert active(nested) == ("T1",)
    assert active(TensorDict({"inputs": {"T1": X}, "label": X}, [4])) == ("T1",)
    assert active(TensorDict({"T1": X[:0], "dMRI": X[:0]}, [0])) == ()
    flags = {"T1": torch.ones(4).bool(), "dMRI": torch.zeros(4).bool()}
    assert active(TensorDict(flags, [4])) == ("T1",)
    assert active(TensorDict({"modalities": TensorDict(flags, [4])}, [4])) == ("T1",)
    assert active(TensorDict({"modality": NonTensorData("T1"), "x": X}, [4])) == ("T1",)
    each = NonTensorStack("T1", "T1", "dMRI", "T1")
    assert active(TensorDict({"modality": each, "x": X}, [4])) == ("T1", "dMRI")
    samples = [TensorDict({"modality": name, "x": X}) for name in ("T1", "dMRI")]
    for batch in (samples, TensorDict.stack(samples), lazy_stack(samples)):
        assert active(batch) == ("T1", "dMRI")


@pytest.mark.long
def test_tensorclasses() -> None:
    from tensordict import tensorclass

    @tensorclass
    class Scans:
        image: Tensor
        sound: Tensor | None = None

    scans = Scans(image=X, batch_size=[4])  # type: ignore[call-arg]  # of what the decorator makes
    assert active(scans, names=("image", "sound")) == ("image",)


@pytest.mark.long
def test_a_lazy_stack() -> None:
    """Samples may have different keys."""
    from tensordict import TensorDict, lazy_stack

    stack = lazy_stack([TensorDict({"T1": X}), TensorDict({"T1": X, "dMRI": X})])
    assert active(stack) == active(stack.tensordicts) == ("T1", "dMRI")


# --- PyTorch Geometric ---------------------------------------------------------------------------


# What torch_geometric compiles at import, which torch 2.13 wants compiled in another way.
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")


def graph(sizes: dict[str, int], **attributes: Any) -> Any:
    from torch_geometric.data import HeteroData

    data = HeteroData(**attributes)
    for kind, number in sizes.items():
        data[kind].x = torch.ones(number, 3)
    return data


@compiles
@pytest.mark.long
def test_graphs_whose_node_types_are_modalities() -> None:
    """`HeteroData` and batches of it, through the page's resolver, `x_dict` or an attribute."""
    from torch_geometric.data import Batch
    from torch_geometric.loader import DataLoader as GraphLoader

    resolver = resolver_for("PyTorch Geometric")
    one, two = graph({"T1": 2, "dMRI": 0}), graph({"T1": 0, "dMRI": 1})
    (both,) = GraphLoader([one, two], batch_size=2)
    for batch, expected in [
        (one, ("T1",)),
        (two, ("dMRI",)),
        (Batch.from_data_list([one, one]), ("T1",)),
        (both, ("T1", "dMRI")),
    ]:
        kinds = batch.node_types
        with pytest.raises(BatchMetadataError, match="resolver="):
            active(batch)
        assert active(batch, resolver=resolver) == active(batch.x_dict) == expected
        assert batch.node_types == kinds
    graphs = [graph({"T1": 2}, modalities=names) for names in (["T1"], ["T1", "dMRI"])]
    assert active(graphs[0]) == ("T1",)
    assert active(Batch.from_data_list(graphs)) == ("T1", "dMRI")


@compiles
@pytest.mark.long
@pytest.mark.parametrize("attribute", ["modality", "T1"])
def test_an_attribute_of_nodes_is_not_one_of_the_graph(attribute: str) -> None:
    """It is an error, and the data stay as they are."""
    data = graph({"scan": 2})
    data["scan"][attribute] = torch.tensor([0, 1])
    with pytest.raises(BatchMetadataError):
        active(data)
    assert data.node_types == ["scan"]


@compiles
@pytest.mark.long
@pytest.mark.parametrize("resolver", [None, lambda data: data.modality], ids=["plain", "resolver"])
def test_homogeneous_graphs(resolver: Resolver | None) -> None:
    from torch_geometric.data import Data

    assert active(Data(x=X, modality="T1"), resolver=resolver) == ("T1",)
