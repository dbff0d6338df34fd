"""Crops of real scans, each with what can be measured in it, said in words."""

from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from torch import Tensor

MODALITIES = ("T1", "rsfMRI", "dMRI")
LEVELS = ("low", "middle", "high")
# Slabs that are held out, from and up to voxels of axis 1; training has what lies on both sides.
HELD_OUT = {"T1": (16, 25), "rsfMRI": (8, 13), "dMRI": (6, 10)}
SIZES = {"T1": (8, 8, 8), "rsfMRI": (4, 4, 3, 10), "dMRI": (4, 4, 4, 64)}
_STRIDES = {"T1": (3, 3, 3), "rsfMRI": (1, 1, 1, 5), "dMRI": (1, 1, 1, 64)}
_PARTS = {"early": slice(0, 4), "middle": slice(3, 7), "late": slice(6, 10)}  # of 10 time points
_MIN_S0 = 0.05  # of the largest; air has nearly none to be divided by


class Sample(NamedTuple):
    """A crop and what is to be said of it.

    Attributes:
        modality: What it is a crop of.
        pixel_values: `[1, 8, 8, 8]` for T1, `[4, 4, 3, 10]` (x, y, z, time) for rsfMRI and
            `[4, 4, 4, 64]` (x, y, z, direction) for dMRI.
        answer: Two facts, such as `"intensity high , brighter left"`.
    """

    modality: str
    pixel_values: Tensor
    answer: str


def load_samples(modality: str) -> tuple[list[Sample], list[Sample]]:
    """Samples for training, and held-out ones, with which they share no voxel.

    The facts are computed from what the model sees:

    - T1: `intensity`, the mean; `brighter`, the half with the larger mean, left or right in the
      coordinates of the file.
    - rsfMRI, each voxel less its mean over time: `drift`, the mean of the second half of the time
      less that of the first; `peak`, whether the mean of the first, middle or last four of the ten
      time points is the largest.
    - dMRI, relative to the unweighted signal: `signal`, the mean; `diffusion`, the axis of the
      gradient directions along which the signal is lowest, each direction counted by its squared
      part along the axis.

    Levels are thirds of the training crops.
    """
    crops = split_crops(_VOLUMES[modality](), modality)
    if modality == "rsfMRI":
        crops = [part - part.mean(dim=-1, keepdim=True) for part in crops]
    mean, std = crops[0].mean(), crops[0].std()
    crops = [(part - mean) / std for part in crops]
    measures = [_FACTS[modality](part) for part in crops]
    thirds = measures[0][0].quantile(torch.tensor([1 / 3, 2 / 3]))
    level_of, other = NAMES[modality]
    channel = modality == "T1"
    train, held_out = (
        [
            Sample(
                modality,
                crop.unsqueeze(0) if channel else crop,
                f"{level_of} {LEVELS[place]} , {other} {word}",
            )
            for crop, place, word in zip(
                part, torch.bucketize(level, thirds, right=True).tolist(), words, strict=True
            )
        ]
        for part, (level, words) in zip(crops, measures, strict=True)
    )
    return train, held_out


def split_crops(volume: Tensor, modality: str) -> list[Tensor]:
    """Crops for training, and those of the slab that is held out, `[crops, *size]` each."""
    start, stop = HELD_OUT[modality]
    parts = [
        _crops(part, SIZES[modality], _STRIDES[modality])
        for part in (volume[:, :start], volume[:, stop:], volume[:, start:stop])
    ]
    return [torch.cat(parts[:2]), parts[2]]


def _crops(volume: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    if volume.shape[1] < sizes[1]:  # a slab at the border has but one side
        return volume.new_empty(0, *sizes)
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        volume = volume.unfold(axis, size, stride)
    return volume.flatten(0, len(sizes) - 1)


def _t1_facts(crops: Tensor) -> tuple[Tensor, list[str]]:
    first, second = (half.mean(dim=(1, 2, 3)) for half in crops.chunk(2, dim=1))
    # Along the first axis of the file voxels go from right to left.
    return crops.mean(dim=(1, 2, 3)), _choose(second > first, "left", "right")


def _rsfmri_facts(crops: Tensor) -> tuple[Tensor, list[str]]:
    signal = crops.mean(dim=(1, 2, 3))
    parts = torch.stack([signal[:, when].mean(dim=1) for when in _PARTS.values()], dim=1)
    words = [list(_PARTS)[part] for part in parts.argmax(dim=1).tolist()]
    return signal[:, 5:].mean(dim=1) - signal[:, :5].mean(dim=1), words


def _dmri_facts(crops: Tensor) -> tuple[Tensor, list[str]]:
    signal = crops.mean(dim=(1, 2, 3))
    parts = _directions().square()
    along = signal @ parts / parts.sum(dim=0)
    return signal.mean(dim=1), ["xyz"[axis] for axis in along.argmin(dim=1).tolist()]


def _choose(condition: Tensor, yes: str, no: str) -> list[str]:
    return [yes if one else no for one in condition.tolist()]


def _t1() -> Tensor:
    return _read("nibabel", "tests/data/anatomical.nii")


def _rsfmri() -> Tensor:
    return _read("nibabel", "tests/data/functional.nii")


def _dmri() -> Tensor:
    volumes = _read("dipy", "data/files/small_64D.nii")
    unweighted = volumes[..., :1]
    return volumes[..., 1:] / unweighted.clamp(min=_MIN_S0 * unweighted.max().item())


def _directions() -> Tensor:
    """Those of the weighted volumes, `[64, 3]`."""
    with as_file(files("dipy").joinpath("data/files/small_64D.bvec")) as path:
        return torch.from_numpy(np.loadtxt(path, dtype=np.float32)[1:])


def _read(package: str, path: str) -> Tensor:
    with as_file(files(package).joinpath(path)) as local:
        data: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
        data = nibabel.Nifti1Image.from_filename(local).get_fdata(dtype=np.float32)
    return torch.from_numpy(data)


_VOLUMES: dict[str, Callable[[], Tensor]] = {"T1": _t1, "rsfMRI": _rsfmri, "dMRI": _dmri}
_FACTS: dict[str, Callable[[Tensor], tuple[Tensor, list[str]]]] = {
    "T1": _t1_facts,
    "rsfMRI": _rsfmri_facts,
    "dMRI": _dmri_facts,
}
# What the level is of, and the other fact.
NAMES = {
    "T1": ("intensity", "brighter"),
    "rsfMRI": ("drift", "peak"),
    "dMRI": ("signal", "diffusion"),
}
