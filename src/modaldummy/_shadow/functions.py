"""Autograd functions of the shadow: all leave values as they are."""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modaldummy._core.parameter import ParameterSlot, slot_of
from modaldummy._core.parameter_map import Step
from modaldummy._core.reduce import accumulation_dtype
from modaldummy._core.term import product_without_underflow


class Probe(torch.autograd.Function):
    """A copy with a node of its own, through which no gradient goes.

    While recording, the node shows whether the loss depends on the tensor.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()  # a view would break modules that work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """Nothing: engines would keep parts of a recorded backward pass for the first real step."""


class Tie(torch.autograd.Function):
    """A copy of a tensor of the trunk whose backward also runs that of shadowed towers.

    It hands exact zeros to the outputs of the towers. Adding `0 * output` to the tensor instead
    would make NaN of an infinite output.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dummies: "DummyGradients", *outputs: Tensor) -> Tensor:
        ctx.dummies = dummies  # they live as long as the graph
        ctx.outputs = [(output.shape, output.dtype, output.device) for output in outputs]
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(s, dtype=d, device=device) for s, d, device in ctx.outputs]
        return (gradient if ctx.needs_input_grad[0] else None, None, *zeros)


class NoteUpstream(torch.autograd.Function):
    """The loss itself; its backward notes the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, dummies: "DummyGradients") -> Tensor:
        ctx.dummies = dummies
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.dummies.begin(gradient.sum(dtype=accumulation_dtype([gradient.dtype])))
        return gradient, None


class DummyGradients:
    """Adds dummy gradients to the zeros that the parameters of shadowed towers get.

    An engine may show the parameters only while a tower runs, so tensor hooks are registered then.
    They are removed together with the graph of that forward pass.

    Args:
        scale: The scale of the wrapper.

    Attributes:
        modules: The modules of shadowed towers.
    """

    def __init__(self, scale: float | None) -> None:
        self.modules: set[nn.Module] = set()
        self._scale = scale
        self._upstream: Tensor | None = None
        # `scale` times the upstream gradient, by dtype.
        self._dummies: dict[torch.dtype, Tensor] = {}
        self._handles: dict[ParameterSlot, RemovableHandle] = {}
        # Parameters that get a dummy gradient, and those that have none yet in this backward pass.
        self._claimed: set[ParameterSlot] = set()
        self._due: set[ParameterSlot] = set()

    def watch(self, module: nn.Module, _args: Any) -> None:
        """A forward pre-hook of a module in a tower, after those of engines."""
        for name, parameter in module.named_parameters(recurse=False):
            slot = module, name
            if parameter.requires_grad and slot not in self._handles:
                hook = functools.partial(_add_dummy, weakref.ref(self), slot)
                self._handles[slot] = parameter.register_hook(hook)

    def claim(self, step: Step) -> Step:
        """The step without the parameters of shadowed towers.

        A parameter that a tower never uses gets no gradient: where the tower runs it has none.
        """
        inactive = set(map(slot_of, step.inactive_entries))
        self._claimed = self._handles.keys() & inactive
        return step.without([slot for slot in inactive if slot[0] in self.modules])

    def begin(self, upstream: Tensor) -> None:
        """A backward pass has reached the loss, with this gradient."""
        self._upstream, self._dummies, self._due = upstream, {}, set(self._claimed)

    def add_to(self, gradient: Tensor, slot: ParameterSlot) -> Tensor | None:
        """The gradient plus the dummy gradient of a parameter, which it gets once."""
        if self._upstream is None or not self._scale or slot not in self._due:
            return None
        self._due.discard(slot)
        dtype = gradient.dtype
        if dtype not in self._dummies:
            self._dummies[dtype] = product_without_underflow(self._upstream, self._scale, dtype)
        return gradient + self._dummies[dtype]

    def __del__(self) -> None:
        for handle in self._handles.values():
            handle.remove()


def _add_dummy(
    dummies: "weakref.ref[DummyGradients]", slot: ParameterSlot, gradient: Tensor
) -> Tensor | None:
    alive = dummies()
    return None if alive is None else alive.add_to(gradient, slot)
