"""Real scans from the wheels of nibabel and dipy, as one matrix per modality."""

from importlib.resources import as_file, files

import nibabel
import numpy as np
import torch
from torch import Tensor

MODALITIES = ("T1", "rsfMRI", "dMRI")

SOURCES = """\
# Scans used by this demo

No scan is copied into modaldummy: each is read from the package that ships it. Neither package
names a licence for these files alone. nibabel's `COPYING` puts the package, "including all
examples, code snippets and attached documentation", under the MIT licence and lists data under
other terms by file, these two not among them. dipy's `LICENSE` puts "all code" under BSD 3-clause,
unless a folder has a `LICENSE.txt` that says otherwise; this one has none.

| modality | file | content | licence of the package |
|---|---|---|---|
| T1 | `nibabel/tests/data/anatomical.nii` | structural volume, 33 x 41 x 25 voxels of 2 mm, \
normalised to a template with SPM | nibabel, MIT |
| rsfMRI | `nibabel/tests/data/functional.nii` | functional volumes, 17 x 21 x 3 voxels of \
4 x 4 x 8 mm, 20 time points, normalised with SPM | nibabel, MIT |
| dMRI | `dipy/data/files/small_64D.nii` | diffusion volumes, 10 x 10 x 10 voxels of 2 mm, \
one b = 0 and 64 directions at b = 1000 s/mm^2 | dipy, BSD 3-clause |

nibabel's file says neither what task the functional volumes were recorded under nor whether there
was any; they stand in here for a resting-state scan.
"""

_PATCH_VOXELS, _STRIDE_VOXELS = 5, 3
_MIN_RELATIVE_S0 = 0.05  # voxels with a weaker unweighted signal are left out


def load_scans() -> dict[str, Tensor]:
    """Load samples of each modality, standardised to mean 0 and variance 1.

    Returns:
        T1: 3D patches, `[patches, 125]`, standardised together. rsfMRI: time series,
        `[voxels, 20]`, each standardised by itself. dMRI: signals of voxels in 64 directions
        relative to the unweighted signal S0, `[voxels, 64]`, standardised together.
    """
    return {"T1": _patches(), "rsfMRI": _time_series(), "dMRI": _diffusion_signals()}


def _patches() -> Tensor:
    volume = torch.from_numpy(_read("nibabel", "tests/data/anatomical.nii"))
    for axis in range(3):
        volume = volume.unfold(axis, _PATCH_VOXELS, _STRIDE_VOXELS)
    return _standardise(volume.reshape(-1, _PATCH_VOXELS**3))


def _time_series() -> Tensor:
    volumes = _read("nibabel", "tests/data/functional.nii")
    series = torch.from_numpy(volumes).reshape(-1, volumes.shape[-1])
    centred = series - series.mean(dim=1, keepdim=True)
    return centred / centred.std(dim=1, keepdim=True)


def _diffusion_signals() -> Tensor:
    volumes = _read("dipy", "data/files/small_64D.nii")
    unweighted, weighted = volumes[..., 0].reshape(-1), volumes[..., 1:].reshape(-1, 64)
    usable = unweighted > _MIN_RELATIVE_S0 * unweighted.max()
    return _standardise(torch.from_numpy(weighted[usable] / unweighted[usable, None]))


def _read(package: str, path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with as_file(files(package).joinpath(path)) as local:
        return nibabel.Nifti1Image.from_filename(local).get_fdata(dtype=np.float32)


def _standardise(samples: Tensor) -> Tensor:
    return (samples - samples.mean()) / samples.std()
