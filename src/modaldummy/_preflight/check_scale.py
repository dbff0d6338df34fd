"""Checks of the scale against dtypes, clipping, loss scaling, accumulation and ranks."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._core.reduce import accumulation_dtype, norms, sum_all
from modaldummy._core.term import connected_tensor, nonzero_product, scalar_loss
from modaldummy._engines import local_shard
from modaldummy._findings import Finding
from modaldummy._preflight.setup import Setup, has_values

_LARGE = 1e-3


def check_scale(setup: Setup) -> Iterator[Finding]:
    """MD131 to MD137."""
    if setup.scale == 0:
        yield Finding(
            "MD131",
            "info",
            "With scale=0.0 gradients of inactive parameters are exact zeros, and charts of "
            "gradient norms show 0 for them.",
            {"scale": 0.0},
            "Nothing to do; a positive scale shows that they are connected.",
        )
    if setup.scale:
        yield from _large(setup, setup.scale)
        yield from _raised(setup, setup.scale)
        yield from _capped(setup, setup.scale)
        yield from _clipped_away(setup, setup.scale)
        yield from _overflowing(setup, setup.scale)
        yield from _averaged_away(setup, setup.scale)


def _large(setup: Setup, scale: float) -> Iterator[Finding]:
    if scale >= _LARGE:
        yield Finding(
            "MD132",
            "warning",
            "A dummy gradient of this scale is as large as real gradients are, and moves what no "
            "batch has taught.",
            {"scale": scale, "limit": _LARGE},
            "Use the default, 1e-7.",
        )


def _raised(setup: Setup, scale: float) -> Iterator[Finding]:
    # A number that is too small for any dtype comes back as the smallest that is handed out.
    floors = {
        name: float(_gradient(math.ulp(0.0), 1.0, dtype).abs()) for name, dtype in _names(setup)
    }
    raised = {name: floor for name, floor in floors.items() if scale < floor}
    if raised:
        yield Finding(
            "MD133",
            "warning",
            f"The scale is below what {', '.join(raised)} can hold, so that parameters of that "
            "dtype get the smallest gradient there is instead.",
            {"scale": scale, "gradients": raised},
            "Use the default, 1e-7, which every dtype can hold, or 0.0 for no gradient at all.",
        )


def _capped(setup: Setup, scale: float) -> Iterator[Finding]:
    bound = setup.wrapper.max_fraction
    if bound is None or not setup.reads:
        return
    loss, source = _loss_size(setup)
    fractions = {name: size / loss for name, size in _alone(setup, scale).items()}
    worst = max(fractions, key=fractions.__getitem__)
    if fractions[worst] > bound:
        yield Finding(
            "MD134",
            "info",
            f"In a batch of {worst} alone the dummy would be {fractions[worst]:.2g} of the loss, "
            f"so that it is capped to {bound:.2g} of it.",
            {
                "active": worst,
                "fraction": fractions[worst],
                "max_fraction": bound,
                "loss": loss,
                "loss_from": source,
            },
            "Nothing to do: the cap is on the value alone, and the gradient does not see it.",
        )


def _alone(setup: Setup, scale: float) -> dict[str, float]:
    """Size of the dummy in a batch of one modality, before the cap."""
    sums = _sums(setup, scale)
    found: dict[str, float] = {}
    for name in setup.wrapper.modalities:
        present = set(setup.wrapper.parameters.active_keys([name]))
        size = abs(sum(sums[keys] for keys in sums if present.isdisjoint(keys)))
        found[name] = size if math.isfinite(size) else 0.0  # as the dummy term has it
    return found


def _sums(setup: Setup, scale: float) -> dict[tuple[ModalityKey, ...], float]:
    """The dummy of the parameters that the same keys own, which are inactive together."""
    together: dict[tuple[ModalityKey, ...], list[Tensor]] = {}
    for identity, located in setup.towers.items():
        if has_values(located[1]):
            together.setdefault(setup.owners[identity], []).append(connected_tensor(located))
    if not together:
        return {}
    dtype = accumulation_dtype(setup.dtypes)
    device = next(iter(together.values()))[0].device
    sums = torch.stack([sum_all(own, dtype=dtype, device=device) for own in together.values()])
    return dict(zip(together, (sums * scale).tolist(), strict=True))


def _loss_size(setup: Setup) -> tuple[float, str]:
    """A finite size of the loss that is not 0, and where it comes from."""
    known: dict[str, Tensor] = {}
    if setup.loss is not None:
        known["loss"] = scalar_loss(setup.loss, accumulation_dtype([setup.loss.dtype]))
    if setup.wrapper.last is not None:
        known["wrapper.last"] = setup.wrapper.last.real
    for source, value in known.items():
        size = math.nan if value.is_meta else abs(value.item())
        if 0 < size < math.inf:
            return size, source
    return 1.0, "assumed"


def _clipped_away(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.max_norm is None:
        return
    total, source = _total_norm(setup)
    lost = []
    for name, dtype in _names(setup):
        parameter = nn.Parameter(torch.zeros(1, dtype=dtype))
        gradient = _gradient(scale, 1 / setup.accumulation_steps, dtype)
        parameter.grad = gradient.expand(1).clone()
        clip_grads_with_norm_(parameter, setup.max_norm, torch.tensor(total))
        lost += [] if parameter.grad.any() else [name]
    if lost:
        yield Finding(
            "MD135",
            "warning",
            f"Clipping to this norm rounds dummy gradients to zero in {', '.join(lost)}.",
            {
                "dtypes": lost,
                "max_norm": setup.max_norm,
                "total_norm": total,
                "total_norm_from": source,
            },
            "Keep trainable weights in torch.float32 or torch.bfloat16, clip to a larger norm, or "
            "use a larger scale.",
        )


def _total_norm(setup: Setup) -> tuple[float, str]:
    """The norm of all gradients that are there, on this rank, and where it comes from."""
    present = [local_shard(p.grad) for _, p in setup.named.values() if p.grad is not None]
    dense = [gradient for gradient in present if gradient.layout is torch.strided]
    if dense:
        total = norms(dense, device=dense[0].device).norm().item()
        if 0 < total < math.inf:
            return total, "gradients"
    return 1.0, "assumed"


def _overflowing(setup: Setup, scale: float) -> Iterator[Finding]:
    if setup.factor is None:
        return
    gradients = {name: _gradient(scale, setup.factor, dtype) for name, dtype in _names(setup)}
    broken = [name for name, gradient in gradients.items() if gradient.isinf()]
    if broken:
        yield Finding(
            "MD136",
            "error",
            "Multiplied by the loss scaler's factor, dummy gradients are infinite in "
            f"{', '.join(broken)}, so that each step with this factor is skipped.",
            {"dtypes": broken, "scale": scale, "factor": setup.factor},
            "Use a smaller scale, or start the scaler with a smaller factor.",
        )


def _averaged_away(setup: Setup, scale: float) -> Iterator[Finding]:
    ranks = _world_size(setup)
    upstream = (setup.factor or 1.0) / setup.accumulation_steps
    gradients = {name: _gradient(scale, upstream, dtype) for name, dtype in _names(setup)}
    # DDP multiplies by the inverse, in the dtype of the gradient.
    lost = [name for name, gradient in gradients.items() if not gradient * (1 / ranks)]
    if lost:
        steps = setup.accumulation_steps
        late = {name: float(gradients[name] * steps * (1 / ranks)) * ranks for name in lost}
        yield Finding(
            "MD137",
            "warning",
            f"The average over {ranks} ranks rounds dummy gradients of a loss that is divided by "
            f"{steps} to zero in {', '.join(lost)}.",
            {
                "dtypes": lost,
                "ranks": ranks,
                "accumulation_steps": steps,
                "if_reduced_once": late,
            },
            "Keep trainable weights in torch.float32 or torch.bfloat16, or use a larger scale; "
            "where `if_reduced_once` is not 0, `no_sync()` up to the last micro-batch will do.",
        )


def _world_size(setup: Setup) -> int:
    if setup.ddps:
        return int(setup.ddps[0].process_group.size())
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _names(setup: Setup) -> Iterator[tuple[str, torch.dtype]]:
    for dtype in setup.dtypes:
        yield str(dtype).removeprefix("torch."), dtype


def _gradient(scale: float, upstream: float, dtype: torch.dtype) -> Tensor:
    """A dummy gradient as a parameter of the dtype gets it."""
    return nonzero_product(torch.tensor(upstream), scale, dtype)
