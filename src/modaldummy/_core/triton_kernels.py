"""The sum over many CUDA tensors at once, in Triton.

The tensors are cut into pieces. A table on the device lists the address and the length of each
piece. One launch per dtype reads all pieces and writes one number for each; tensors that are not
aligned to 16 bytes need a second launch. A second stage adds these numbers in a fixed order, so
that all runs give the same bits. Fills need no kernel of their own, see `reduce.fill_gradients`.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaldummy._engines import PLAIN_TENSORS

# Elements that one program reads in total, and elements that it reads at once.
_PIECE = 2**16
_BLOCK = 2**12

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


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
    launches: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        launches.setdefault((tensor.dtype, tensor.data_ptr() % 16 == 0), []).append(tensor)
    with torch.cuda.device_of(tensors[0]):
        sums = [_piece_sums(group, aligned, dtype) for (_, aligned), group in launches.items()]
        return torch.cat(sums).sum()


def _piece_sums(tensors: Sequence[Tensor], aligned: bool, dtype: torch.dtype) -> Tensor:
    """Add up the elements of each piece of tensors of one dtype.

    Args:
        tensors: All of them are aligned to 16 bytes, or none is.
        aligned: Which of the two, since loads from aligned memory can be wide.
        dtype: Dtype of the sums.
    """
    device = tensors[0].device
    # The stream that needs a table fills it. Other streams would not wait until it is filled.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    places = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    pieces = _table(places, tensors[0].dtype, device, stream)
    partial = torch.empty(len(pieces), dtype=dtype, device=device)
    if len(partial):
        _pieces_kernel[(len(partial),)](
            pieces,
            partial,
            KIND=_DTYPES[tensors[0].dtype],
            ALIGNED=aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return partial


# A table can be used again while the addresses stay the same. Each set of inactive parameters needs
# its own tables.
@functools.lru_cache(maxsize=64)
def _table(
    places: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    """Address and number of elements of each piece, `[p, 2]`, in the order of the tensors.

    Args:
        places: Address and number of elements of each tensor.
        dtype: Dtype of the tensors.
        device: Device of the tensors and of the table.
        stream: The current stream, so that each stream has tables of its own.
    """
    rows = [
        (address + start * dtype.itemsize, min(length - start, _PIECE))
        for address, length in places
        for start in range(0, length, _PIECE)
    ]
    # A copy is asynchronous only from pinned memory. torch keeps that memory until it is done.
    pieces = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").reshape(-1, 2)
    return pieces.to(device, non_blocking=True)


@triton.jit
def _pieces_kernel(pieces, partial, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
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
