"""Batches of other libraries, made with their own classes: what the wrapper reads from them."""

import io
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from modaldummy import (
    BatchMetadataError,
    DummyLossWrapper,
    UnknownModalityError,
    active_modalities,
)

NAMES = ("T1", "rsfMRI", "dMRI")
PAGE = Path(__file__).parents[2] / "docs/how-to/batches.md"
X = torch.ones(4, 3)
Resolver = Callable[[Any], Any]


def active(batch: Any, *, names: tuple[str, ...] = NAMES, resolver: Resolver | None = None) -> Any:
    """What `total`, a wrapped loss and `active_modalities` read from a batch, all the same."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    wrapper = DummyLossWrapper(model, {name: name for name in names}, resolver=resolver)
    wrapper.total(torch.tensor(2.0), batch)
    assert wrapper.last is not None
    found = wrapper.last.active
    wrapper(lambda model, inputs: torch.tensor(2.0))(model, batch)
    assert wrapper.last.active == found
    assert resolver or active_modalities(batch, names) == found
    return found


def resolver_for(library: str) -> Resolver:
    """The resolver that the page shows."""
    row = re.search(rf"^\| {library}.*`(lambda [^`]+)` \|$", PAGE.read_text(), re.M)
    assert row is not None
    resolver: Resolver = eval(row.group(1))
    return resolver


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
def test_samples_that_default_collate_refuses_are_read_as_a_list(samples: list[Any]) -> None:
    with pytest.raises((KeyError, TypeError, RuntimeError)):
        default_collate(samples)
    (batch,) = DataLoader(samples, batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    assert active(batch) == ("T1", "dMRI")


def test_integers_count_as_data_after_collation() -> None:
    """The page warns of it: only a sample or an explicit key can show that they are flags."""
    sample = {"T1": 1, "dMRI": 0}
    with pytest.raises(BatchMetadataError, match="Use True or False for a flag"):
        active(sample)
    with pytest.raises(BatchMetadataError, match="Use bools"):
        active(default_collate([{"modalities": sample}]))
    assert active(default_collate([sample])) == ("T1", "dMRI")


def test_of_a_pair_one_part_has_to_be_chosen() -> None:
    batch = default_collate([({"T1": X}, 0), ({"T1": X}, 1)])
    with pytest.raises(BatchMetadataError, match=r"a tuple such as \(inputs, targets\), pass the"):
        active(batch)
    assert active(batch[0]) == ("T1",)


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BatchFeature", "BatchEncoding"])
def test_outputs_of_processors(kind: str) -> None:
    """Without a modality among its keys, such an output needs a resolver."""
    make = getattr(import_module("transformers"), kind)
    assert active(make({"T1": X, "dMRI": None})) == ("T1",)
    assert active(make({"input_ids": X, "modality": ["T1", "dMRI"]})) == ("T1", "dMRI")
    assert active(make({"pixel_values": {"T1": X}, "input_ids": X})) == ("T1",)
    with pytest.raises(BatchMetadataError, match=r"needs `DummyLossWrapper\(\.\.\., resolver="):
        active(make({"pixel_values": X, "input_ids": X}))


def test_llavas_list_of_modalities() -> None:
    """It contains "text", which is not in a map of towers, so that a resolver leaves it out."""
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
    """Rows, slices and batches of `map`, with None in a column that a row does not have."""
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


@pytest.mark.long
def test_tables_and_columns() -> None:
    """Those of pandas, pyarrow and datasets, and their rows, with missing paths and names."""
    from datasets import Dataset

    pandas, arrow = import_module("pandas"), import_module("pyarrow")
    frame = pandas.read_csv(io.StringIO("T1,rsfMRI,dMRI\na.nii,,\nb.nii,,b.nii\n"))
    tables = [frame, frame.convert_dtypes(), frame.convert_dtypes(dtype_backend="pyarrow")]
    for table in tables:
        kinds = ("list", "series", "records")
        for batch in (table, *(table.to_dict(kind) for kind in kinds)):
            assert active(batch) == ("T1", "dMRI")
        for batch in (table[:1], *(table[:1].to_dict(kind) for kind in kinds), table.iloc[0]):
            assert active(batch) == ("T1",)
        assert active({name: table[name].to_numpy() for name in NAMES}) == ("T1", "dMRI")
        assert active([row for _, row in table.iterrows()]) == ("T1", "dMRI")
    columns = arrow.Table.from_pandas(frame)
    rows = Dataset.from_pandas(frame)
    for batch in (columns, columns.to_pydict(), {name: columns[name] for name in NAMES}):
        assert active(batch) == ("T1", "dMRI")
    assert active({name: columns[name][0] for name in NAMES}) == ("T1",)
    assert active({name: columns[name].combine_chunks() for name in NAMES}) == ("T1", "dMRI")
    assert active({name: rows[name] for name in NAMES}) == ("T1", "dMRI")
    names = pandas.Series(["x", "T1", None])[1:]
    categories = names.astype("category")
    for column in (names, names.astype("string"), categories, categories.array, arrow.array(names)):
        assert active({"modality": column}) == ("T1",)
    assert active({"T1": pandas.NaT, "rsfMRI": pandas.NA, "dMRI": frame["dMRI"]}) == ("dMRI",)


# --- tensordict ----------------------------------------------------------------------------------


@pytest.mark.long
def test_tensordicts() -> None:
    """Nested ones, of which empty ones are inactive; flags; strings for a batch or each sample."""
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
    stack = lazy_stack([TensorDict({"T1": X}), TensorDict({"T1": X, "dMRI": X})])
    assert active(stack) == active(stack.tensordicts) == ("T1", "dMRI")


@pytest.mark.long
def test_tensorclasses() -> None:
    from tensordict import tensorclass

    @tensorclass
    class Scans:
        image: Tensor
        sound: Tensor | None = None

    scans = Scans(image=X, batch_size=[4])  # type: ignore[call-arg]  # of what the decorator makes
    assert active(scans, names=("image", "sound")) == ("image",)


# --- PyTorch Geometric ---------------------------------------------------------------------------


def graph(sizes: dict[str, int], **attributes: Any) -> Any:
    from torch_geometric.data import HeteroData

    data = HeteroData(**attributes)
    for kind, number in sizes.items():
        data[kind].x = torch.ones(number, 3)
    return data


@pytest.mark.long
# What torch_geometric compiles at import, which torch 2.13 wants compiled in another way.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_graphs_whose_node_types_are_modalities() -> None:
    """`HeteroData` and batches of it, by the page's resolver, by `x_dict` or by an attribute."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.loader import DataLoader as GraphLoader

    resolver = resolver_for("PyTorch Geometric")
    one, two = graph({"T1": 2, "dMRI": 0}), graph({"T1": 0, "dMRI": 1})
    (both,) = GraphLoader([one, two], batch_size=2)
    for batch, expected in [(one, ("T1",)), (two, ("dMRI",)), (both, ("T1", "dMRI"))]:
        kinds = batch.node_types
        with pytest.raises(BatchMetadataError, match="resolver="):
            active(batch)
        assert active(batch, resolver=resolver) == active(batch.x_dict) == expected
        assert batch.node_types == kinds
    graphs = [graph({"T1": 2}, modalities=names) for names in (["T1"], ["T1", "dMRI"])]
    assert active(graphs[0]) == ("T1",)
    assert active(Batch.from_data_list(graphs)) == ("T1", "dMRI")
    assert active(Data(x=X, modality="T1")) == ("T1",)
    scan = graph({"scan": 2})
    scan["scan"]["modality"] = torch.tensor([0, 1])  # an attribute of nodes, not of the graph
    with pytest.raises(BatchMetadataError):
        active(scan)
    assert scan.node_types == ["scan"]


