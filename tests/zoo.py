"""Tiny models, one for each awkward way in which parameters can belong to modalities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper

Key = str | tuple[str, ...]


@dataclass
class Case:
    """A model, its map and, independently of the library, who owns what.

    Attributes:
        model: The model.
        spec: The `modality_param_map`.
        owners: Full name of a parameter to the keys of the map that own it.
    """

    model: nn.Module
    spec: Mapping[Key, Any]
    owners: dict[str, set[Key]] = field(default_factory=dict)

    def wrapper(self, scale: float | None = 1e-7, **options: Any) -> DummyLossWrapper:
        return DummyLossWrapper(self.model, self.spec, scale, **options)

    def inactive(self, active: set[str]) -> dict[str, nn.Parameter]:
        """Trainable parameters that are owned, but by no active key: the definition, by name."""
        owners: dict[int, set[Key]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), set()).update(self.owners.get(name, set()))
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and owners[id(parameter)]
            and not any(is_active(key, active) for key in owners[id(parameter)])
        }

    def real(self, active: set[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """A loss that reaches exactly the parameters that the active keys or no key own."""
        idle = {id(parameter) for parameter in self.inactive(active).values()}
        reached = [p for p in self.model.parameters() if id(p) not in idle]
        parts = [torch.view_as_real(p) if p.is_complex() else p for p in reached]
        squares = [part.to(dtype).square() for part in parts]
        terms = [square.mean() if square.numel() else square.sum() for square in squares]
        return torch.stack([torch.ones((), dtype=dtype), *terms]).mean()


def is_active(key: Key, active: set[str]) -> bool:
    return key in active if isinstance(key, str) else set(key) <= active


T1 = "vision_tower.T1_patch_embed"


class Brain(nn.Module):
    """Three towers, a fusion of T1 and dMRI, a trunk; `T10_proj` is there to be confused with."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict(
            {
                "T1_patch_embed": nn.Linear(3, 4),
                "rsfMRI_patch_embed": nn.Linear(2, 4),
                "dMRI_patch_embed": nn.Linear(5, 4),
            }
        )
        self.T10_proj = nn.Linear(2, 2)
        self.fusion = nn.Linear(4, 4)
        self.trunk = nn.Linear(4, 1)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        names = [n for n in ("T1", "rsfMRI", "dMRI") if batch.get(n) is not None]
        hidden = [self.vision_tower[f"{name}_patch_embed"](batch[name]) for name in names]
        output: Tensor = self.trunk(torch.stack(hidden).sum(0))
        return output


# Ways to name one parameter of `Brain` in a map.
WAYS: dict[str, Callable[[Brain], Any]] = {
    "path": lambda _: f"{T1}.weight",
    "glob": lambda _: "vision_tower.T1*.weight",
    "parameter": lambda model: model.vision_tower["T1_patch_embed"].weight,
}


def brain() -> Case:
    model = Brain()
    spec: dict[Key, Any] = {
        "T1": "vision_tower.T1_patch_embed",
        "rsfMRI": "vision_tower.rsfMRI_patch_embed",
        "dMRI": "vision_tower.dMRI_patch_embed",
        ("T1", "dMRI"): "fusion",
    }
    owners: dict[str, set[Key]] = {
        f"{path}.{kind}": {key} for key, path in spec.items() for kind in ("weight", "bias")
    }
    return Case(model, spec, owners)


class Pair(nn.Module):
    """Modality `a` is always active, `b` never."""

    def __init__(self, b: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.b: Any = b

    def forward(self) -> Tensor:
        output: Tensor = self.a(torch.ones(1, 2)).square().sum()
        return output

    def wrapper(
        self, scale: float | None = 1e-7, *, gradient_only: bool = False
    ) -> DummyLossWrapper:
        return DummyLossWrapper(self, {"a": "a", "b": "b"}, scale, gradient_only=gradient_only)

    def step(self, wrapper: DummyLossWrapper) -> Tensor:
        total = wrapper.total(self(), "a")
        total.backward()
        return total


def holder(**parameters: Tensor) -> nn.Module:
    """A module of nothing but parameters."""
    module = nn.Module()
    for name, values in parameters.items():
        module.register_parameter(name, nn.Parameter(values))
    return module


def _pair(a: nn.Module, b: nn.Module) -> Case:
    """Modality `a` owns the module `a`, modality `b` the module `b`."""
    model = nn.ModuleDict({"a": a, "b": b, "trunk": nn.Linear(2, 2)})
    owners: dict[str, set[Key]] = {}
    for key in ("a", "b"):
        for name, _ in model[key].named_parameters(key, remove_duplicate=False):
            owners[name] = {key}
    return Case(model, {"a": "a", "b": "b"}, owners)


def _with_dtype(dtype: torch.dtype) -> Callable[[], Case]:
    return lambda: _pair(nn.Linear(3, 2, dtype=dtype), nn.Linear(2, 2, dtype=dtype))


def frozen_in_part() -> Case:
    case = _pair(nn.Linear(3, 2), nn.Linear(2, 2))
    case.model.get_parameter("a.weight").requires_grad_(False)
    return case


def frozen_whole() -> Case:
    case = _pair(nn.Linear(3, 2), nn.Linear(2, 2))
    case.model.get_submodule("a").requires_grad_(False)
    return case


def tied_across() -> Case:
    shared = nn.Linear(3, 3)
    return _pair(nn.Sequential(shared, nn.Linear(3, 1)), nn.Sequential(nn.Linear(1, 3), shared))


def tied_within() -> Case:
    shared = nn.Linear(3, 3)
    return _pair(nn.Sequential(shared, shared), nn.Linear(2, 2))


def mixed_dtypes() -> Case:
    parts = [nn.Linear(2, 2, dtype=dtype) for dtype in (torch.float16, torch.complex64)]
    return _pair(nn.Sequential(*parts), nn.Linear(2, 2, dtype=torch.float64))


def scalars_and_empties() -> Case:
    a = holder(scalar=torch.tensor(2.0), empty=torch.empty(0, 3))
    return _pair(a, holder(scalar=torch.tensor(3.0), one=torch.ones(1)))


def strided() -> Case:
    a = holder(
        transposed=torch.randn(4, 3).t(),
        channels_last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        expanded=torch.randn(1).expand(3),
        every_other=torch.randn(6)[::2],
    )
    return _pair(a, nn.Linear(2, 2))


def sparse_tables() -> Case:
    return _pair(nn.Embedding(5, 3, sparse=True), nn.EmbeddingBag(4, 2, sparse=True))


ZOO: dict[str, Callable[[], Case]] = {
    "brain": brain,
    "float64": _with_dtype(torch.float64),
    "bfloat16": _with_dtype(torch.bfloat16),
    "float16": _with_dtype(torch.float16),
    "complex64": _with_dtype(torch.complex64),
    "complex128": _with_dtype(torch.complex128),
    "mixed-dtypes": mixed_dtypes,
    "frozen-in-part": frozen_in_part,
    "frozen-whole": frozen_whole,
    "tied-across": tied_across,
    "tied-within": tied_within,
    "scalars-and-empties": scalars_and_empties,
    "strided": strided,
}
