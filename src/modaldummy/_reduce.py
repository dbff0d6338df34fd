"""Sums, fills and norms over many tensors at once, with few calls and few kernel launches.

Nothing here records autograd history of its own or waits for a device. Why the sizes are what they
are, and what all this costs: docs/explanation/cost.md.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Layout: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
Groups: TypeAlias = dict[Layout, list[int]]

# Up to so many elements, copying a tensor next to others costs less than a reduction of its own.
_SMALL = 8192
# So many elements of small tensors are summed up as one. On a CPU, just so few that torch does not
# wake its other threads for them, which takes longer than the work.
_SUMMED, _SUMMED_ON_CPU = 2**22, 2**15
# So many elements of gradients share a buffer. It lives as long as any of them, and `torch.save`
# writes all of it.
_SLICED = 2**17


def accumulation_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Smallest real dtype, float32 or wider, that holds the real part of all `dtypes`."""
    widest = torch.float32
    for dtype in set(dtypes):
        widest = torch.promote_types(widest, dtype.to_real() if dtype.is_complex else dtype)
    return widest


def by_layout(tensors: Sequence[Tensor]) -> Groups:
    """Indexes of the tensors of each shape, dtype and device."""
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
    """Sum of all elements of all `tensors`, the real part of complex ones, as a 0-d tensor.

    Each device adds up its own tensors in `dtype`; the partial sums then meet on `device`.
    No tensors at all give an exact zero.

    Args:
        tensors: Tensors of any shapes, floating or complex dtypes and devices.
        groups: `by_layout(tensors)`, where the caller has it.
        dtype: What to add up in, and dtype of the result.
        device: Device of the result.
    """
    # A subclass that only relabels tensors must not relabel the loss.
    with torch._C.DisableTorchFunctionSubclass():
        groups = by_layout(tensors) if groups is None else groups
        sums = [
            _sum(place, tensors, own, dtype).to(device) for place, own in _by_device(groups).items()
        ]
        if len(sums) == 1:
            return sums[0]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=dtype, device=device)


def _by_device(groups: Groups) -> dict[torch.device, Groups]:
    parts: dict[torch.device, Groups] = {}
    for layout, indexes in groups.items():
        parts.setdefault(layout[2], {})[layout] = indexes
    return parts


def _sum(
    device: torch.device, tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype
) -> Tensor:
    """Sum over the tensors on one device: small ones side by side, large ones each on its own."""
    sums: list[Tensor] = []
    small: list[Tensor] = []
    waiting, buffer = 0, _SUMMED_ON_CPU if device.type == "cpu" else _SUMMED
    for (shape, kind, _), indexes in groups.items():
        values = [tensors[index] for index in indexes]
        if kind.is_complex:
            values = [value.real for value in values]
        size = shape.numel()
        if size > _SMALL:
            sums += [value.sum(dtype=dtype) for value in values]
            continue
        fitting = buffer // max(size, 1)
        for start in range(0, len(values), fitting):
            chunk = values[start : start + fitting]
            if waiting + size * len(chunk) > buffer:
                sums.append(torch.cat(small).sum(dtype=dtype))
                small, waiting = [], 0
            small += chunk if len(shape) == 1 else [value.reshape(-1) for value in chunk]
            waiting += size * len(chunk)
    if small:
        sums.append(torch.cat(small).sum(dtype=dtype))
    return torch.stack(sums).sum()


def fill_like(
    groups: Groups,
    values: Mapping[tuple[torch.dtype, torch.device], Tensor],
    fresh: Collection[Layout],
) -> dict[int, Tensor]:
    """Gradients that hold the number `values[dtype, device]` everywhere, by index.

    They are expanded scalars, which take no memory, and which autograd copies, or adds to what is
    there: one kernel launch for each of them. Small ones of the layouts in `fresh`, which autograd
    keeps as they are handed over, are slices of common buffers instead.
    """
    gradients: dict[int, Tensor] = {}
    for layout, indexes in groups.items():
        shape, dtype, device = layout
        size, value = shape.numel(), values[dtype, device]
        if size == 1:
            # Autograd keeps a gradient of one element, and two parameters must not share it.
            gradients.update((index, value.expand(shape).clone()) for index in indexes)
        elif layout in fresh and 0 < size <= _SMALL and len(indexes) > 1:
            gradients.update(zip(indexes, _slices(value, len(indexes), shape), strict=True))
        else:
            gradients.update(dict.fromkeys(indexes, value.expand(shape)))
    return gradients


def _slices(value: Tensor, count: int, shape: torch.Size) -> Iterator[Tensor]:
    """`count` tensors of one `shape` filled with `value`, side by side in as few buffers as fit."""
    rows, *others = shape
    most = _SLICED // shape.numel()
    for start in range(0, count, most):
        length = min(most, count - start) * rows
        buffer = value.expand(length, *others).clone(memory_format=torch.contiguous_format)
        # Unlike those of `split`, these do not count changes of one as changes of the others.
        yield from buffer.unsafe_split(rows)


@torch.no_grad()
def norms(tensors: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    r"""Euclidean norm of each of the `tensors`, accumulated in `dtype`: one tensor of shape `[n]`.

    .. math:: n_k = \sqrt{\sum_i |x_{k,i}|^2}

    Squares below the smallest or above the largest number of `dtype` are lost, as in
    `torch.linalg.vector_norm`. An empty tensor has norm 0.

    Args:
        tensors: Tensors of any shapes, floating or complex dtypes and devices.
        dtype: What to add squares up in, and dtype of the result.
        device: Device of the result.
    """
    found: dict[int, Tensor] = {}
    with torch._C.DisableTorchFunctionSubclass():
        real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
        for own in _by_device(by_layout(real)).values():
            indexes = [index for members in own.values() for index in members]
            each = torch._foreach_norm([real[index] for index in indexes], 2, dtype=dtype)
            found.update(zip(indexes, torch.stack(each).to(device).unbind(), strict=True))
        if not found:
            return torch.zeros(0, dtype=dtype, device=device)
        return torch.stack([found[index] for index in range(len(tensors))])
