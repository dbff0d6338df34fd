"""Sums and norms over many CUDA tensors at once, in Triton.

A table on the device lists the pieces that the tensors are cut into: address and length. One launch
for each dtype reads all of them (a second one those that are not aligned to 16 bytes) and leaves a
number for each piece; a second stage adds these up, always in the same order, so that the result
is the same in each run. A fill needs no kernel of its own: the slices of `_reduce.fill_like` are
one already.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Elements that one program reads, and how many of them at once.
_PIECE = 2**16
_BLOCK = 2**12
# Tables are kept while the addresses stay as they are: an active set or two, sums and norms.
_MAX_TABLES = 64

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class _Table(NamedTuple):
    """Where tensors of one dtype lie.

    Attributes:
        pieces: Address and number of elements of each piece, `[p, 2]`, in the order of the tensors.
        bounds: Piece with which each tensor starts, and their number, `[n + 1]`.
        aligned: Whether all addresses are multiples of 16 bytes, so that loads may be wide.
    """

    pieces: Tensor
    bounds: Tensor
    aligned: bool


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can read `tensor`: a plain, contiguous one of a known dtype."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.dtype in _DTYPES and tensor.is_contiguous() and not tensor.is_neg()


def sum_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of all elements of all `tensors`, at least one, of one device, in float32 or float64."""
    with torch.cuda.device_of(tensors[0]):
        partial = [_reduce(own, dtype, square=False)[0] for own in _groups(tensors)]
        return torch.cat(partial).sum()


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Euclidean norm of each of the `tensors`, at least one, of one device, each of shape `[]`."""
    found: dict[int, Tensor] = {}
    with torch.cuda.device_of(tensors[0]):
        for own in _groups(tensors):
            partial, table = _reduce(own, dtype, square=True)
            result = torch.empty(len(own), dtype=dtype, device=partial.device)
            _norms_kernel[(len(own),)](partial, table.bounds, result, BLOCK=1024)
            found.update(zip((id(tensor) for tensor in own), result.unbind(), strict=True))
    return [found[id(tensor)] for tensor in tensors]


def _groups(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """What one launch reads: tensors of one dtype, all of them aligned to 16 bytes or none."""
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.data_ptr() % 16 == 0), []).append(tensor)
    return groups.values()


def _reduce(tensors: Sequence[Tensor], dtype: torch.dtype, square: bool) -> tuple[Tensor, _Table]:
    """Sum of the elements, or of their squares, of each piece of tensors of one dtype."""
    table = _table(tensors)
    partial = torch.empty(len(table.pieces), dtype=dtype, device=table.pieces.device)
    if len(partial):
        _pieces_kernel[(len(partial),)](
            table.pieces,
            partial,
            KIND=_DTYPES[tensors[0].dtype],
            SQUARE=square,
            ALIGNED=table.aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return partial, table


def _table(tensors: Sequence[Tensor]) -> _Table:
    device = tensors[0].device
    # A table is filled on the stream that asks for it, and other streams would not wait for that.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    places = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    key = (device, stream, tensors[0].dtype, places)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    _tables[key] = table = _new_table(places, tensors[0].element_size(), device)
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return table


def _new_table(
    places: Sequence[tuple[int, int]], element_size: int, device: torch.device
) -> _Table:
    addresses, lengths = np.array(places, dtype=np.int64).T
    counts = -(-lengths // _PIECE)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
    starts = within * _PIECE
    pieces = np.empty((bounds[-1], 2), dtype=np.int64)
    pieces[:, 0] = np.repeat(addresses, counts) + starts * element_size
    pieces[:, 1] = np.minimum(np.repeat(lengths, counts) - starts, _PIECE)
    aligned = not (pieces[:, 0] % 16).any()
    return _Table(_to_device(pieces, device), _to_device(bounds, device), bool(aligned))


def _to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copy of `array` on `device`, on its way without waiting for it."""
    host = torch.from_numpy(array)
    # Only from pinned memory does a copy not wait; torch frees that memory when the copy is done.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def _pieces_kernel(
    pieces,
    partial,
    KIND: tl.constexpr,
    SQUARE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up one piece: `partial[i]` becomes the sum of its elements, or of their squares."""
    piece = tl.program_id(0).to(tl.int64)
    start = tl.load(pieces + 2 * piece).to(tl.pointer_type(KIND))
    length = tl.load(pieces + 2 * piece + 1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=partial.dtype.element_ty)
    full = length - length % BLOCK
    for offset in range(0, full, BLOCK):  # without a mask, so that loads can be wide
        address = start + (offset + lanes)
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        values = tl.load(address).to(partial.dtype.element_ty)
        total += values * values if SQUARE else values
    values = tl.load(start + (full + lanes), mask=full + lanes < length, other=0.0)
    values = values.to(partial.dtype.element_ty)
    total += values * values if SQUARE else values
    tl.store(partial + piece, tl.sum(total, axis=0))


@triton.jit
def _norms_kernel(partial, bounds, result, BLOCK: tl.constexpr):
    """Square root of what the pieces of one tensor add up to."""
    tensor = tl.program_id(0)
    first = tl.load(bounds + tensor)
    last = tl.load(bounds + tensor + 1)
    total = tl.zeros([BLOCK], dtype=partial.dtype.element_ty)
    for offset in range(first, last, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < last, other=0.0)
    tl.store(result + tensor, tl.sqrt(tl.sum(total, axis=0)))
