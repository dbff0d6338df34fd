"""The dummy term: its value, its cap and its gradient. All numerics of the loss are here."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._core.parameter import ParameterEntry, is_sparse_table
from modaldummy._core.reduce import Groups, accumulation_dtype, by_spec, fill_gradients, sum_all
from modaldummy._engines import (
    ZERO3_REMEDY,
    apply_function,
    has_zero3_elements,
    is_batched,
    is_fsdp1_parameter,
    is_transformed,
    local_shard,
)
from modaldummy._errors import ParameterMapError, UnsupportedEngineError

# Leaves room for every rounding between the limit and the total, so that the bound is exact.
_ROUNDING_MARGIN = 1 - 2**-10


@dataclass(frozen=True, eq=False)
class Term:
    """The dummy term of one step: tensors of shape `[]` in the accumulation dtype.

    Attributes:
        connected: The value after the cap, with an autograd edge to every inactive parameter.
        value: The same number, detached; only the sign of a zero may differ.
        uncapped: `scale * sum`, detached, before the cap; it may be inf or NaN.
        loss: The real loss as one number, see `scalar_loss`; NaN without a loss.
        num_params: Number of parameters that the term reaches.
        num_elements: Number of elements that the term reaches.
    """

    connected: Tensor
    value: Tensor
    uncapped: Tensor
    loss: Tensor
    num_params: int
    num_elements: int

    def added_to(self, loss: Tensor) -> Tensor:
        """`loss` plus the term at each element, in the shape and dtype of `loss`.

        An integer loss is promoted, since it could not carry the gradient. `loss` itself is
        returned where no parameter is inactive.
        """
        if not self.num_params:
            return loss
        dtype = loss.dtype if loss.is_floating_point() else self.connected.dtype
        connected = self.connected
        if loss.ndim:
            # Expanded before the cast: backward then sums the upstream gradients of all elements
            # in the accumulation dtype, in which more than 65,504 of them do not overflow.
            connected = connected.expand(loss.shape)
        return loss + connected.to(dtype)


def dummy_term(
    tensors: Sequence[Tensor],
    scale: float | None,
    *,
    loss: Tensor | None = None,
    max_fraction: float | None = None,
    read_values: bool = True,
    device: torch.device | None = None,
) -> Term:
    r"""Compute the dummy term of the parameters of inactive modalities.

    .. math::
        d = \operatorname{clip}\Bigl(s \sum_p \sum_i p_i,\; \pm f\,(1 - 2^{-10})\,|L|\Bigr),
        \qquad \frac{\partial d}{\partial p_i} \equiv s

    The gradient ignores the cap (straight-through): the cap bounds what the loss shows, and the
    scale alone decides what the parameters get. A second cap, not in the formula, keeps a finite
    loss finite.

    Args:
        tensors: The parameters, see `term_inputs`; of any shapes, floating or complex dtypes
            and devices. Without any, the term is zero.
        scale: Gradient `s` per element for an upstream gradient of 1. `0.0` gives every parameter
            an exact zero, `None` gives it no gradient; neither reads the parameters.
        loss: The real loss `L`, of any shape. Where its dtype is the widest, it decides that of the
            term. Without a loss there is no cap.
        max_fraction: Bound `f` on `|d| / |L|`; with `None` only the second cap is in force.
        read_values: Whether the value may read the parameters. If not, it is a negative zero: the
            one number that changes no bit of what it is added to.
        device: Device of the term; by default that of the loss, else of the first tensor.

    Returns:
        The term. A sum that is not finite contributes zero and stays visible in `uncapped`. A real
        loss that is not finite gets a term of zero.
    """
    groups = {} if scale is None else by_spec(tensors)
    dtypes = [dtype for _, dtype, _ in groups] + ([] if loss is None else [loss.dtype])
    dtype = accumulation_dtype(dtypes)
    if device is None:
        device = (tensors[0] if loss is None else loss).device
    with torch.no_grad():
        number = functools.partial(torch.full, (), dtype=dtype, device=device)
        scalar = number(math.nan) if loss is None else scalar_loss(loss, dtype)
        if tensors and read_values and scale:
            uncapped = sum_all(tensors, groups, dtype=dtype, device=device) * scale
            value = torch.nan_to_num(uncapped, 0.0, 0.0, 0.0)  # NaN, inf and -inf become zero
            if loss is not None:
                value = _cap(value, scalar, loss, max_fraction)
            connected = connect(value, scale, tensors, groups)
        else:
            value = uncapped = number(0.0)
            connected = connect(number(-0.0), scale, tensors, groups) if tensors else value
    return Term(
        connected=connected,
        value=value,
        uncapped=uncapped,
        loss=scalar,
        num_params=len(tensors),
        num_elements=sum(map(Tensor.numel, tensors)),
    )


def term_inputs(
    entries: Sequence[ParameterEntry],
    scale: float | None,
    *,
    read_values: bool,
    device: torch.device,
) -> list[Tensor]:
    """The tensors that the dummy term sums and gives gradients to, one for each parameter.

    Parameters that FSDP1 has resharded are left out.

    Args:
        entries: The inactive parameters.
        scale: As for `dummy_term`; with None the tensors are the parameters themselves.
        read_values: Whether the value of the term reads the parameters.
        device: Device of the term.

    Raises:
        ParameterMapError: A parameter is on the meta device and has no values to read.
        UnsupportedEngineError: ZeRO-3 has released a parameter, so that no gradient can fit it.
    """
    tensors = []
    for entry in entries:
        name, parameter, _ = entry
        if not parameter.numel() and has_zero3_elements(parameter):
            raise UnsupportedEngineError(
                f"ZeRO-3 has released the parameter {name!r} of an inactive modality, so that no "
                f"dummy gradient can have its shape. {ZERO3_REMEDY}"
            )
        if read_values and parameter.is_meta and device.type != "meta":
            raise ParameterMapError(
                f"The parameter {name!r} of an inactive modality is on the meta device and has no "
                f"values for a dummy term on {device}. Load the model before training, or pass "
                "`gradient_only=True`, which reads no values."
            )
        # FSDP1 gives every parameter of a unit that ran a gradient. A second gradient, which does
        # not go through its flat parameter, makes the sum wrong when gradients are accumulated.
        if not is_fsdp1_parameter(parameter):
            tensors.append(parameter if scale is None else term_input(entry))
    return tensors


def term_input(entry: ParameterEntry) -> Tensor:
    """The part of a parameter that the dummy term sums and gives a gradient to.

    For a DTensor it is the local shard, which takes no communication. For the table of a sparse
    embedding it is a selection of none of its rows: it adds nothing, and its gradient is sparse
    and empty, as an optimizer such as `torch.optim.SparseAdam` needs it. Otherwise it is the
    parameter itself.
    """
    shard = local_shard(entry[1])
    if is_sparse_table(entry):
        no_rows = torch.empty(0, dtype=torch.long, device=shard.device)
        return nn.functional.embedding(no_rows, shard, sparse=True)
    return shard


def scalar_loss(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss as one number for the cap and the report, detached, in `dtype`, of shape `[]`.

    It is a scalar loss itself, with its sign, and the mean of `|loss|` for any other shape.
    """
    wide = loss.detach().to(dtype)
    if wide.ndim:
        return wide.abs().mean()
    # A copy, because frameworks multiply the loss in place. Not a clone: inductor would merge it
    # with a total of the same value, and the total would then lose its graph, see
    # https://github.com/pytorch/pytorch/pull/195688. It does not merge the result of a clamp.
    return wide.clamp(-math.inf, math.inf)


