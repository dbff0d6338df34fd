"""Random maps, active sets, batches and scales."""

import glob
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from modaldummy._core.batch import EXPLICIT_KEYS
from modaldummy._core.parameter_map import ModalityKey, ParamSpec
from modaldummy._errors import describe, unknown_modality

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "`modaldummy.testing` needs Hypothesis; install the extra: pip install modaldummy[testing]"
    ) from error

_NAMES = ("T1", "T10", "rsfMRI", "dMRI", "text", "audio")


def active_sets(modalities: Sequence[str]) -> st.SearchStrategy[set[str]]:
    """Any subset of ``modalities``, the empty and the full one included.

    >>> from hypothesis import given
    >>> @given(active_sets(["T1", "dMRI"]))
    ... def test(active):
    ...     assert active <= {"T1", "dMRI"}
    >>> test()

    Args:
        modalities: Names to choose from, usually ``wrapper.modalities``.

    Returns:
        A strategy of sets that shrink towards the empty one.

    Raises:
        ValueError: ``modalities`` is empty or a string.
    """
    return st.sets(st.sampled_from(_names(modalities)))


def scales() -> st.SearchStrategy[float]:
    """Positive scales from 1e-36 to 1e3, the default 1e-7 often.

    >>> from hypothesis import given
    >>> @given(scales())
    ... def test(scale):
    ...     assert scale > 0
    >>> test()

    Returns:
        A strategy of floats that shrink towards the default.
    """
    return st.just(1e-7) | st.floats(-36, 3).map(lambda exponent: float(10**exponent))


def batches(
    modalities: Sequence[str], active: Collection[str] | None = None
) -> st.SearchStrategy[Any]:
    """Batch metadata that says, in any of several forms, which modalities are active.

    The forms are names, names per sample, an explicit key, one entry per modality, and a bool
    mask; what they hold besides are small tensors of zeros, not data that a model could run on.

    >>> from hypothesis import given
    >>> from modaldummy import active_modalities
    >>> @given(batches(["T1", "dMRI"], ["T1"]))
    ... def test(batch):
    ...     assert active_modalities(batch, ["T1", "dMRI"]) == ("T1",)
    >>> test()

    Args:
        modalities: All names, in map order, usually ``wrapper.modalities``.
        active: Those that the batch is to hold; drawn by ``active_sets`` if None.

    Returns:
        A strategy of what ``wrapper.total`` takes for a batch.

    Raises:
        UnknownModalityError: ``active`` has a name that is not in ``modalities``.
        ValueError: ``modalities`` is empty or a string.
    """
    names = _names(modalities)
    if active is None:
        return active_sets(names).flatmap(lambda drawn: batches(names, drawn))
    for name in active:
        if name not in names:
            raise unknown_modality(name, names, "`active`")
    present = [name for name in names if name in active]
    mask = torch.tensor([name in active for name in names])
    forms: list[Any] = [
        present,
        [[name] for name in present],
        {"modalities": present},
        {"modality": [[name] for name in present]},
        {"active_modalities": mask.numpy()},
        mask,
    ]
    if not {*EXPLICIT_KEYS, "inputs", "labels"} & set(names):
        entry = {name: torch.zeros(2, 3) if name in active else None for name in names}
        forms += [entry, {"inputs": entry, "labels": torch.zeros(2)}]
    return st.sampled_from(forms)


def param_maps(
    model: nn.Module, *, max_modalities: int = 4
) -> st.SearchStrategy[dict[ModalityKey, ParamSpec]]:
    """Valid maps of a model to its parameters: which modality owns what is left to chance.

    Modalities own modules or single parameters, given as paths, globs, objects or lists of these;
    they may overlap, and two of them may own something jointly, under a tuple key.

    >>> from hypothesis import given
    >>> from modaldummy import DummyLossWrapper
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> @given(param_maps(model))
    ... def test(modality_param_map):
    ...     assert DummyLossWrapper(model, modality_param_map).modalities
    >>> test()

    Args:
        model: The model to share out, bare or wrapped.
        max_modalities: At most how many names a map has, up to 6.

    Returns:
        A strategy of maps that ``DummyLossWrapper`` takes.

    Raises:
        ValueError: The model has no parameters.
    """
    modules = [name for name, module in model.named_modules() if name and any(_names_in(module))]
    paths = [*modules, *_names_in(model)]
    if not paths:
        raise ValueError(f"`model` must have parameters to share out, got {describe(model)}.")
    return _param_maps(model, paths, max_modalities)


@st.composite
def _param_maps(
    draw: st.DrawFn, model: nn.Module, paths: Sequence[str], max_modalities: int
) -> dict[ModalityKey, ParamSpec]:
    names = st.lists(st.sampled_from(_NAMES), min_size=1, max_size=max_modalities, unique=True)
    keys: list[ModalityKey] = [*draw(names)]
    if len(keys) > 1 and draw(st.booleans()):
        keys.append((str(keys[0]), str(keys[1])))
    chosen = st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)
    return {key: draw(_specs(model, draw(chosen))) for key in keys}


def _specs(model: nn.Module, paths: Sequence[str]) -> st.SearchStrategy[ParamSpec]:
    """Several ways to select what is at `paths`."""
    modules = dict(model.named_modules())
    objects = [modules[p] if p in modules else model.get_parameter(p) for p in paths]
    globs = [glob.escape(path) + (".*" if path in modules else "") for path in paths]
    specs: list[ParamSpec] = [list(paths), objects, [[objects[0]], list(paths[1:])], globs]
    single: list[ParamSpec] = [paths[0], objects[0], globs[0]] if len(paths) == 1 else []
    return st.sampled_from(specs + single)


def _names_in(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _names(modalities: Sequence[str]) -> list[str]:
    if isinstance(modalities, str) or not modalities:
        raise ValueError(
            "`modalities` must be a non-empty sequence of names such as `wrapper.modalities`, "
            f"got {describe(modalities)}."
        )
    return list(modalities)
