"""Sums and fills over many tensors at once, with few calls and few kernel launches.

Nothing here records autograd history of its own or synchronizes with a device.
docs/explanation/cost.md explains the sizes below and what all this costs.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from modaldummy._engines import PLAIN_TENSORS, is_transformed, without_tensor_subclasses

TensorSpec: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
Groups: TypeAlias = dict[TensorSpec, list[int]]

# Largest number of elements for which copying tensors of one shape side by side costs less than
# one call for each tensor.
MAX_BATCHED_ELEMENTS = 8192
# Elements copied per chunk. On CPU this stays below torch's threading threshold, because starting
# threads costs more than the copy.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 2**22, 2**15
# Elements cast at once, where the sum is taken in another dtype.
CAST_ELEMENTS = 2**20
# Elements of gradients that share one buffer. The buffer lives as long as any of them, and
# `torch.save` writes all of it.
BUFFER_ELEMENTS = 2**17


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module of fused kernels if they should reduce tensors on `device`, None for plain torch.

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


def by_spec(tensors: Sequence[Tensor]) -> Groups:
    """Indexes of the tensors that share a shape, dtype and device."""
    groups: Groups = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.shape, tensor.dtype, tensor.device].append(index)
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
        groups: `by_spec(tensors)`, if the caller has it.
        dtype: Dtype of the accumulation and of the result.
        device: Device of the result.
    """
    # Otherwise a Tensor subclass among the parameters would make the sum, and the loss, one too.
    with without_tensor_subclasses():
        groups = by_spec(tensors) if groups is None else groups
        by_device: dict[torch.device, Groups] = {}
        for spec, indexes in groups.items():
            by_device.setdefault(spec[2], {})[spec] = indexes
        totals = [
            torch.stack(_sums(tensors, own_groups, dtype, own_device)).sum().to(device)
            for own_device, own_groups in by_device.items()
        ]
        if len(totals) == 1:
            return totals[0]
        return torch.stack(totals).sum() if totals else torch.zeros((), dtype=dtype, device=device)


def _sums(
    tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Partial sums that together cover the tensors of the groups, all on one device."""
    sums: list[Tensor] = []
    if (kernels := kernels_for(device)) is not None:
        taken = {i for group in groups.values() for i in group if kernels.takes(tensors[i])}
        groups = {spec: [i for i in group if i not in taken] for spec, group in groups.items()}
        if taken:
            sums.append(kernels.sum_all([tensors[index] for index in sorted(taken)], dtype))
    for (shape, tensor_dtype, _), indexes in groups.items():
        size = shape.numel()
        batched = shape and 0 < size <= MAX_BATCHED_ELEMENTS
        for chunk in chunks(indexes, chunk_elements(device) // size if batched else 1):
            values = [tensors[index] for index in chunk]
            if len(values) > 1 and _are_plain(values):
                values = [torch.cat(values)]
            for value in values:
                value = value.real if tensor_dtype.is_complex else value
                sums += _sum_in_parts(value, dtype)
    return sums


def chunk_elements(device: torch.device) -> int:
    """How many elements to copy at once on a device."""
    return CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS


def chunks(indexes: list[int], length: int) -> Iterator[list[int]]:
    """Parts of a list, each but the last with `length` items."""
    return (indexes[start : start + length] for start in range(0, len(indexes), length))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors can be copied into one: all are strided, none is a subclass."""
    return all(type(t) in PLAIN_TENSORS and t.layout is torch.strided for t in tensors)


def _sum_in_parts(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Partial sums of a tensor, for which no copy of the whole tensor in `dtype` is made."""
    # CUDA casts narrower dtypes to float32 while it sums; everywhere else torch copies first.
    copied = tensor.dtype is not dtype and not (tensor.is_cuda and dtype is torch.float32)
    small = tensor.numel() <= MAX_BATCHED_ELEMENTS
    if not copied or small or not _are_plain([tensor]) or is_transformed():
        return [tensor.sum(dtype=dtype)]
    parts = tensor.reshape(-1).split(CAST_ELEMENTS)
    cast = torch.empty(parts[0].numel(), dtype=dtype, device=tensor.device)
    return [cast[: part.numel()].copy_(part).sum() for part in parts]


def fill_gradients(
    groups: Groups,
    values: Mapping[tuple[torch.dtype, torch.device], Tensor],
    without_grad: Collection[TensorSpec],
) -> dict[int, Tensor]:
    """A gradient for each tensor of the groups, by its index: `values[dtype, device]` everywhere.

    Gradients are expanded scalars, which take no memory. Autograd copies them or adds them to
    `.grad` with one kernel launch each. Small gradients of the groups in `without_grad`, whose
    parameters have no `.grad` yet, are slices of shared buffers instead: autograd keeps those as
    they are, and one fill serves many of them.
    """
    gradients: dict[int, Tensor] = {}
    for spec, indexes in groups.items():
        shape, dtype, device = spec
        size, value = shape.numel(), values[dtype, device]
        if size == 1:
            # Autograd keeps a gradient of one element, and two parameters must not share it.
            gradients.update((index, value.expand(shape).clone()) for index in indexes)
        elif spec in without_grad and 0 < size <= MAX_BATCHED_ELEMENTS and len(indexes) > 1:
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
