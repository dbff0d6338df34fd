"""Checks of the scale against dtypes, clipping, loss scaling, accumulation and ranks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._core.reduce import accumulation_dtype, sum_all
from modaldummy._core.term import product_without_underflow, scalar_loss, term_input
from modaldummy._engines import local_shard
from modaldummy._findings import Finding
from modaldummy._group import num_ranks
from modaldummy._preflight.setup import Setup, has_values

_LARGE_SCALE = 1e-3


def check_scale(setup: Setup) -> Iterator[Finding]:
    """MD131 to MD137."""
    if setup.scale == 0:
        yield Finding(
            "MD131",
            "info",
            "With scale=0.0, gradients of inactive parameters are exactly zero, and charts of "
            "gradient norms show 0 for them.",
            {"scale": 0.0},
            "Nothing to do. Use a positive scale to see in a chart that they are connected.",
        )
    if setup.scale:
        yield from _check_scale_not_large(setup.scale)
        yield from _check_dtypes_represent_scale(setup, setup.scale)
        yield from _check_max_fraction(setup, setup.scale)
        yield from _check_max_norm(setup, setup.scale)
        yield from _check_loss_factor(setup, setup.scale)
        yield from _check_average_over_ranks(setup, setup.scale)


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


def _check_max_fraction(setup: Setup, scale: float) -> Iterator[Finding]:
    max_fraction = setup.wrapper.max_fraction
    if max_fraction is None or not setup.wrapper.reads_parameters:
        return
    loss, source = _loss_size(setup)
    fractions = {name: size / loss for name, size in _dummy_sizes(setup, scale).items()}
    worst = max(fractions, key=fractions.__getitem__)
    if fractions[worst] > max_fraction:
        yield Finding(
            "MD134",
            "info",
            f"In a batch of {worst} alone, the dummy term would be {fractions[worst]:.2g} of the "
            f"loss and is capped to {max_fraction:.2g} of it.",
            {
                "active": worst,
                "fraction": fractions[worst],
                "max_fraction": max_fraction,
                "loss": loss,
                "loss_from": source,
            },
            "Nothing to do. The cap changes the value of the loss, but not the dummy gradients.",
        )


def _dummy_sizes(setup: Setup, scale: float) -> dict[str, float]:
    """Absolute value of the dummy term before the cap, for a batch of each modality alone."""
    values = _dummy_values(setup, scale)
    sizes: dict[str, float] = {}
    for name in setup.wrapper.modalities:
        active_keys = set(setup.wrapper.parameters.active_keys([name]))
        size = abs(sum(value for keys, value in values.items() if active_keys.isdisjoint(keys)))
        # The dummy term, too, leaves out a sum that is not finite.
        sizes[name] = size if math.isfinite(size) else 0.0
    return sizes


def _dummy_values(setup: Setup, scale: float) -> dict[tuple[ModalityKey, ...], float]:
    """`scale * sum` of the parameters of each set of owners; those are inactive together."""
    tensors: dict[tuple[ModalityKey, ...], list[Tensor]] = {}
    for parameter_id, owned in setup.modality_parameters.items():
        if has_values(owned.parameter):
            tensors.setdefault(tuple(setup.owners[parameter_id]), []).append(term_input(owned))
    if not tensors:
        return {}
    dtype = accumulation_dtype(setup.dtypes)
    device = next(iter(tensors.values()))[0].device
    sums = torch.stack([sum_all(group, dtype=dtype, device=device) for group in tensors.values()])
    return dict(zip(tensors, (sums * scale).tolist(), strict=True))


def _loss_size(setup: Setup) -> tuple[float, str]:
    """Absolute value of a loss that is finite and not 0, and the source of that loss."""
    losses: dict[str, Tensor] = {}
    if setup.loss is not None:
        losses["loss"] = scalar_loss(setup.loss, accumulation_dtype([setup.loss.dtype]))
    if setup.wrapper.last is not None:
        losses["wrapper.last"] = setup.wrapper.last.real
    for source, loss in losses.items():
        size = math.nan if loss.is_meta else abs(loss.item())
        if 0 < size < math.inf:
            return size, source
    return 1.0, "assumed"


def _check_max_norm(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.max_norm is None:
        return
    total_norm, source = _total_norm(setup)
    zeroed = []
    for name, gradient in _dummy_gradients(setup, scale, 1 / setup.accumulation_steps).items():
        parameter = nn.Parameter(torch.zeros(1, dtype=gradient.dtype))
        parameter.grad = gradient.expand(1).clone()
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
    gradients = [local_shard(p.grad) for p in setup.parameters if p.grad is not None]
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        # In a wide dtype: squares of float16 gradients overflow.
        norms = [vector_norm(g.abs(), dtype=accumulation_dtype([g.dtype])).item() for g in dense]
        total_norm = math.hypot(*norms)
        if 0 < total_norm < math.inf:
            return total_norm, "gradients"
    return 1.0, "assumed"


def _check_loss_factor(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.loss_factor is None:
        return
    gradients = _dummy_gradients(setup, scale, setup.loss_factor)
    infinite = [name for name, gradient in gradients.items() if gradient.isinf()]
    if infinite:
        yield Finding(
            "MD136",
            "error",
            "The loss scaler skips each step with this factor, because the factor makes dummy "
            f"gradients in {', '.join(infinite)} infinite.",
            {"dtypes": infinite, "scale": scale, "factor": setup.loss_factor},
            "Use a smaller scale, or start the scaler with a smaller factor.",
        )


def _check_average_over_ranks(setup: Setup, scale: float) -> Iterator[Finding]:
    ranks, steps = _num_ranks(setup), setup.accumulation_steps
    gradients = _dummy_gradients(setup, scale, (setup.loss_factor or 1.0) / steps)
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


def _num_ranks(setup: Setup) -> int:
    if setup.ddps:
        return int(setup.ddps[0].process_group.size())
    return num_ranks(None)


def _dummy_gradients(setup: Setup, scale: float, upstream: float) -> dict[str, Tensor]:
    """The dummy gradient of one element in each dtype of the modality parameters, by dtype."""
    return {
        str(dtype).removeprefix("torch."): product_without_underflow(
            torch.tensor(upstream), scale, dtype
        )
        for dtype in setup.dtypes
    }