# --- MONAI ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_dictionaries_of_monai() -> None:
    """`MetaTensor`s in samples, batches and crops, and after `decollate_batch`."""
    data, transforms = import_module("monai.data"), import_module("monai.transforms")
    volume = np.ones((1, 4, 4, 4), "float32")
    typed = transforms.EnsureTyped(["T1", "dMRI"], allow_missing_keys=True)
    crops = transforms.RandSpatialCropSamplesd(["T1"], roi_size=2, num_samples=2, random_size=False)
    sample = typed({"T1": volume, "label": 1})
    assert isinstance(sample["T1"], data.MetaTensor)
    (batch,) = data.DataLoader(data.Dataset([{"T1": volume}] * 2, typed), batch_size=2)
    (cropped,) = data.DataLoader(
        data.Dataset([{"T1": volume}] * 2, transforms.Compose([typed, crops])),
        batch_size=2,
        collate_fn=data.list_data_collate,
    )
    collated = data.list_data_collate([sample])
    for each in (sample, crops(sample), collated, batch, cropped, data.decollate_batch(batch)):
        assert active(each) == ("T1",)
    mask = data.MetaTensor(torch.tensor([[True, False, False]]))
    assert active({"modalities": mask, "image": sample["T1"]}) == ("T1",)
    different = data.Dataset([{"T1": volume}, {"dMRI": volume}], typed)
    (batch,) = data.DataLoader(different, batch_size=2, collate_fn=list)
    assert active(batch) == ("T1", "dMRI")


