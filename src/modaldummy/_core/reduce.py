"""Sums, fills and norms over many tensors at once, with few calls and few kernel launches.

Nothing here records autograd history of its own or synchronizes with a device. Why the sizes are
what they are, and what all this costs: docs/explanation/cost.md.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from modaldummy._engines import foreach_norm, is_transformed, without_tensor_subclasses

Layout: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
Groups: TypeAlias = dict[Layout, list[int]]

# Largest number of elements for which copying tensors of one shape side by side costs less than
# one call for each tensor.
MAX_BATCHED_ELEMENTS = 8192
# The same for norms, which torch takes of many tensors with one call.
MAX_STACKED_ELEMENTS = 2048
# Elements copied per chunk. On CPU this stays below torch's threading threshold, because starting
# threads costs more than the copy.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 2**22, 2**15
# Elements cast at once, where the sum is taken in another dtype.
CAST_ELEMENTS = 2**20
# Elements of gradients that share one buffer. The buffer lives as long as any of them, and
# `torch.save` writes all of it.
BUFFER_ELEMENTS = 2**17

_PLAIN = (Tensor, nn.Parameter)


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module of fused kernels if they shall reduce tensors on `device`, None for plain torch.

    The kernels have not been measured yet, so the environment variable MODALDUMMY_REDUCTIONS has to
    ask for them. Only plain torch can be traced by `torch.compile`, transformed by `torch.func` and
    captured by a CUDA graph: the kernels first copy a table of addresses to the device.

    Raises:
        ValueError: MODALDUMMY_REDUCTIONS is neither "torch" nor "triton".
    """
    if device.type != "cuda":
        return None
    wanted = os.environ.get("MODALDUMMY_REDUCTIONS") or "torch"
    if wanted not in ("torch", "triton"):
        raise ValueError(f"MODALDUMMY_REDUCTIONS must be torch or triton, got {wanted!r}.")
    if wanted == "torch" or is_transformed() or torch.cuda.is_current_stream_capturing():
        return None
    return fused_kernels()


@functools.cache
def fused_kernels() -> ModuleType | None:
    """The module of fused kernels; None without Triton or with a Triton that is too old."""
    try:
        from modaldummy._core import triton_kernels
    except (ImportError, AttributeError):
        return None
    return triton_kernels


def accumulation_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Smallest real dtype, float32 or wider, that represents the real part of all `dtypes`."""
    widest = torch.float32
    for dtype in set(dtypes):
        widest = torch.promote_types(widest, dtype.to_real() if dtype.is_complex else dtype)
    return widest


def by_layout(tensors: Sequence[Tensor]) -> Groups:
    """Indexes of the tensors that share a shape, dtype and device."""
    groups: Groups = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    return groups


@torch.no_grad()
def sum_all(
    tensors: Sequence[Tensor],
    groups: Groups | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of all elements of all `tensors`, the real part of complex ones, of shape `[]`.

    Each device sums its own tensors in `dtype`; the partial sums are then added on `device`.
    Without any tensors the sum is an exact zero.

    Args:
        tensors: Tensors of any shapes, floating or complex dtypes and devices.
        groups: `by_layout(tensors)`, if the caller has it.
        dtype: Dtype of the accumulation and of the result.
        device: Device of the result.
    """
    # A subclass that only relabels tensors must not relabel the loss.
    with without_tensor_subclasses():
        groups = by_layout(tensors) if groups is None else groups
        totals = [
            torch.stack(_sums(tensors, own, dtype, place)).sum().to(device)
            for place, own in _by_device(groups).items()
        ]
        if len(totals) == 1:
            return totals[0]
        return torch.stack(totals).sum() if totals else torch.zeros((), dtype=dtype, device=device)


def _by_device(groups: Groups) -> dict[torch.device, Groups]:
    """The groups of each device."""
    parts: dict[torch.device, Groups] = {}
    for layout, indexes in groups.items():
        parts.setdefault(layout[2], {})[layout] = indexes
    return parts


