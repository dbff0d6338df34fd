"""Sums over many tensors at once, in plain torch.

Nothing here records autograd history or waits for a device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Smallest real dtype, float32 or wider, that holds the real part of all `dtypes`."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype.to_real() if dtype.is_complex else dtype)
    return widest


@torch.no_grad()
def sum_all(tensors: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of all elements of all `tensors`, the real part of complex ones, as a 0-d tensor.

    Each device adds up its own tensors in `dtype`; the partial sums then meet on `device`.
    No tensors at all give an exact zero.
    """
    partial: dict[torch.device, list[Tensor]] = {}
    # A subclass that only relabels tensors must not relabel the loss.
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            values = tensor.real if tensor.is_complex() else tensor
            partial.setdefault(tensor.device, []).append(values.sum(dtype=dtype))
        if not partial:
            return torch.zeros((), dtype=dtype, device=device)
        return torch.stack([torch.stack(sums).sum().to(device) for sums in partial.values()]).sum()