# --- TorchIO -------------------------------------------------------------------------------------


@pytest.mark.long
def test_subjects_of_torchio(tmp_path: Path) -> None:
    """Subjects, whose files are not read, and batches of the loader, also from a queue."""
    tio = import_module("torchio")

    tio.ScalarImage(tensor=torch.ones(1, 4, 4, 4)).save(tmp_path / "scan.nii")
    subject = tio.Subject(T1=tio.ScalarImage(tmp_path / "scan.nii"), age=40)
    assert active(subject) == ("T1",)
    assert not subject["T1"]._loaded
    (batch,) = tio.SubjectsLoader(tio.SubjectsDataset([subject] * 2), batch_size=2)
    assert active(batch) == ("T1",)
    queue = tio.Queue(
        tio.SubjectsDataset([subject] * 2), 4, 2, tio.UniformSampler(2), num_workers=0
    )
    assert active(next(iter(tio.SubjectsLoader(queue, batch_size=2)))) == ("T1",)
    assert active(tio.Subject(scan=subject["T1"], modality="dMRI")) == ("dMRI",)
    different = tio.SubjectsDataset([subject, tio.Subject(dMRI=subject["T1"])])
    (batch,) = tio.SubjectsLoader(different, batch_size=2, collate_fn=list)
    assert active(batch) == ("T1", "dMRI")


# --- webdataset ----------------------------------------------------------------------------------


@pytest.mark.long
# It leaves the closing of files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_samples_of_webdataset(tmp_path: Path) -> None:
    """Names of files in a tar have to be renamed or resolved into names of modalities."""
    wds = import_module("webdataset")

    modalities = [["t1"], ["t1", "dmri"], ["dmri"]]
    known = ("t1", "dmri")
    path = str(tmp_path / "shard.tar")
    with wds.TarWriter(path) as tar:
        for number, names in enumerate(modalities):
            arrays = {f"{name}.npy": np.ones((2, 2), "float32") for name in names}
            tar.write({"__key__": f"s{number}", "modalities.json": names, "cls": number} | arrays)

    def stored() -> Any:
        return wds.WebDataset(path, shardshuffle=False).decode()

    samples = list(stored())
    with pytest.raises(BatchMetadataError, match="Did you mean 'modalities' by"):
        active(samples[0], names=known)
    resolver = resolver_for("webdataset")
    alone = [tuple(names) for names in modalities]
    assert [active(sample, names=known, resolver=resolver) for sample in samples] == alone
    named = stored().rename(modalities="modalities.json")
    small = named.map(lambda sample: {key: sample[key] for key in ("modalities", "cls")})
    tuples = stored().to_tuple("modalities.json", "cls").batched(2)
    assert [active(sample, names=known) for sample in named] == alone
    for batches in (
        named.batched(2, collation_fn=list),
        small.batched(2),
        wds.WebLoader(small.batched(2), batch_size=None),
        (names for names, _ in tuples),
    ):
        assert [active(batch, names=known) for batch in batches] == [("t1", "dmri"), ("dmri",)]
