"""Batches of libraries for images and files: MONAI, TorchIO, webdataset, with their own classes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modaldummy import BatchMetadataError
from tests.integrations.batches import active, resolver_for

LIBRARIES: tuple[str, ...] = ()  # of each test: what it imports

pytestmark = [pytest.mark.long]

# --- MONAI ---------------------------------------------------------------------------------------


def test_dictionaries_of_monai() -> None:
    """`MetaTensor`s of transforms, samples, batches, crops, and what is taken apart again."""
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
    assert cropped["T1"].shape == (4, 1, 2, 2, 2)
    for held in (sample, crops(sample), data.list_data_collate([sample]), batch, cropped):
        assert active(held) == ("T1",)
    assert active(data.decollate_batch(batch)) == ("T1",)
    mask = data.MetaTensor(torch.tensor([[True, False, False]]))
    assert active({"modalities": mask, "image": sample["T1"]}) == ("T1",)
    different = data.Dataset([{"T1": volume}, {"dMRI": volume}], typed)
    with pytest.raises(KeyError):
        next(iter(data.DataLoader(different, batch_size=2)))
    (batch,) = data.DataLoader(different, batch_size=2, collate_fn=list)
    assert active(batch) == ("T1", "dMRI")


# --- TorchIO -------------------------------------------------------------------------------------


def test_subjects_of_torchio(tmp_path: Path) -> None:
    """Subjects, whose files stay unread, and batches of the loader, also from a queue."""
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
    with pytest.raises(KeyError):
        next(iter(tio.SubjectsLoader(different, batch_size=2)))
    (batch,) = tio.SubjectsLoader(different, batch_size=2, collate_fn=list)
    assert active(batch) == ("T1", "dMRI")


# --- webdataset ----------------------------------------------------------------------------------


# It leaves the closing of files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_samples_of_webdataset(tmp_path: Path) -> None:
    """From a tar: names of files are no names of modalities until they are renamed or resolved."""
    wds = import_module("webdataset")

    held = [["t1"], ["t1", "dmri"], ["dmri"]]
    known = ("t1", "dmri")
    path = str(tmp_path / "shard.tar")
    with wds.TarWriter(path) as tar:
        for number, names in enumerate(held):
            arrays = {f"{name}.npy": np.ones((2, 2), "float32") for name in names}
            tar.write({"__key__": f"s{number}", "modalities.json": names, "cls": number} | arrays)

    def stored() -> Any:
        return wds.WebDataset(path, shardshuffle=False).decode()

    samples = list(stored())
    with pytest.raises(BatchMetadataError, match="Did you mean 'modalities' by"):
        active(samples[0], names=known)
    resolver = resolver_for("webdataset")
    alone = [tuple(names) for names in held]
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
