"""Runs a model without lasting effects, and compares gradients bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from modaldummy._engines import local_shard


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Start without gradients; at the end restore gradients, buffers and torch's random state."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if not isinstance(buffer, UninitializedBuffer)
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
            for module, name, buffer, values in buffers:
                # Forward may have changed the buffer in place, or put another tensor there.
                setattr(module, name, buffer.copy_(values))


def describe_difference(without: Tensor | None, with_dummy: Tensor | None) -> str:
    """How two gradients differ, in words: without and with the dummy term.

    Returns:
        An empty string if both are None, or equal in layout, dtype, shape and every bit. Two NaN
        of the same bits are equal.
    """
    if without is None or with_dummy is None:
        if without is with_dummy:
            return ""
        return f"has a gradient only with{'out' if with_dummy is None else ''} the dummy term"
    before, after = (f"{t.layout} {t.dtype} {list(t.shape)}" for t in (without, with_dummy))
    if before != after:
        return f"changed from {before} to {after}"
    # Local shards, since no assertion may communicate with other ranks.
    without, with_dummy = local_shard(without).to_dense(), local_shard(with_dummy).to_dense()
    if torch.equal(_bytes_of(without), _bytes_of(with_dummy)):
        return ""
    return f"differs by up to {(without - with_dummy).abs().max().item():.3g}"


def count_zeros(gradient: Tensor) -> int:
    """Number of elements that are zero, without those that a sparse gradient does not store."""
    stored = gradient.coalesce().values() if gradient.is_sparse else local_shard(gradient)
    return stored.numel() - int(torch.count_nonzero(stored))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8)
