"""Sums, fills and norms over many tensors at once, with few calls and few kernel launches.

Nothing here records autograd history of its own or waits for a device. Why the sizes are what they
are, and what all this costs: docs/explanation/cost.md.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn

Layout: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
Groups: TypeAlias = dict[Layout, list[int]]

# Up to so many elements, copying tensors of one shape side by side costs less than a call for each.
_SMALL = 8192
# The same for norms, which torch takes of many tensors with one call.
_GATHERED = 2048
# So many elements are copied at once. On a CPU, just so few that torch does not wake its other
# threads for them, which takes longer than the work.
_SUMMED, _SUMMED_ON_CPU = 2**22, 2**15
# So many elements are cast at once, where the sum is in another dtype.
_CAST = 2**20
# So many elements of gradients share a buffer. It lives as long as any of them, and `torch.save`
# writes all of it.
_SLICED = 2**17

_PLAIN = (Tensor, nn.Parameter)


def transformed() -> bool:
    """Whether `torch.compile` or `torch.func` is at work, and tensors stand for something else."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def kernels_for(device: torch.device) -> ModuleType | None:
    """The fused kernels, where they are to reduce tensors on `device`; None for plain torch.

    This is the one place where that is decided. The kernels are for where they have been measured
    to win. They have not been measured yet, so they must be asked for, in the environment. Plain
    torch is what `torch.compile` can trace, what `torch.func` can transform, and what a CUDA graph
    can capture: a table of addresses would have to be copied to the device first.

    Raises:
        ValueError: MODALDUMMY_REDUCTIONS is neither torch nor triton.
    """
    if device.type != "cuda":
        return None
    wanted = os.environ.get("MODALDUMMY_REDUCTIONS") or "torch"
    if wanted not in ("torch", "triton"):
        raise ValueError(f"MODALDUMMY_REDUCTIONS must be torch or triton, got {wanted!r}.")
    if wanted == "torch" or transformed() or torch.cuda.is_current_stream_capturing():
        return None
    return fused_kernels()


@functools.cache
def fused_kernels() -> ModuleType | None:
    """The module of fused kernels; None without Triton, or with one that is too old for it."""
    try:
        from modaldummy import _triton
    except (ImportError, AttributeError):
        return None
    return _triton


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
        totals = [
            torch.stack(_sums(tensors, own, dtype, place)).sum().to(device)
            for place, own in _by_device(groups).items()
        ]
        if len(totals) == 1:
            return totals[0]
        return torch.stack(totals).sum() if totals else torch.zeros((), dtype=dtype, device=device)


def _by_device(groups: Groups) -> dict[torch.device, Groups]:
    parts: dict[torch.device, Groups] = {}
    for layout, indexes in groups.items():
        parts.setdefault(layout[2], {})[layout] = indexes
    return parts


def _sums(
    tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Sums that together cover the tensors of the groups, all on one device."""
    sums: list[Tensor] = []
    if (kernels := kernels_for(device)) is not None:
        fused, groups = _split(tensors, groups, kernels.takes)
        if fused:
            sums.append(kernels.sum_all([tensors[index] for index in fused], dtype))
    room = _SUMMED_ON_CPU if device.type == "cpu" else _SUMMED
    for (shape, kind, _), indexes in groups.items():
        size = shape.numel()
        together = room // size if shape and 0 < size <= _SMALL else 1
        for start in range(0, len(indexes), together):
            values = [tensors[index] for index in indexes[start : start + together]]
            if len(values) > 1 and _plain(values):
                values = [torch.cat(values)]
            for value in values:
                value = value.real if kind.is_complex else value
                sums += [value.sum(dtype=dtype)] if kind is dtype else _cast_sums(value, dtype)
    return sums


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors can be copied into one: no subclass that lacks it, no sparse one."""
    return all(type(t) in _PLAIN and t.layout is torch.strided for t in tensors)


def _cast_sums(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Sums of the parts of a tensor that torch would first make a copy of, in another dtype."""
    # On CUDA, what is narrower than float32 is cast on the way.
    copied = tensor.dtype is not dtype and not (tensor.is_cuda and dtype is torch.float32)
    if not copied or tensor.numel() <= _SMALL or not _plain([tensor]) or transformed():
        return [tensor.sum(dtype=dtype)]
    parts = tensor.reshape(-1).split(_CAST)
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
    """Gradients that hold the number `values[dtype, device]` everywhere, by index.

    They are expanded scalars, which take no memory, and which autograd copies, or adds to what is
    there: one kernel launch for each of them. Small ones of the layouts in `fresh`, which autograd
    keeps as they are handed over, are slices of buffers instead, one fill for many of one layout.
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
def norms(
    tensors: Sequence[Tensor], groups: Groups | None = None, *, device: torch.device
) -> Tensor:
    r"""Euclidean norm of each of the `tensors`, as one tensor of shape `[n]` on `device`.

    .. math:: n_k = \sqrt{\sum_i |x_{k,i}|^2}

    Squares are added up in the accumulation dtype of all tensors; those below its smallest or above
    its largest number are lost, as in `torch.linalg.vector_norm`. An empty tensor has norm 0.

    Args:
        tensors: Strided tensors of any shapes, floating or complex dtypes and devices.
        groups: `by_layout(tensors)`, where the caller has it. Groups that fit tensors of other
            layouts give the same result or a RuntimeError.
        device: Device of the result.
    """
    places: list[int] = []
    found: list[Tensor] = []
    with torch._C.DisableTorchFunctionSubclass():
        groups = by_layout(tensors) if groups is None else groups
        dtype = accumulation_dtype(kind for _, kind, _ in groups)
        if any(kind.is_complex for _, kind, _ in groups):
            tensors = [
                torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors
            ]
            groups = by_layout(tensors)
        for place, own in _by_device(groups).items():
            for indexes, together in _norms(tensors, own, dtype, place):
                places += indexes
                found.append(together.to(device))
        if not found:
            return torch.zeros(0, dtype=dtype, device=device)
        joined = torch.cat(found)
        if places == list(range(len(places))):
            return joined
        ranks = sorted(range(len(places)), key=places.__getitem__)
        return joined[torch.tensor(ranks, device=device)]


def _norms(
    tensors: Sequence[Tensor], groups: Groups, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """Indexes of some tensors of the groups, all on one device, and their norms, in turns."""
    if (kernels := kernels_for(device)) is not None:
        fused, groups = _split(tensors, groups, kernels.takes)
        if fused:
            yield fused, torch.stack(kernels.norms([tensors[index] for index in fused], dtype))
    room = _SUMMED_ON_CPU if device.type == "cpu" else _SUMMED
    odd = not {*map(type, tensors)}.issubset(_PLAIN)  # some may not be copied into one
    alone: list[int] = []
    for (shape, _, _), indexes in groups.items():
        size = shape.numel()
        if size > _GATHERED or odd:
            alone += indexes
            continue
        together = room // max(size, 1)
        for start in range(0, len(indexes), together):
            own = indexes[start : start + together]
            rows = torch.stack([tensors[index] for index in own]).reshape(len(own), size)
            yield own, torch.linalg.vector_norm(rows, 2, dim=1, dtype=dtype)
    if alone:
        each = torch._foreach_norm([tensors[index] for index in alone], 2, dtype=dtype)
        yield alone, torch.stack(each)
