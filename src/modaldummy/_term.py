"""The dummy term: its value, its cap and its gradient. The numerics of the library live here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modaldummy._reduce import (
    Groups,
    accumulation_dtype,
    by_layout,
    fill_like,
    sum_all,
    transformed,
)

# Leaves room for every rounding between the limit and the total, so that the bound holds exactly.
_ROUNDING_MARGIN = 1 - 2**-10


@dataclass(frozen=True, eq=False)
class Term:
    """The dummy term of one step: tensors of shape `[]` in the accumulation dtype.

    Attributes:
        connected: The value after the cap, with an autograd edge to every inactive parameter.
        value: The same, detached.
        uncapped: `scale * sum`, detached, before the cap; it may be inf or NaN.
        real: The `magnitude` of the real loss that the value was held against, NaN without one.
        num_elements: How many elements get a dummy gradient.
    """

    connected: Tensor
    value: Tensor
    uncapped: Tensor
    real: Tensor
    num_elements: int


def dummy_term(
    params: Sequence[Tensor],
    scale: float | None,
    *,
    real: Tensor | None = None,
    max_fraction: float | None = None,
    read: bool = True,
) -> Term:
    r"""Compute the dummy term of the parameters of the inactive modalities.

    .. math::
        d = \operatorname{clip}\Bigl(s \sum_p \sum_i p_i,\; \pm f\,(1 - 2^{-10})\,|L|\Bigr),
        \qquad \frac{\partial d}{\partial p_i} \equiv s

    The gradient ignores the clipping (straight-through): the cap bounds what the loss shows, the
    scale alone decides what the parameters receive.

    Args:
        params: At least one parameter, of any shapes, floating or complex dtypes and devices.
        scale: Gradient per element `s` for an upstream gradient of 1. `0.0` hands every parameter
            an exact zero, `None` hands it no gradient at all; neither reads the parameters.
        real: The real loss `L`, of any shape; decides the device and, where it is wider, the
            dtype. Without it there is no cap.
        max_fraction: Bound `f` on `|d| / |L|`; `None` bounds the term only so far that a finite
            loss stays finite.
        read: Whether the value may read the parameters. If not it is a negative zero, the one
            number that changes no bit of whatever it is added to.

    Returns:
        The term. A sum that is not finite contributes zero and stays visible in `uncapped`; a real
        loss that is not finite gets a term of zero.
    """
    groups = {} if scale is None else by_layout(params)
    dtypes = [dtype for _, dtype, _ in groups] + ([] if real is None else [real.dtype])
    dtype = accumulation_dtype(dtypes)
    device = (params[0] if real is None else real).device
    size = sum(map(Tensor.numel, params))
    with torch.no_grad():
        seen = _nothing(dtype, device) / 0 if real is None else magnitude(real, dtype)
        if not (read and scale):
            zero = _nothing(dtype, device)
            return Term(connect(-zero, scale, params, groups), zero, zero, seen, size)
        uncapped = sum_all(params, groups, dtype=dtype, device=device) * scale
        value = torch.nan_to_num(uncapped, 0.0, 0.0, 0.0)  # of NaN, inf and -inf
        if real is not None:
            value = _clip(value, seen, real, max_fraction)
    return Term(connect(value, scale, params, groups), value, uncapped, seen, size)


def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def magnitude(real: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy of a scalar loss, or the mean of `|real|`, in `dtype` and of shape `[]`."""
    wide = real.detach().to(dtype)
    if wide.ndim:
        return wide.abs().mean()
    # A copy: frameworks multiply the loss in place. Inductor takes a clone for the same output as
    # a total that differs from it by its graph alone, and torch then cuts that graph, see
    # https://github.com/pytorch/pytorch/pull/195688; clamping makes a copy that it keeps apart.
    return wide.clamp(-math.inf, math.inf)


def connect(
    value: Tensor, scale: float | None, params: Sequence[Tensor], groups: Groups | None = None
) -> Tensor:
    """Copy of `value` whose backward hands each of `params` the gradient `scale * upstream`.

    `groups` is `by_layout(params)`, where the caller has it.
    """
    groups = by_layout(params) if groups is None else groups
    # In Python, `apply` looks at each argument for what only `torch.func` does to tensors.
    apply = _Connect.apply if transformed() else super(torch.autograd.Function, _Connect).apply
    with torch.enable_grad():
        connected: Tensor = apply(value, scale, groups, *params)  # type: ignore[no-untyped-call]
    return connected