def connect(
    value: Tensor, scale: float | None, tensors: Sequence[Tensor], groups: Groups
) -> Tensor:
    """A copy of `value` whose backward gives each of `tensors` the gradient `scale * upstream`.

    `groups` is `by_spec(tensors)`; with a scale of None it is not needed.
    """
    with torch.enable_grad():
        connected: Tensor = apply_function(_Connect, value, scale, groups, *tensors)
    return connected


def product_without_underflow(value: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
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


def _floor(dtype: torch.dtype) -> float:
    """Smallest magnitude that `dtype` represents and that is normal in the accumulation dtype.

    For float16 this is its smallest subnormal, 2**-24. The wider dtypes stop at their own smallest
    normal number, so that a processor that flushes subnormals does no harm.
    """
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(accumulation_dtype([dtype])).tiny)


def _cap(value: Tensor, scalar: Tensor, loss: Tensor, max_fraction: float | None) -> Tensor:
    """`value` within its fraction of the `scalar` loss, and so small that the total is finite."""
    info = torch.finfo(loss.dtype if loss.is_floating_point() else scalar.dtype)
    size = scalar.abs()
    peak = size
    if loss.numel() > 1:  # if the mean of finite losses overflows, the limit becomes zero
        peak = torch.maximum(loss.detach().to(scalar.dtype).abs().amax(), size)
    # The total is rounded twice, by the cast of the dummy and by the addition.
    limit = info.max * (1 - 2 * info.eps) - peak
    if max_fraction is not None:
        limit = torch.minimum(limit, size * (max_fraction * _ROUNDING_MARGIN))
    # Below the smallest normal number, rounding is too coarse for the bound to be exact. For an
    # infinite loss the limit is -inf and for NaN it is NaN; both comparisons are False.
    limit = torch.where(limit >= torch.finfo(limit.dtype).tiny, limit, 0.0)
    return torch.clamp(value, -limit, limit)


class _Connect(torch.autograd.Function):
    """Identity on `value` with one autograd edge to each parameter.

    Backward needs no value of a parameter, so an optimizer may change parameters in between. It
    uses the shapes of the forward pass, because some engines empty parameters after it.
    """

    generate_vmap_rule = True
    only_connects = True  # `graph.reached_leaves` can leave out all edges but the first
    is_dummy_term = True

    @staticmethod
    def forward(value: Tensor, scale: float | None, groups: Groups, *tensors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.scale, ctx.groups, *tensors = inputs
        ctx.num_tensors = len(tensors)
        # Backward asks only one parameter of each group whether it has a `.grad`. If others differ,
        # their gradients are right too, but slower to make.
        has_grads = not is_transformed()
        ctx.samples = {spec: tensors[i[0]] for spec, i in ctx.groups.items()} if has_grads else {}

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scale is None:
            return (None, None, None, *[None] * ctx.num_tensors)
        values = {
            (dtype, device): product_without_underflow(upstream.to(device), ctx.scale, dtype)
            for dtype, device in dict.fromkeys((dtype, device) for _, dtype, device in ctx.groups)
        }
        samples = {} if is_batched(upstream) else ctx.samples
        without_grad = {spec for spec, p in samples.items() if p.is_leaf and p.grad is None}
        gradients = fill_gradients(ctx.groups, values, without_grad)
        return (None, None, None, *map(gradients.__getitem__, range(ctx.num_tensors)))
