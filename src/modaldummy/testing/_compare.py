"""Runs that leave no trace, and gradients compared bit by bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Start without gradients; put gradients, buffers and the random state back at the end."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not isinstance(buffer, UninitializedBuffer)
    ]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer.copy_(saved)


def difference(one: Tensor | None, other: Tensor | None) -> str:
    """How `other` differs from `one`, in words; empty if not a bit does, NaN included."""
    if one is None or other is None:
        if one is other:
            return ""
        return f"there is one only with{'out' if other is None else ''} the dummy"
    kinds = [f"{t.layout} {t.dtype} {list(t.shape)}" for t in (one, other)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} became {kinds[1]}"
    one, other = _local(one).to_dense(), _local(other).to_dense()
    if torch.equal(_bits(one), _bits(other)):
        return ""
    return f"differs by up to {(one - other).abs().max().item():.3g}"


def count_zeros(gradient: Tensor) -> int:
    """How many elements are zero; what a sparse gradient leaves out does not count."""
    stored = gradient.coalesce().values() if gradient.is_sparse else _local(gradient)
    return stored.numel() - int(torch.count_nonzero(stored))


def _local(tensor: Tensor) -> Tensor:
    # No assertion may communicate between ranks.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8)