def nonzero_product(value: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    r"""`factor * value` in `dtype`, never rounded to zero unless `value` itself is zero.

    .. math:: \operatorname{copysign}(\max(|f v|, \text{floor}), v) \quad (v \neq 0)

    The choice is made in the accumulation dtype and the cast comes last: inductor elides a
    selection that follows the cast, and the result would underflow after all. NaN and infinite
    values pass through.

    Args:
        value: Real tensor of shape `[]`.
        factor: Number `>= 0`; 0 gives an exact zero.
        dtype: Floating or complex dtype of the result; a complex result has no imaginary part.
    """
    wide = value.to(accumulation_dtype([value.dtype, dtype]))
    product = wide * factor
    if factor > 0:
        kept = torch.copysign(product.abs().clamp(min=_floor(dtype)), wide)
        # The product, not a constant zero: gradients of gradients go through it.
        product = torch.where(wide == 0, product, kept)
    return product.to(dtype)


def is_dummy(node: Any) -> bool:
    """Whether a node of an autograd graph is that of a dummy term."""
    return getattr(node, "_forward_cls", None) is _Connect


def _floor(dtype: torch.dtype) -> float:
    """Smallest magnitude that `dtype` holds and that the accumulation dtype holds as normal.

    float16 reaches down to its smallest subnormal, 2**-24; the wider dtypes stop at their own
    smallest normal number, so that a processor that flushes subnormals does no harm.
    """
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(accumulation_dtype([dtype])).tiny)


def _clip(value: Tensor, seen: Tensor, real: Tensor, max_fraction: float | None) -> Tensor:
    """`value` within its fraction of the loss `seen`, and so small that the total is finite."""
    info = torch.finfo(real.dtype if real.is_floating_point() else seen.dtype)
    size = seen.abs()
    peak = size
    if real.numel() > 1:  # of finite losses the mean can overflow, and then there is no limit
        peak = torch.maximum(real.detach().to(seen.dtype).abs().amax(), size)
    # The total is rounded twice, by the cast of the dummy and by the addition.
    limit = info.max * (1 - 2 * info.eps) - peak
    if max_fraction is not None:
        limit = torch.minimum(limit, size * (max_fraction * _ROUNDING_MARGIN))
    # Below the smallest normal number, rounding is too coarse for the bound to be exact; the limit
    # of an infinite loss is -inf, that of a NaN is NaN, and neither is above anything.
    limit = torch.where(limit >= torch.finfo(limit.dtype).tiny, limit, 0.0)
    return torch.clamp(value, -limit, limit)


class _Connect(torch.autograd.Function):
    """Identity on `value` with one autograd edge to each parameter.

    No value of a parameter is kept for backward, so an optimizer may change them in between. Their
    shapes are those of the forward pass: engines empty parameters after it to save memory.
    """

    generate_vmap_rule = True
    only_connects = True  # for walks of a graph: edges to parameters follow the first

    @staticmethod
    def forward(value: Tensor, scale: float | None, groups: Groups, *params: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.scale, ctx.groups, *params = inputs
        ctx.num_params = len(params)
        # One parameter stands for all of its layout: a wrong guess costs time, nothing else.
        plain = not transformed()
        ctx.samples = {key: params[own[0]] for key, own in ctx.groups.items()} if plain else {}

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scale is None:
            return (None, None, None, *[None] * ctx.num_params)
        values = {
            (dtype, device): nonzero_product(upstream.to(device), ctx.scale, dtype)
            for dtype, device in dict.fromkeys((dtype, device) for _, dtype, device in ctx.groups)
        }
        # `is_grads_batched` of `torch.autograd.grad` batches in a way that shows nowhere else.
        batched = transformed() or "Batched" in str(torch._C._dispatch_keys(upstream))
        samples = {} if batched else ctx.samples
        fresh = {key for key, param in samples.items() if param.is_leaf and param.grad is None}
        gradients = fill_like(ctx.groups, values, fresh)
        return (None, None, None, *map(gradients.__getitem__, range(ctx.num_params)))
