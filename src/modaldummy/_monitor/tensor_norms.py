"""Euclidean norms of many tensors at once, with few calls and few kernel launches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modaldummy._core.reduce import accumulation_dtype, by_spec, chunk_elements, chunks
from modaldummy._engines import PLAIN_TENSORS, foreach_norm, without_tensor_subclasses

# Largest number of elements for which stacking tensors of one shape costs less than `foreach_norm`.
MAX_STACKED_ELEMENTS = 2048


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    r"""Euclidean norm of each of the `tensors`, as one tensor of shape `[n]` on `device`.

    .. math:: n_k = \sqrt{\sum_i |x_{k,i}|^2}

    Squares are summed in the accumulation dtype of all tensors. Squares below its smallest or above
    its largest number are lost, as in `torch.linalg.vector_norm`. An empty tensor has norm 0.
    Nothing here synchronizes with a device.

    Args:
        tensors: Strided tensors of any shapes, floating or complex dtypes and devices.
        device: Device of the result.
    """
    order: list[int] = []
    parts: list[Tensor] = []
    with without_tensor_subclasses():
        groups = by_spec(tensors)
        dtype = accumulation_dtype(tensor_dtype for _, tensor_dtype, _ in groups)
        if any(tensor_dtype.is_complex for _, tensor_dtype, _ in groups):
            tensors = [
                torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors
            ]
            groups = by_spec(tensors)
        stackable = {*map(type, tensors)}.issubset(PLAIN_TENSORS)
        alone: dict[torch.device, list[int]] = {}
        for (shape, _, place), indexes in groups.items():
            size = shape.numel()
            if size > MAX_STACKED_ELEMENTS or not stackable:
                alone.setdefault(place, []).extend(indexes)
                continue
            for chunk in chunks(indexes, chunk_elements(place) // max(size, 1)):
                rows = torch.stack([tensors[index] for index in chunk]).reshape(len(chunk), size)
                parts.append(torch.linalg.vector_norm(rows, 2, dim=1, dtype=dtype).to(device))
                order += chunk
        for indexes in alone.values():
            each = foreach_norm([tensors[index] for index in indexes], 2, dtype=dtype)
            parts.append(torch.stack(each).to(device))
            order += indexes
        if not parts:
            return torch.zeros(0, dtype=dtype, device=device)
        joined = torch.cat(parts)
        if order == list(range(len(order))):
            return joined
        positions = sorted(range(len(order)), key=order.__getitem__)
        return joined[torch.tensor(positions, device=device)]
