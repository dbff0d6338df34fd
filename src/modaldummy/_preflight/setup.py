"""The training setup that the checks look at: the arguments of `preflight`, and what they imply."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter, is_sparse_table
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import ddps_around, is_fsdp2_unit
from modaldummy._ownership import owners_of


class NamedParameter(NamedTuple):
    """A parameter of the model.

    Attributes:
        name: Its full name.
        parameter: The parameter itself.
    """

    name: str
    parameter: nn.Parameter


@dataclass(frozen=True, eq=False)
class Setup:
    """A wrapper, and the model and optimizers that it will be used with.

    Attributes:
        wrapper: The wrapper.
        model: The module that training calls, such as DDP.
        optimizers: All optimizers together; None if none were given.
        loss: The total of one batch, or None.
        loss_factor: The loss scaler multiplies the loss by this number; None without a scaler.
        has_grad_scaler: Whether the loss scaler is an enabled `torch.amp.GradScaler`.
        max_norm: Gradients are clipped to this norm; None without clipping.
        accumulation_steps: The loss is divided by this number.
    """

    wrapper: DummyLossWrapper
    model: nn.Module
    optimizers: tuple[Optimizer, ...] | None
    loss: Tensor | None
    loss_factor: float | None
    has_grad_scaler: bool
    max_norm: float | None
    accumulation_steps: int

    @property
    def scale(self) -> float | None:
        """The scale of the wrapper."""
        return self.wrapper.scale

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules of the called model and of the wrapper's model, each once."""
        both = (self.model, self.wrapper.parameters.model)
        return list(dict.fromkeys(module for model in both for module in model.modules()))

    @cached_property
    def named_parameters(self) -> dict[int, NamedParameter]:
        """All parameters of both models, by `id`.

        A parameter of both has the name that it has in the wrapper's model.
        """
        parameters: dict[int, NamedParameter] = {}
        for model in (self.wrapper.parameters.model, self.model):
            for name, parameter in model.named_parameters():
                parameters.setdefault(id(parameter), NamedParameter(name, parameter))
        return parameters

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of both models, each once."""
        return [named.parameter for named in self.named_parameters.values()]

    @cached_property
    def owned_by_key(self) -> dict[ModalityKey, dict[int, OwnedParameter]]:
        """Parameters of each key of the map by `id`, frozen ones included."""
        parameters = self.wrapper.parameters
        return {key: parameters.of_keys([key]) for key in parameters.paths}

    @cached_property
    def owners(self) -> dict[int, list[ModalityKey]]:
        """Keys of the map that own a parameter, in map order, by the `id` of the parameter."""
        return owners_of(self.wrapper.parameters)

    @cached_property
    def modality_parameters(self) -> dict[int, OwnedParameter]:
        """Trainable parameters that any key of the map owns, by `id`.

        A batch without modalities gives all of them a dummy gradient.
        """
        step = self.wrapper.parameters.split(())
        return {id(owned.parameter): owned for owned in step.inactive_parameters}

    @cached_property
    def trunk_parameters(self) -> dict[int, NamedParameter]:
        """Trainable parameters that no key of the map owns, by `id`."""
        return {
            parameter_id: named
            for parameter_id, named in self.named_parameters.items()
            if named.parameter.requires_grad and parameter_id not in self.owners
        }

    @cached_property
    def sparse_tables(self) -> list[OwnedParameter]:
        """The modality parameters whose gradients are sparse."""
        return [owned for owned in self.modality_parameters.values() if is_sparse_table(owned)]

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes of the modality parameters that get a dummy gradient with elements."""
        dense = [owned for owned in self.modality_parameters.values() if not is_sparse_table(owned)]
        return list(dict.fromkeys(owned.parameter.dtype for owned in dense))

    @cached_property
    def ddps(self) -> list[DistributedDataParallel]:
        """DDP modules that contain a modality parameter."""
        return list(ddps_around(self.modules, self.modality_parameters))

    @cached_property
    def fsdp2_units(self) -> list[nn.Module]:
        """Modules that FSDP2's `fully_shard` was called on."""
        return [module for module in self.modules if is_fsdp2_unit(module)]

    def inactive_ids(self, active: Collection[str]) -> set[int]:
        """`id` of each modality parameter that is inactive in a batch of these modalities."""
        active_keys = self.wrapper.parameters.active_keys(active)
        return self.modality_parameters.keys() - self.wrapper.parameters.of_keys(active_keys)

    def keys_of(self, parameter_ids: Collection[int]) -> list[ModalityKey]:
        """Keys of the map that own at least one of these parameters."""
        ids = set(parameter_ids)
        return [key for key, owned in self.owned_by_key.items() if not ids.isdisjoint(owned)]

    def names_of(self, parameter_ids: Collection[int]) -> list[str]:
        """Names of the modality parameters among these."""
        owned_by_id = self.modality_parameters.items()
        return [owned.name for parameter_id, owned in owned_by_id if parameter_id in parameter_ids]


def has_values(parameter: Tensor) -> bool:
    """Whether a parameter has values: it is not on the meta device and is initialized."""
    return not parameter.is_meta and not is_lazy(parameter)
