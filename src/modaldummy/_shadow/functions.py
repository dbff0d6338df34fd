"""Autograd functions of the shadow: all leave values as they are."""

import functools
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modaldummy._core.parameter import ParameterSlot
from modaldummy._core.reduce import accumulation_dtype
from modaldummy._core.term import product_without_underflow
from modaldummy._engines import apply_function, direct_parameters


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
    def forward(ctx: Any, loss: Tensor, dummies: "DummyGradients", claim: "Claim") -> Tensor:
        ctx.dummies = dummies
        ctx.claim = claim
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.claim.begin(gradient.sum(dtype=accumulation_dtype([gradient.dtype])))
        return gradient, None, None


class Claim:
    """The dummy gradients that one loss gives to parameters of shadowed towers.

    Args:
        slots: The parameters.
        scale: Factor on the upstream gradient of the loss.
    """

    def __init__(self, slots: Collection[ParameterSlot], scale: float) -> None:
        self._slots = slots
        self._scale = scale
        self._upstream: Tensor | None = None
        # `scale` times the upstream gradient, by dtype.
        self._dummies: dict[torch.dtype, Tensor] = {}
        # Parameters that have no dummy gradient yet in this backward pass.
        self._due: set[ParameterSlot] = set()

    def begin(self, upstream: Tensor) -> None:
        """A backward pass has reached the loss, with this gradient."""
        self._upstream, self._dummies, self._due = upstream, {}, set(self._slots)

    def added_to(self, gradient: Tensor, slot: ParameterSlot) -> Tensor:
        """The gradient plus the dummy gradient of a parameter, which it gets once."""
        if self._upstream is None or slot not in self._due:
            return gradient
        self._due.discard(slot)
        dtype = gradient.dtype
        if dtype not in self._dummies:
            self._dummies[dtype] = product_without_underflow(self._upstream, self._scale, dtype)
        return gradient + self._dummies[dtype]


class DummyGradients:
    """Adds dummy gradients to the zeros that the parameters of shadowed towers get.

    An engine may show the parameters only while a tower runs, so tensor hooks are registered then.
    They are removed together with the graph of that forward pass.

    Args:
        number: Of the forward pass; later ones have larger numbers.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._hooks: dict[ParameterSlot, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._claims: list[Claim] = []

    def watch(self, module: nn.Module, _args: Any) -> None:
        """A forward pre-hook of a module in a tower, after those of engines.

        Modules below it may have parameters that are used without a call. If they are called, an
        engine may have other tensors in place of these parameters by then.
        """
        for owner in module.modules():
            for name, parameter in direct_parameters(owner).items():
                hooked, handle = self._hooks.get((owner, name), (None, None))
                if parameter is None or not parameter.requires_grad:
                    continue
                if hooked is not None and hooked() is parameter:
                    continue
                if handle is not None:
                    handle.remove()
                hook = functools.partial(_add_dummies, weakref.ref(self), (owner, name))
                reference = weakref.ref[Tensor](parameter)
                self._hooks[owner, name] = reference, parameter.register_hook(hook)

    def claim(self, loss: Tensor, inactive: set[ParameterSlot], scale: float | None) -> Tensor:
        """The loss, which gives dummy gradients to those of the inactive parameters that it has.

        They are removed from `inactive`.
        """
        slots = self._hooks.keys() & inactive
        inactive -= slots
        if not slots or not scale:
            return loss
        self._claims.append(Claim(slots, scale))
        claimed: Tensor = apply_function(NoteUpstream, loss, self, self._claims[-1])
        return claimed

    def added_to(self, gradient: Tensor, slot: ParameterSlot) -> Tensor:
        """The gradient plus all dummy gradients of a parameter."""
        # The dummy gradient of a sparse embedding has no entries.
        for claim in () if gradient.is_sparse else self._claims:
            gradient = claim.added_to(gradient, slot)
        return gradient

    def __del__(self) -> None:
        for _, handle in self._hooks.values():
            handle.remove()


def _add_dummies(
    dummies: "weakref.ref[DummyGradients]", slot: ParameterSlot, gradient: Tensor
) -> Tensor | None:
    alive = dummies()
    return None if alive is None else alive.added_to(gradient, slot)