def _sums(
    tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Partial sums that together cover the tensors of the groups, all on one device."""
    sums: list[Tensor] = []
    if (kernels := kernels_for(device)) is not None:
        fused, groups = _split(tensors, groups, kernels.takes)
        if fused:
            sums.append(kernels.sum_all([tensors[index] for index in fused], dtype))
    for (shape, tensor_dtype, _), indexes in groups.items():
        size = shape.numel()
        batched = shape and 0 < size <= MAX_BATCHED_ELEMENTS
        for chunk in _chunks(indexes, _chunk_elements(device) // size if batched else 1):
            values = [tensors[index] for index in chunk]
            if len(values) > 1 and _are_plain(values):
                values = [torch.cat(values)]
            for value in values:
                value = value.real if tensor_dtype.is_complex else value
                same = tensor_dtype is dtype
                sums += [value.sum(dtype=dtype)] if same else _cast_sums(value, dtype)
    return sums


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS


def _chunks(indexes: list[int], length: int) -> Iterator[list[int]]:
    return (indexes[start : start + length] for start in range(0, len(indexes), length))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors can be copied into one: all are strided, none is a subclass."""
    return all(type(t) in _PLAIN and t.layout is torch.strided for t in tensors)


def _cast_sums(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Partial sums of a tensor in another dtype, without a copy of the whole tensor."""
    # CUDA casts narrower dtypes to float32 while it sums; everywhere else torch copies first.
    copied = tensor.dtype is not dtype and not (tensor.is_cuda and dtype is torch.float32)
    small = tensor.numel() <= MAX_BATCHED_ELEMENTS
    if not copied or small or not _are_plain([tensor]) or is_transformed():
        return [tensor.sum(dtype=dtype)]
    parts = tensor.reshape(-1).split(CAST_ELEMENTS)
    cast = torch.empty(parts[0].numel(), dtype=dtype, device=tensor.device)
    return [cast[: part.numel()].copy_(part).sum() for part in parts]


def _split(
    tensors: Sequence[Tensor], groups: Groups, takes: Callable[[Tensor], bool]
) -> tuple[list[int], Groups]:
    """Indexes of the tensors that the fused kernels take, and the groups of the others."""
    fused: list[int] = []
    rest: Groups = {}
    for layout, indexes in groups.items():
        for index in indexes:
            if takes(tensors[index]):
                fused.append(index)
            else:
                rest.setdefault(layout, []).append(index)
    return fused, rest


def fill_like(
    groups: Groups,
    values: Mapping[tuple[torch.dtype, torch.device], Tensor],
    fresh: Collection[Layout],
) -> dict[int, Tensor]:
    """Gradients that are the number `values[dtype, device]` everywhere, by index.

    They are expanded scalars, which take no memory. Autograd copies them or adds them to `.grad`
    with one kernel launch each. Small gradients of the layouts in `fresh`, whose parameters have no
    `.grad` yet, are slices of shared buffers instead: autograd keeps those as they are, and one
    fill serves many of them.
    """
    gradients: dict[int, Tensor] = {}
    for layout, indexes in groups.items():
        shape, dtype, device = layout
        size, value = shape.numel(), values[dtype, device]
        if size == 1:
            # Autograd keeps a gradient of one element, and two parameters must not share it.
            gradients.update((index, value.expand(shape).clone()) for index in indexes)
        elif layout in fresh and 0 < size <= MAX_BATCHED_ELEMENTS and len(indexes) > 1:
            gradients.update(zip(indexes, _slices(value, len(indexes), shape), strict=True))
        else:
            gradients.update(dict.fromkeys(indexes, value.expand(shape)))
    return gradients


def _slices(value: Tensor, count: int, shape: torch.Size) -> Iterator[Tensor]:
    """`count` tensors of one `shape` filled with `value`, in as few buffers as possible."""
    rows, *others = shape
    most = BUFFER_ELEMENTS // shape.numel()
    for start in range(0, count, most):
        length = min(most, count - start) * rows
        buffer = value.expand(length, *others).clone(memory_format=torch.contiguous_format)
        # Slices of `split` would share a version counter: a change of one would count for all.
        yield from buffer.unsafe_split(rows)


@torch.no_grad()
def norms(
    tensors: Sequence[Tensor], groups: Groups | None = None, *, device: torch.device
) -> Tensor:
    r"""Euclidean norm of each of the `tensors`, as one tensor of shape `[n]` on `device`.

    .. math:: n_k = \sqrt{\sum_i |x_{k,i}|^2}

    Squares are summed in the accumulation dtype of all tensors. Squares below its smallest or above
    its largest number are lost, as in `torch.linalg.vector_norm`. An empty tensor has norm 0.

    Args:
        tensors: Strided tensors of any shapes, floating or complex dtypes and devices.
        groups: `by_layout(tensors)`, if the caller has it. The groups of tensors with other
            layouts give the same result or a RuntimeError.
        device: Device of the result.
    """
    order: list[int] = []
    parts: list[Tensor] = []
    with without_tensor_subclasses():
        groups = by_layout(tensors) if groups is None else groups
        dtype = accumulation_dtype(tensor_dtype for _, tensor_dtype, _ in groups)
        if any(tensor_dtype.is_complex for _, tensor_dtype, _ in groups):
            tensors = [
                torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors
            ]
            groups = by_layout(tensors)
        for place, own in _by_device(groups).items():
            for indexes, part in _norms(tensors, own, dtype, place):
                order += indexes
                parts.append(part.to(device))
        if not parts:
            return torch.zeros(0, dtype=dtype, device=device)
        joined = torch.cat(parts)
        if order == list(range(len(order))):
            return joined
        positions = sorted(range(len(order)), key=order.__getitem__)
        return joined[torch.tensor(positions, device=device)]


def _norms(
    tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """Pairs of the indexes of some tensors, all on one device, and of their norms."""
    if (kernels := kernels_for(device)) is not None:
        fused, groups = _split(tensors, groups, kernels.takes)
        if fused:
            yield fused, torch.stack(kernels.norms([tensors[index] for index in fused], dtype))
    stackable = {*map(type, tensors)}.issubset(_PLAIN)
    alone: list[int] = []
    for (shape, _, _), indexes in groups.items():
        size = shape.numel()
        if size > MAX_STACKED_ELEMENTS or not stackable:
            alone += indexes
            continue
        for chunk in _chunks(indexes, _chunk_elements(device) // max(size, 1)):
            rows = torch.stack([tensors[index] for index in chunk]).reshape(len(chunk), size)
            yield chunk, torch.linalg.vector_norm(rows, 2, dim=1, dtype=dtype)
    if alone:
        each = foreach_norm([tensors[index] for index in alone], 2, dtype=dtype)
        yield alone, torch.stack(each)
