"""What the checks before training look at: what they were given, and what follows from it."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import ddps_around, is_fsdp2_unit


@dataclass(frozen=True, eq=False)
class Setup:
    """A wrapper, and what it is about to be trained with.

    Attributes:
        wrapper: The wrapper.
        model: The model as it is called, with whatever is around it.
        optimizers: All optimizers together; None if none were given.
        loss: The total of one batch, or None.
        factor: What the loss is multiplied by before backward, 1 without a scaler.
        grad_scaler: Whether that is done by an enabled `torch.amp.GradScaler`.
        max_norm: What gradients are clipped to, or None.
        accumulation_steps: What the loss is divided by.
    """

    wrapper: DummyLossWrapper
    model: nn.Module
    optimizers: tuple[Optimizer, ...] | None
    loss: Tensor | None
    factor: float | None
    grad_scaler: bool
    max_norm: float | None
    accumulation_steps: int

    @property
    def scale(self) -> float | None:
        """The scale of the wrapper."""
        return self.wrapper.scale

    @property
    def reads(self) -> bool:
        """Whether the dummy term reads parameters."""
        return self.wrapper.reads_parameters

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Each module of the model and of the wrapper's model once."""
        both = (self.model, self.wrapper.parameters.model)
        return list(dict.fromkeys(module for model in both for module in model.modules()))

    @cached_property
    def named(self) -> dict[int, tuple[str, nn.Parameter]]:
        """All parameters with their full names, by `id`; the names of the wrapper's model first."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for model in (self.wrapper.parameters.model, self.model):
            for name, parameter in model.named_parameters():
                found.setdefault(id(parameter), (name, parameter))
        return found

    @cached_property
    def owned(self) -> dict[ModalityKey, dict[int, OwnedParameter]]:
        """Parameters of each key of the map, frozen ones included."""
        return {
            key: self.wrapper.parameters.of_keys([key]) for key in self.wrapper.parameters.paths
        }

    @cached_property
    def owners(self) -> dict[int, tuple[ModalityKey, ...]]:
        """Keys of the map that own a parameter, by its `id`; in map order."""
        found: dict[int, tuple[ModalityKey, ...]] = {}
        for key, own in self.owned.items():
            for identity in own:
                found[identity] = (*found.get(identity, ()), key)
        return found

    @cached_property
    def towers(self) -> dict[int, OwnedParameter]:
        """Trainable parameters of any key of the map, by `id`: in a batch without a modality all
        of them get a dummy.
        """
        return {id(found[1]): found for found in self.wrapper.parameters.split(()).parameters}

    @cached_property
    def trunk(self) -> dict[int, tuple[str, nn.Parameter]]:
        """Trainable parameters that no key of the map owns, by `id`."""
        return {
            identity: (name, parameter)
            for identity, (name, parameter) in self.named.items()
            if parameter.requires_grad and identity not in self.owners
        }

    @cached_property
    def tables(self) -> list[OwnedParameter]:
        """Those of `towers` whose gradients are sparse."""
        return [located for located in self.towers.values() if located.is_sparse_table]

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes in which dummy gradients are handed out."""
        dense = (located for located in self.towers.values() if not located.is_sparse_table)
        return list(dict.fromkeys(parameter.dtype for _, parameter, _ in dense))

    @cached_property
    def ddps(self) -> list[DistributedDataParallel]:
        """DDP modules around parameters of the map."""
        return list(ddps_around(self.modules, self.towers))

    @cached_property
    def sharding(self) -> list[nn.Module]:
        """Modules that FSDP2's `fully_shard` was called on."""
        return [module for module in self.modules if is_fsdp2_unit(module)]

    def inactive(self, active: Collection[str]) -> set[int]:
        """`id` of each of `towers` that is inactive in a batch of these modalities."""
        present = set(self.wrapper.parameters.active_keys(active))
        return {identity for identity in self.towers if present.isdisjoint(self.owners[identity])}


def has_values(parameter: Tensor) -> bool:
    """Whether there is anything to read: not on meta, nor of a lazy module without a shape."""
    return not parameter.is_meta and not is_lazy(parameter)
