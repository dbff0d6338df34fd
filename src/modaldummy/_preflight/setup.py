"""The training setup that the checks look at: the arguments of `preflight`, and what they imply."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter, slot_of
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._engines import ddps_around, is_zero_engine
from modaldummy._ownership import owners_of


@dataclass(frozen=True, eq=False)
class Setup:
    """A wrapper, and the model and optimizers that it will be used with.

    Attributes:
        wrapper: The wrapper.
        model: The module that training calls, such as DDP.
        optimizers: All optimizers together; None if none were given.
        loss: The total of one batch, or None.
        scaler: What multiplies the loss: a GradScaler, a number, or None.
        max_norm: Gradients are clipped to this norm; None without clipping.
        accumulation_steps: The loss is divided by this number.
    """

    wrapper: DummyLossWrapper
    model: nn.Module
    optimizers: tuple[Optimizer, ...] | None
    loss: Tensor | None
    scaler: GradScaler | float | None
    max_norm: float | None
    accumulation_steps: int

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules of the called model and of the wrapper's model, each once."""
        both = (self.model, self.wrapper.parameters.model)
        return list(dict.fromkeys(module for model in both for module in model.modules()))

    @cached_property
    def names(self) -> dict[nn.Parameter, str]:
        """All parameters of both models, each once, and their full names.

        A parameter of both has the name that it has in the wrapper's model.
        """
        names: dict[nn.Parameter, str] = {}
        for model in (self.wrapper.parameters.model, self.model):
            for name, parameter in model.named_parameters():
                names.setdefault(parameter, name)
        return names

    @cached_property
    def owners(self) -> dict[int, list[ModalityKey]]:
        """Keys of the map that own a parameter, in map order, by the `id` of the parameter."""
        return owners_of(self.wrapper.parameters)

    @cached_property
    def modality_parameters(self) -> dict[int, OwnedParameter]:
        """Trainable parameters that any key of the map owns, by `id`."""
        # A batch without modalities makes all of them inactive.
        step = self.wrapper.parameters.split(())
        return {id(owned.parameter): owned for owned in step.inactive_parameters}

    @cached_property
    def trunk_parameters(self) -> dict[nn.Parameter, str]:
        """Trainable parameters that no key of the map owns, and their full names."""
        trainable = {p: name for p, name in self.names.items() if p.requires_grad}
        return {p: name for p, name in trainable.items() if id(p) not in self.owners}

    @cached_property
    def ddps(self) -> list[DistributedDataParallel]:
        """DDP modules that contain a modality parameter."""
        return ddps_around(self.modules, self.modality_parameters)

    @cached_property
    def zero_engines(self) -> list[Any]:
        """DeepSpeed engines of ZeRO-1, 2 or 3."""
        return list(filter(is_zero_engine, self.modules))

    def inactive_ids(self, active: Collection[str]) -> set[int]:
        """`id` of each modality parameter that is inactive in a batch of these modalities."""
        inactive = self.wrapper.parameters.split(active).inactive_parameters
        return {id(owned.parameter) for owned in inactive}

    def is_shadowed(self, parameter_id: int) -> bool:
        """Whether a shadow gives a modality parameter its dummy gradients."""
        shadow = self.wrapper.interceptor
        return shadow is not None and shadow.covers(slot_of(self.modality_parameters[parameter_id]))

    def keys_of(self, parameter_ids: Collection[int]) -> list[ModalityKey]:
        """Keys of the map that own at least one of these parameters."""
        owning = {key for i in parameter_ids for key in self.owners.get(i, ())}
        return [key for key in self.wrapper.parameters.paths if key in owning]

    def names_of(self, parameter_ids: Collection[int]) -> list[str]:
        """Names of the modality parameters among these."""
        owned_by_id = self.modality_parameters.items()
        return [owned.name for parameter_id, owned in owned_by_id if parameter_id in parameter_ids]
