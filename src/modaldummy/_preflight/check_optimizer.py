"""Checks of the parameters that optimizers have, and of the steps that dummy gradients cause."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._engines import (
    is_fsdp2_unit,
    is_sharded,
    is_zero_parameter,
    zero_flat_parameters,
    zero_optimizer,
)
from modaldummy._errors import UnsupportedEngineError
from modaldummy._findings import Finding
from modaldummy._hold import is_held
from modaldummy._hold.zero_holder import check_engine
from modaldummy._optimizers import (
    optimizers_inside,
    parameter_ids_of,
    parameters_of,
    why_not_held,
)
from modaldummy._preflight.drift import expected_drift, expected_zero_drift
from modaldummy._preflight.setup import Setup

# A smaller drift, in learning rates per step, is no finding.
_MIN_DRIFT_RATE = 0.01
# RAdam moves nothing in its first steps, so 10 steps would not show its drift. 20 steps of AdamW
# take half a second on a CPU for the 12 blocks of a ViT-B.
_NUM_STEPS = 20
_HOLD = (
    "Call `hold_inactive(wrapper, optimizer)` once, or pass `hold=True` to the mixin for Hugging "
    "Face's Trainer or the callback for Lightning. Under DeepSpeed's ZeRO call "
    "`hold_inactive(wrapper, engine)`."
)
_HOLD_ENGINE = (
    "Call `hold_inactive(wrapper, engine)` once. Best give each modality a parameter group of its "
    "own before: a hold then also holds the step counters, and copies nothing."
)

_Drifts = Mapping[ModalityKey, float]


def check_optimizers(setup: Setup) -> Iterator[Finding]:
    """MD112 and MD143, which need an optimizer, and MD141, MD142 and MD144."""
    for engine in setup.zero_engines:
        yield from _check_zero(setup, engine)
    if setup.optimizers is None:
        return
    if any(_has_shards_of_gathered(setup, optimizer) for optimizer in setup.optimizers):
        yield Finding(
            "MD142",
            "info",
            "Preflight cannot check the optimizers now, because they have the shards of parameters "
            "that FSDP has gathered, as it does between forward and backward.",
            {"optimizers": [type(optimizer).__name__ for optimizer in setup.optimizers]},
            "Call `preflight` again, without `loss`, before the first forward pass.",
        )
        return
    yield from _check_all_optimized(setup, setup.optimizers)
    for optimizer in setup.optimizers:
        yield from _check_drift(setup, optimizer)
        yield from _check_scaler_gets_gradients(setup, optimizer)


def _has_shards_of_gathered(setup: Setup, optimizer: Optimizer) -> bool:
    """Whether an optimizer has shards of parameters that FSDP has gathered in the model."""
    if any(not parameter.is_leaf for parameter in setup.names):  # FSDP1 makes views of a flat one.
        return True
    units = filter(is_fsdp2_unit, setup.modules)
    parameters = (parameter for unit in units for parameter in unit.parameters())
    return any(not is_sharded(parameter) for parameter in parameters) and any(
        is_sharded(parameter) and parameter not in setup.names
        for parameter in parameters_of(optimizer)
    )


def _check_all_optimized(setup: Setup, optimizers: tuple[Optimizer, ...]) -> Iterator[Finding]:
    optimized = {p for optimizer in optimizers for p in parameters_of(optimizer)}
    trainable = [p for p in setup.names if p.requires_grad and not is_zero_parameter(p)]
    names = [setup.names[parameter] for parameter in trainable if parameter not in optimized]
    if names:
        yield Finding(
            "MD112",
            "warning",
            f"No optimizer has {len(names)} of {len(trainable)} trainable parameters, so these "
            "never change.",
            {"parameters": names, "trainable": len(trainable)},
            "Pass all optimizers. Make them after you shard or move the model, which can replace "
            "its parameters. Freeze parameters that should not be trained.",
        )


def _check_drift(setup: Setup, optimizer: Optimizer) -> Iterator[Finding]:
    nested = _nested_optimizers(optimizer)
    if setup.modality_parameters.keys().isdisjoint(parameter_ids_of(optimizer)) or any(
        is_held(setup.wrapper, each) for each in nested
    ):
        return
    inner = nested[-1]
    yield from _drift_findings(
        type(optimizer).__name__,
        lambda: expected_drift(setup.wrapper, inner, _NUM_STEPS),
        lambda: why_not_held(inner, setup.wrapper.parameters.all()),
        _HOLD,
    )


def _check_zero(setup: Setup, engine: Any) -> Iterator[Finding]:
    """MD141 and MD142 without a hold of the engine, MD144 with one."""
    if is_held(setup.wrapper, engine):
        yield from _check_shared_groups(setup, engine)
    elif (inner := zero_optimizer(engine)) is not None:
        yield from _drift_findings(
            type(inner).__name__,
            lambda: expected_zero_drift(setup.wrapper, engine, _NUM_STEPS),
            lambda: _why_engine_not_held(setup, engine),
            _HOLD_ENGINE,
        )


def _why_engine_not_held(setup: Setup, engine: Any) -> str | None:
    try:
        check_engine(setup.wrapper, engine)
    except UnsupportedEngineError as error:
        return str(error)
    return None


def _check_shared_groups(setup: Setup, engine: Any) -> Iterator[Finding]:
    shared = set()
    for flat in zero_flat_parameters(engine):
        owners = {tuple(setup.owners.get(id(parameter), ())) for parameter in flat.parameters}
        if len(owners) > 1:
            shared |= {key for keys in owners for key in keys}
    if shared:
        names = [text_of(key) for key in setup.wrapper.parameters.paths if key in shared]
        yield Finding(
            "MD144",
            "info",
            "The hold keeps the values and the optimizer state of these modalities, but their step "
            "counters go on and each step copies what it holds, because they share parameter "
            "groups with others.",
            {"modalities": names},
            "Give each modality a parameter group of its own, so that its step counter is held "
            "too. With a counter that went on, the first Adam step of a modality that comes late "
            "is up to 3.2 learning rates long, with its default betas.",
        )


def _drift_findings(
    name: str,
    measure: Callable[[], _Drifts],
    why_not: Callable[[], str | None],
    remedy: str,
) -> Iterator[Finding]:
    """MD141, or MD142 if a trial fails.

    Args:
        name: Of the optimizer.
        measure: Returns how far it moves each key.
        why_not: Returns why the optimizer cannot be held; None if it can.
        remedy: What to do if it can.
    """
    try:
        drifts, reason = measure(), why_not()
    except Exception as error:
        yield Finding(
            "MD142",
            "info",
            f"Preflight cannot tell whether {name} moves inactive parameters: a trial failed.",
            {"optimizer": name, "error": f"{type(error).__name__}: {error}"},
            "Compare a modality before and after steps without it. `hold_inactive` keeps it "
            "unchanged if the optimizer skips parameters without a gradient.",
        )
        return
    rates = {text_of(key): rate for key, rate in drifts.items() if rate >= _MIN_DRIFT_RATE}
    if rates:
        yield Finding(
            "MD141",
            "warning",
            f"{name} moves parameters of inactive modalities by up to {max(rates.values()):.2g} "
            "learning rates at each step.",
            {
                "optimizer": name,
                "rates": rates,
                "limit": _MIN_DRIFT_RATE,
                "steps": _NUM_STEPS,
            },
            remedy if reason is None else f"`hold_inactive` refuses this optimizer: {reason}",
        )


def _nested_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, the single one that it wraps, the single one that this wraps, and so on."""
    wrapped = optimizers_inside(optimizer)
    return [optimizer, *(_nested_optimizers(wrapped[0]) if len(wrapped) == 1 else [])]


def _check_scaler_gets_gradients(setup: Setup, optimizer: Optimizer) -> Iterator[Finding]:
    has_grad_scaler = isinstance(setup.scaler, GradScaler) and setup.scaler.is_enabled()
    # DDP leaves zeros where backward gives no gradient.
    if setup.wrapper.scale is not None or not has_grad_scaler or setup.ddps:
        return
    ids = {id(p) for p in parameters_of(optimizer) if p.requires_grad and p in setup.names}
    used = {key for i in ids for key in setup.owners.get(i, ())}
    modalities = setup.wrapper.modalities
    without_gradient = [[m] for m in modalities if m not in used and (m,) not in used]
    without_gradient += [[]] if setup.trunk_parameters else []
    if ids and without_gradient and ids <= setup.modality_parameters.keys():
        yield Finding(
            "MD143",
            "error",
            "With scale=None, GradScaler stops with 'No inf checks were recorded' at a batch that "
            f"leaves all parameters of {type(optimizer).__name__} inactive.",
            {"optimizer": type(optimizer).__name__, "active": without_gradient[0], "scale": None},
            "Use scale=0.0, or one optimizer for all parameters.",
        )
