"""Checks of what optimizers have, and of what they would make of dummy gradients."""

import math
from collections.abc import Iterator

from torch.optim import Optimizer

from modaldummy._core.parameter_map import text_of
from modaldummy._engines import is_sharded, is_zero_parameter
from modaldummy._findings import Finding
from modaldummy._hold import is_held
from modaldummy._preflight.drift import expected_drift
from modaldummy._preflight.setup import Setup

# Displacement per step, in learning rates, from which on it counts.
_RATE = 0.01
# How many steps are tried. RAdam needs more than 10 to show; 20 of AdamW take half a second for the
# 12 blocks of a ViT-B on a CPU.
_STEPS = 20


def check_optimizers(setup: Setup) -> Iterator[Finding]:
    """MD112, MD141 to MD143; silent without an optimizer."""
    if setup.optimizers is None:
        return
    if any(_is_of_shards(setup, optimizer) for optimizer in setup.optimizers):
        yield Finding(
            "MD142",
            "info",
            "FSDP2 has parameters of the model gathered, as between forward and backward, so that "
            "nothing can be told about the optimizers, which have the shards.",
            {"optimizers": [type(optimizer).__name__ for optimizer in setup.optimizers]},
            "Call `preflight` once more, without `loss`, before the first forward pass.",
        )
        return
    yield from _left_out(setup, setup.optimizers)
    for optimizer in setup.optimizers:
        yield from _drifting(setup, optimizer)
        yield from _without_gradients(setup, optimizer)


def _is_of_shards(setup: Setup, optimizer: Optimizer) -> bool:
    """Whether it has shards of parameters that the model has gathered."""
    gathered = any(not is_sharded(p) for module in setup.sharding for p in module.parameters())
    return gathered and any(
        is_sharded(parameter) and id(parameter) not in setup.named
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _left_out(setup: Setup, optimizers: tuple[Optimizer, ...]) -> Iterator[Finding]:
    known = {identity for optimizer in optimizers for identity in _identities(optimizer)}
    trainable = {
        identity: name
        for identity, (name, parameter) in setup.named.items()
        if parameter.requires_grad and not is_zero_parameter(parameter)
    }
    missing = [name for identity, name in trainable.items() if identity not in known]
    if missing:
        yield Finding(
            "MD112",
            "warning",
            f"No optimizer has {len(missing)} of {len(trainable)} trainable parameters, so that "
            "these never change.",
            {"parameters": missing, "trainable": len(trainable)},
            "Pass all optimizers; make them after the model was sharded or moved, which may put "
            "other parameters in the place of those that they have; or freeze the parameters.",
        )


def _drifting(setup: Setup, optimizer: Optimizer) -> Iterator[Finding]:
    chain = _chain(optimizer)
    if setup.towers.keys().isdisjoint(_identities(optimizer)) or any(
        is_held(setup.wrapper, link) for link in chain
    ):
        return
    name = type(optimizer).__name__
    try:
        drifts = expected_drift(setup.wrapper, chain[-1], steps=_STEPS)
    except Exception as error:
        yield Finding(
            "MD142",
            "info",
            f"What {name} makes of dummy gradients cannot be told.",
            {"optimizer": name, "error": f"{type(error).__name__}: {error}"},
            "Compare a modality before and after steps without it; `hold_inactive` keeps it still "
            "with any optimizer that skips parameters without a gradient.",
        )
        return
    moving = {text_of(key): drift for key, drift in drifts.items() if drift.rates >= _RATE}
    if moving:
        worst = max(drift.rates for drift in moving.values())
        yield Finding(
            "MD141",
            "warning",
            f"{name} moves modalities that no batch has taught, by up to {worst:.2g} learning "
            "rates at each step.",
            {
                "optimizer": name,
                "rates": {key: drift.rates for key, drift in moving.items()},
                # JSON knows no infinity.
                "relative": {
                    key: drift.relative if math.isfinite(drift.relative) else None
                    for key, drift in moving.items()
                },
                "limit": _RATE,
                "steps": _STEPS,
            },
            "Call `hold_inactive(wrapper, optimizer)` once, or pass `hold=True` to the mixin for "
            "Hugging Face's Trainer or the callback for Lightning.",
        )


def _chain(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, and the one that it steps, if it is around a single one; and so on."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return [optimizer, *(_chain(inner[0]) if len(inner) == 1 else [])]


def _identities(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _without_gradients(setup: Setup, optimizer: Optimizer) -> Iterator[Finding]:
    # Where parameters got None, DDP leaves zeros.
    if setup.scale is not None or not setup.grad_scaler or setup.ddps:
        return
    trainable = {
        i for i in _identities(optimizer) if i in setup.named and setup.named[i][1].requires_grad
    }
    batches = [[name] for name in setup.wrapper.modalities] + ([[]] if setup.trunk else [])
    empty = [active for active in batches if trainable <= setup.inactive(active)]
    if trainable and empty:
        yield Finding(
            "MD143",
            "error",
            f"With scale=None all parameters of {type(optimizer).__name__} can be without a "
            "gradient, and GradScaler then stops with 'No inf checks were recorded'.",
            {"optimizer": type(optimizer).__name__, "active": empty[0], "scale": None},
            "Use scale=0.0, or one optimizer for all parameters.",
        )
