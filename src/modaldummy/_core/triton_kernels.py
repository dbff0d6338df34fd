"""The sum over many CUDA tensors at once, in Triton.

The tensors are cut into pieces. A table on the device lists the address and the length of each
piece. One launch per dtype reads all pieces and writes one number for each; tensors that are not
aligned to 16 bytes need a second launch. A second stage adds these numbers in a fixed order, so
that all runs give the same bits. Fills need no kernel of their own, see `reduce.fill_gradients`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaldummy._engines import PLAIN_TENSORS

# Elements that one program reads in total, and elements that it reads at once.
_PIECE = 2**16
_BLOCK = 2**12
# A table can be used again while the addresses stay the same. Each set of inactive parameters needs
# its own tables.
_MAX_TABLES = 64

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class _Table(NamedTuple):
    """Where tensors of one dtype are in memory.

    Attributes:
        pieces: Address and number of elements of each piece, `[p, 2]`, in the order of the tensors.
        aligned: Whether all addresses are multiples of 16 bytes, so that loads can be wide.
    """

    pieces: Tensor
    aligned: bool


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can read `tensor`. It must be plain, contiguous and of a known dtype."""
    plain = type(tensor) in PLAIN_TENSORS
    return plain and tensor.dtype in _DTYPES and tensor.is_contiguous() and not tensor.is_neg()


def sum_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of all elements of all tensors.

    Args:
        tensors: At least one tensor; all are on the same device.
        dtype: Dtype of the sum, float32 or float64.
    """
    with torch.cuda.device_of(tensors[0]):
        return torch.cat([_piece_sums(group, dtype) for group in _groups(tensors)]).sum()


def _groups(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors of each launch: all of one dtype, and all aligned to 16 bytes or none."""
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.data_ptr() % 16 == 0), []).append(tensor)
    return groups.values()


def _piece_sums(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Add up the elements of each piece of tensors of one dtype."""
    table = _table(tensors)
    partial = torch.empty(len(table.pieces), dtype=dtype, device=table.pieces.device)
    if len(partial):
        _pieces_kernel[(len(partial),)](
            table.pieces,
            partial,
            KIND=_DTYPES[tensors[0].dtype],
            ALIGNED=table.aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return partial


def _table(tensors: Sequence[Tensor]) -> _Table:
    device = tensors[0].device
    # The stream that needs a table fills it. Other streams would not wait until it is filled.
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
    rows = [
        (address + start * element_size, min(length - start, _PIECE))
        for address, length in places
        for start in range(0, length, _PIECE)
    ]
    # A copy is asynchronous only from pinned memory. torch keeps that memory until it is done.
    pieces = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").reshape(-1, 2)
    aligned = not (pieces[:, 0] % 16).any().item()
    return _Table(pieces.to(device, non_blocking=True), aligned)


@triton.jit
def _pieces_kernel(
    pieces,
    partial,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of the elements of piece `i` to `partial[i]`."""
    piece = tl.program_id(0).to(tl.int64)
    start = tl.load(pieces + 2 * piece).to(tl.pointer_type(KIND))
    length = tl.load(pieces + 2 * piece + 1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=partial.dtype.element_ty)
    full = length - length % BLOCK
    for offset in range(0, full, BLOCK):  # no mask, so that loads can be wide
        address = start + (offset + lanes)
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        total += tl.load(address).to(partial.dtype.element_ty)
    values = tl.load(start + (full + lanes), mask=full + lanes < length, other=0.0)
    total += values.to(partial.dtype.element_ty)
    tl.store(partial + piece, tl.sum(total, axis=0))
