"""Hypothesis strategies that draw maps, sets of active modalities, batches and scales."""

import glob
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from modaldummy._core.batch import EXPLICIT_KEYS
from modaldummy._core.parameter_map import ModalityKey, ParamSpec
from modaldummy._errors import describe, packages_needed, unknown_modality

with packages_needed("hypothesis"):
    from hypothesis import strategies as st

_MODALITIES = ("T1", "T10", "rsfMRI", "dMRI", "text", "audio")


def active_sets(modalities: Sequence[str]) -> st.SearchStrategy[set[str]]:
    """Draw any subset of ``modalities``, including the empty and the full one.

    >>> from hypothesis import given
    >>> @given(active_sets(["T1", "dMRI"]))
    ... def test(active):
    ...     assert active <= {"T1", "dMRI"}
    >>> test()

    Args:
        modalities: Names to choose from, usually ``wrapper.modalities``.

    Returns:
        A strategy that draws sets and shrinks towards the empty set.

    Raises:
        ValueError: ``modalities`` is empty or a string.
    """
    return st.sets(st.sampled_from(_check_names(modalities)))


def scales() -> st.SearchStrategy[float]:
    """Draw positive scales from 1e-36 to 1e3, often the default of 1e-7.

    >>> from hypothesis import given
    >>> @given(scales())
    ... def test(scale):
    ...     assert scale > 0
    >>> test()

    Returns:
        A strategy that draws floats and shrinks towards the default.
    """
    return st.just(1e-7) | st.floats(-36, 3).map(lambda exponent: float(10**exponent))


def batches(
    modalities: Sequence[str], active: Collection[str] | None = None
) -> st.SearchStrategy[Any]:
    """Draw batch metadata that says which modalities are active, in one of several forms.

    The forms are names, names for each sample, an explicit key, an entry for each modality, and a
    bool mask. Entries are small tensors of zeros, not data that a model could run on.

    >>> from hypothesis import given
    >>> from modaldummy import active_modalities
    >>> @given(batches(["T1", "dMRI"], ["T1"]))
    ... def test(batch):
    ...     assert active_modalities(batch, ["T1", "dMRI"]) == ("T1",)
    >>> test()

    Args:
        modalities: All names in map order, usually ``wrapper.modalities``.
        active: The modalities that the batch contains. ``active_sets`` draws them if None.

    Returns:
        A strategy that draws batches for ``wrapper.total``.

    Raises:
        UnknownModalityError: ``active`` contains a name that is not in ``modalities``.
        ValueError: ``modalities`` is empty or a string.
    """
    names = _check_names(modalities)
    if active is None:
        return active_sets(names).flatmap(lambda drawn: batches(names, drawn))
    for name in active:
        if name not in names:
            raise unknown_modality(name, names, "`active`")
    active_names = [name for name in names if name in active]
    mask = torch.tensor([name in active for name in names])
    forms: list[Any] = [
        active_names,
        [[name] for name in active_names],
        {"modalities": active_names},
        {"modality": [[name] for name in active_names]},
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
    """Draw valid values of ``modality_param_map`` for a model; what modalities own is random.

    Modalities own modules or single parameters, given as paths, globs, objects or lists of these.
    Several modalities may own the same parameter, and a tuple key may own something jointly.

    >>> from hypothesis import given
    >>> from modaldummy import DummyLossWrapper
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> @given(param_maps(model))
    ... def test(modality_param_map):
    ...     assert DummyLossWrapper(model, modality_param_map).modalities
    >>> test()

    Args:
        model: The model whose parameters the modalities own, bare or wrapped.
        max_modalities: Largest number of modalities in a map, up to 6.

    Returns:
        A strategy that draws maps for ``DummyLossWrapper``.

    Raises:
        ValueError: The model has no parameters.
    """
    modules = [path for path, part in model.named_modules() if path and list(part.parameters())]
    paths = [*modules, *dict(model.named_parameters())]
    if not paths:
        raise ValueError(f"`model` must have parameters to map, got {describe(model)}.")
    names = st.lists(st.sampled_from(_MODALITIES), min_size=1, max_size=max_modalities, unique=True)
    chosen = st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)

    @st.composite
    def maps(draw: st.DrawFn) -> dict[ModalityKey, ParamSpec]:
        keys: list[ModalityKey] = [*draw(names)]
        if len(keys) > 1 and draw(st.booleans()):
            keys.append((str(keys[0]), str(keys[1])))
        return {key: draw(_specs(model, draw(chosen))) for key in keys}

    return maps()


def _specs(model: nn.Module, paths: Sequence[str]) -> st.SearchStrategy[ParamSpec]:
    """Draw one of several specs that all select what is at `paths`."""
    modules = dict(model.named_modules())
    objects = [modules[p] if p in modules else model.get_parameter(p) for p in paths]
    globs = [glob.escape(path) + (".*" if path in modules else "") for path in paths]
    specs: list[ParamSpec] = [list(paths), objects, [[objects[0]], list(paths[1:])], globs]
    single: list[ParamSpec] = [paths[0], objects[0], globs[0]] if len(paths) == 1 else []
    return st.sampled_from(specs + single)


def _check_names(modalities: Sequence[str]) -> list[str]:
    if isinstance(modalities, str) or not modalities:
        raise ValueError(
            "`modalities` must be a non-empty sequence of names such as `wrapper.modalities`, "
            f"got {describe(modalities)}."
        )
    return list(modalities)
