"""A recorded call of a tower: with what, when, and where its outputs go."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modaldummy._engines import apply_function
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._shadow.functions import Probe
from modaldummy._shadow.trees import leaves_of, replaced


@dataclass(frozen=True)
class Point:
    """A moment of a forward pass: before or after the n-th call of a module.

    Attributes:
        module: The module; its name in the model while ranks exchange records.
        number: How often it was called before in this forward pass.
        after: Whether the call has ended.
    """

    module: Any
    number: int
    after: bool = False

    def renamed(self, new: Mapping[Any, Any]) -> "Point":
        """The same point of the module that `new` has for this one."""
        return dataclasses.replace(self, module=new[self.module])


@dataclass(frozen=True, eq=False)
class TowerCall:
    """A recorded call of a tower.

    Attributes:
        tower: The module; its name in the model while ranks exchange records.
        number: How often the tower was called before in this forward pass.
        arguments: A copy of its positional and its keyword arguments.
        device: Of the parameters of the tower at that time, outside of forward.
        dtype: Likewise.
        checkpoint: `use_reentrant` of the checkpoint around it, None without one.
        has_grad: Whether gradients were enabled.
        is_inference: Whether inference mode was on.
        autocast: The dtype of autocast, None if it was off.
        num_leaves: The largest number of parameters and inputs that one step of its backward pass
            gives a gradient.
        outputs: Places of its output tensors that the loss depends on.
        station: When the tower has run at the latest.
        ties: Points from the station on at which tensors that the loss depends on go into modules
            of the trunk, with their paths among the arguments there. The first that a forward pass
            has is tied, else the output of the model.
    """

    tower: Any
    number: int
    arguments: tuple[Any, Any]
    device: torch.device
    dtype: torch.dtype
    checkpoint: bool | None
    has_grad: bool
    is_inference: bool
    autocast: torch.dtype | None
    num_leaves: int = 0
    outputs: tuple[int, ...] = ()
    station: Point = Point(None, 0)
    ties: dict[Point, list[Any]] = field(default_factory=dict)

    def renamed(self, new: Mapping[Any, Any]) -> "TowerCall":
        """The same call, with what `new` has for each module."""
        return dataclasses.replace(
            self,
            tower=new[self.tower],
            station=self.station.renamed(new),
            ties={point.renamed(new): paths for point, paths in self.ties.items()},
        )

    def outside(self, outer: Mapping[nn.Module, nn.Module]) -> "TowerCall":
        """The same call, of what an engine has put around each module since the record."""
        # A module ends before what is around it does.
        station = self.station if self.station.after else self.station.renamed(outer)
        return dataclasses.replace(self.renamed(outer), station=station)

    def copy_arguments(self, model: nn.Module) -> Any:
        """Positional and keyword arguments for another call.

        Tensors of the device and the dtype that the tower had are of those that it has now.
        """
        device, dtype = placement_of(self.tower)

        arguments = copied(self.arguments, model)
        new = {}
        for _, leaf in leaves_of(arguments):
            if isinstance(leaf, Tensor):
                new_device = device if leaf.device == self.device else leaf.device
                new_dtype = dtype if leaf.dtype == self.dtype else leaf.dtype
                moved = leaf.to(new_device, new_dtype)
                # Real inputs are not leaves of the graph. Autograd visits leaves in an order that
                # depends on their number, and ZeRO-2 needs the same order on all ranks.
                new[id(leaf)] = apply_function(Probe, moved) if moved.requires_grad else moved
        return replaced(arguments, new)


def placement_of(tower: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first parameter of a tower."""
    parameter = next(tower.parameters())
    return parameter.device, parameter.dtype


def is_floating(leaf: Any) -> bool:
    """Whether a leaf of a tree is a tensor that may need a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


class _CopiesGraphless(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that have a graph, without it."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied_tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo.setdefault(id(tensor), copied_tensor)


def copied(arguments: Any, model: nn.Module) -> Any:
    """A copy of arguments, without a graph. A call may change them: a cache grows by each call.

    Raises:
        UnsupportedEngineError: They cannot be copied.
    """
    kept = {id(module): module for module in model.modules()}
    try:
        with _CopiesGraphless():
            return copy.deepcopy(arguments, kept)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedEngineError(
            f"A tower is called with {describe(arguments)}, of which something cannot be copied: "
            f"{error}. Keep that in the tower, or pass tensors and plain values in its place."
        ) from error
