"""Random models, maps, active sets, losses and scales."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from modaldummy import testing
from tests.zoo import Case, Key

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.complex64, torch.complex128)
_NAMES = ("T1", "T10", "rsfMRI", "dMRI", "text")


@st.composite
def parameters(draw: st.DrawFn) -> nn.Parameter:
    """A parameter of 0 to 3 dimensions, any of the dtypes, sometimes frozen."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    seed = draw(st.integers(0, 2**16))
    size = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    trainable = draw(st.integers(0, 4)) > 0
    return nn.Parameter(values.to(draw(st.sampled_from(DTYPES))), requires_grad=trainable)


@st.composite
def towers(draw: st.DrawFn) -> nn.Module:
    """A chain of up to three modules with up to three parameters each."""
    tower = nn.Module()
    module = tower
    for _ in range(draw(st.integers(1, 3))):
        for index in range(draw(st.integers(1, 3))):
            module.register_parameter(f"p{index}", draw(parameters()))
        module.add_module("inner", nn.Module())
        module = module.get_submodule("inner")
    return tower


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A model whose modalities own a tower each; some share towers, tie weights, own jointly."""
    names = draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=4, unique=True))
    model = nn.ModuleDict({f"{name}_tower": draw(towers()) for name in names})
    model["trunk"] = draw(towers())
    owned: dict[Key, list[str]] = {name: [f"{name}_tower"] for name in names}
    if len(names) > 1:
        if draw(st.booleans()):  # a parameter tied between the first two towers
            model[f"{names[0]}_tower"].tied = model[f"{names[1]}_tower"].p0
        if draw(st.booleans()):  # a tower that two modalities own, each on its own
            owned[names[0]].append(f"{names[1]}_tower")
        if draw(st.booleans()):  # a fusion module that two modalities own together
            model["fusion"] = draw(towers())
            owned[names[0], names[1]] = ["fusion"]
    owners: dict[str, set[Key]] = {}
    for key, paths in owned.items():
        for path in paths:
            for name, _ in model[path].named_parameters(path, remove_duplicate=False):
                owners.setdefault(name, set()).add(key)
    spec = {key: draw(_specs(model, paths)) for key, paths in owned.items()}
    return Case(model, spec, owners)


def active_sets(case: Case) -> st.SearchStrategy[set[str]]:
    """Any subset of the modalities of a case."""
    return testing.active_sets(sorted(modalities(case)))


def modalities(case: Case) -> set[str]:
    """All modality names in the map of a case."""
    return {name for key in case.spec for name in ([key] if isinstance(key, str) else key)}


def _specs(model: nn.Module, paths: list[str]) -> st.SearchStrategy[Any]:
    """The same towers as paths, globs, modules or lists of parameters."""
    modules = [model.get_submodule(path) for path in paths]
    return st.sampled_from(
        [
            paths,
            [f"{path}.*" for path in paths],
            modules,
            [[p for m in modules for p in m.parameters()]],
        ]
    )
