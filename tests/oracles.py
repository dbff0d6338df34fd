"""The naive few-line versions that the library is held against."""

from collections.abc import Iterable

import torch
from torch import Tensor


def naive_dummy(params: Iterable[Tensor], scale: float) -> Tensor:
    """The line that everybody copies, carried out in float64."""
    dummy = torch.zeros((), dtype=torch.float64)
    for param in params:
        real = param.real if param.is_complex() else param
        dummy = dummy + real.to(torch.float64).sum() * scale
    return dummy


def naive_magnitude(params: Iterable[Tensor], scale: float) -> float:
    """`scale * sum |p|`: what the rounding error of a sum is relative to."""
    return scale * sum(param.detach().to(torch.complex128).abs().sum().item() for param in params)


def naive_norm(tensor: Tensor) -> float:
    """Square root of the sum of `|x|**2`, in float64."""
    squares = tensor.detach().to(torch.complex128).abs().square()
    return squares.sum().sqrt().item()
