"""Checks of the scale against dtypes, clipping, loss scaling, accumulation and ranks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_

from modaldummy._core.parameter import is_sparse_table
from modaldummy._core.reduce import accumulation_dtype
from modaldummy._core.term import product_without_underflow
from modaldummy._engines import local_shard
from modaldummy._findings import Finding
from modaldummy._group import num_ranks
from modaldummy._preflight.setup import Setup

_LARGE_SCALE = 1e-3


def check_scale(setup: Setup) -> Iterator[Finding]:
    """MD132, MD133 and MD135 to MD137; nothing without a scale above 0."""
    if scale := setup.wrapper.scale:
        yield from _check_scale_not_large(scale)
        yield from _check_dtypes_represent_scale(setup, scale)
        yield from _check_max_norm(setup, scale)
        yield from _check_loss_factor(setup, scale)
        yield from _check_average_over_ranks(setup, scale)


def _check_scale_not_large(scale: float) -> Iterator[Finding]:
    if scale >= _LARGE_SCALE:
        yield Finding(
            "MD132",
            "warning",
            "Dummy gradients of this scale are as large as real gradients, and move parameters "
            "that no batch has trained.",
            {"scale": scale, "limit": _LARGE_SCALE},
            "Use the default, 1e-7.",
        )


def _check_dtypes_represent_scale(setup: Setup, scale: float) -> Iterator[Finding]:
    # `math.ulp(0.0)` is too small for every dtype: this gives the smallest dummy gradient of each.
    gradients = _dummy_gradients(setup, math.ulp(0.0), 1.0)
    smallest = {name: float(gradient.abs()) for name, gradient in gradients.items()}
    raised = {name: number for name, number in smallest.items() if scale < number}
    if raised:
        yield Finding(
            "MD133",
            "warning",
            f"Dummy gradients in {', '.join(raised)} are larger than the scale, which is below the "
            "smallest number that is safe in that dtype.",
            {"scale": scale, "gradients": raised},
            "Use the default, 1e-7, which every dtype can represent, or 0.0 for exact zeros.",
        )


def _check_max_norm(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.max_norm is None:
        return
    total_norm, source = _total_norm(setup)
    zeroed = []
    for name, gradient in _dummy_gradients(setup, scale, 1 / setup.accumulation_steps).items():
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        clip_grads_with_norm_(parameter, setup.max_norm, torch.tensor(total_norm))
        if not parameter.grad.any():
            zeroed.append(name)
    if zeroed:
        yield Finding(
            "MD135",
            "warning",
            f"Clipping to this norm rounds dummy gradients in {', '.join(zeroed)} to zero.",
            {
                "dtypes": zeroed,
                "max_norm": setup.max_norm,
                "total_norm": total_norm,
                "total_norm_from": source,
            },
            "Keep trainable weights in torch.float32 or torch.bfloat16, clip to a larger norm, or "
            "use a larger scale.",
        )


def _total_norm(setup: Setup) -> tuple[float, str]:
    """The norm of all gradients that parameters have now on this rank, or 1; and which it is."""
    gradients = [local_shard(p.grad) for p in setup.names if p.grad is not None]
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    # In a wide dtype, because squares of float16 gradients overflow.
    norms = [vector_norm(g.abs(), dtype=accumulation_dtype([g.dtype])).item() for g in dense]
    total_norm = math.hypot(*norms)
    if 0 < total_norm < math.inf:
        return total_norm, "gradients"
    return 1.0, "assumed"


def _check_loss_factor(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.scaler is None:
        return
    factor = _loss_factor(setup)
    gradients = _dummy_gradients(setup, scale, factor)
    infinite = [name for name, gradient in gradients.items() if gradient.isinf()]
    if infinite:
        yield Finding(
            "MD136",
            "error",
            "The loss scaler skips each step with this factor, because the factor makes dummy "
            f"gradients in {', '.join(infinite)} infinite.",
            {"dtypes": infinite, "scale": scale, "factor": factor},
            "Use a smaller scale, or start the scaler with a smaller factor.",
        )


def _check_average_over_ranks(setup: Setup, scale: float) -> Iterator[Finding]:
    ranks = int(setup.ddps[0].process_group.size()) if setup.ddps else num_ranks(None)
    steps = setup.accumulation_steps
    gradients = _dummy_gradients(setup, scale, _loss_factor(setup) / steps)
    # DDP multiplies by the inverse, in the dtype of the gradient.
    zeroed = [name for name, gradient in gradients.items() if not gradient * (1 / ranks)]
    if zeroed:
        reduced_once = {
            name: float(gradients[name] * steps * (1 / ranks)) * ranks for name in zeroed
        }
        yield Finding(
            "MD137",
            "warning",
            f"The average over {ranks} ranks, with `accumulation_steps={steps}`, rounds dummy "
            f"gradients in {', '.join(zeroed)} to zero.",
            {
                "dtypes": zeroed,
                "ranks": ranks,
                "accumulation_steps": steps,
                "if_reduced_once": reduced_once,
            },
            "Keep trainable weights in torch.float32 or torch.bfloat16, or use a larger scale. Or, "
            "if `if_reduced_once` is not 0, run all micro-batches but the last in `no_sync()`.",
        )


def _loss_factor(setup: Setup) -> float:
    """The number that the scaler multiplies the loss by; 1 without a scaler."""
    if isinstance(setup.scaler, torch.amp.GradScaler):
        return setup.scaler.get_scale()
    return setup.scaler or 1.0


def _dummy_gradients(setup: Setup, scale: float, upstream: float) -> dict[str, Tensor]:
    """The dummy gradient of one element in each dtype of the modality parameters, by dtype.

    Sparse embeddings do not count, because their dummy gradients have no elements.
    """
    dense = [owned for owned in setup.modality_parameters.values() if not is_sparse_table(owned)]
    return {
        str(dtype).removeprefix("torch."): product_without_underflow(
            torch.tensor(upstream), scale, dtype
        )
        for dtype in dict.fromkeys(owned.parameter.dtype for owned in dense)
    }
