"""A hold under ZeRO leaves values and optimizer state of untrained parameters bit for bit."""

import copy
import random
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, hold_inactive, shadow_inactive
from modaldummy._engines import zero_flat_parameters, zero_stage
from tests.distributed.oracle import MAP, NAMES, Active, batch_of, loss_of
from tests.fleet import Fleet
from tests.zero_engine import zero_snapshot

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

from tests.distributed.deepspeed_engines import BF16, OFFLOADED, Narrow, deepspeed_on_cpus

FLEET = "DeepSpeed"


class Variant(NamedTuple):
    """How an engine is set up.

    Attributes:
        config: More of its configuration.
        options: Of its `zero_optimization`.
        has_groups: Whether each tower is a parameter group.
        optimizer: Makes the optimizer.
    """

    config: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    has_groups: bool = False
    optimizer: Callable[..., Any] = torch.optim.AdamW


THRICE = {"gradient_accumulation_steps": 3}
# Its first steps overflow, and the engine skips them.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}
VARIANTS: dict[str, Variant] = {
    "float32": Variant(),
    "groups": Variant(has_groups=True),
    "bfloat16, clipping": Variant(BF16 | {"gradient_clipping": 0.1}),
    "float16, skipped steps": Variant(FP16),
    "accumulation, groups": Variant(THRICE, has_groups=True),
    "offload": Variant(options=OFFLOADED),
    "SGD with momentum": Variant(
        optimizer=lambda groups, lr, weight_decay: torch.optim.SGD(
            groups, lr, 0.9, weight_decay=weight_decay
        )
    ),
}
CELLS = {f"ZeRO-{stage}, {name}": (stage, name) for stage in (1, 2, 3) for name in VARIANTS} | {
    "ZeRO-2, round robin": (2, "round robin"),
    "ZeRO-3, sub-groups": (3, "sub-groups"),
}
VARIANTS |= {
    "round robin": Variant(options={"round_robin_gradients": True}),
    "sub-groups": Variant(options={"sub_group_size": 20}),
}
CORE = {"ZeRO-1, groups", "ZeRO-2, float32", "ZeRO-3, float32"}


def make(stage: int, variant: Variant) -> Any:
    deepspeed = deepspeed_on_cpus()
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    bare = Narrow()
    parts: list[nn.Module] = [*bare.towers.values(), bare.fusion, bare.trunk]
    groups = [{"params": list(part.parameters())} for part in parts]
    parameters: Any = groups if variant.has_groups else bare.parameters()
    options = {"stage": stage, "stage3_param_persistence_threshold": 0, **variant.options}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": options,
    }
    optimizer = variant.optimizer(parameters, lr=0.1, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(
        model=bare, optimizer=optimizer, config=config | dict(variant.config)
    )
    return engine


def module_tensors(engine: Any) -> dict[str, Tensor]:
    """What this rank has of the parameters of the module."""
    is_sharded = zero_stage(engine) == 3
    named = engine.module.named_parameters()
    return {name: (p.ds_tensor if is_sharded else p).detach() for name, p in named}


def snapshot(engine: Any) -> dict[tuple[str, str], Tensor]:
    """Values, master copies and optimizer state of each parameter on this rank."""
    values = {(name, "module"): t.clone() for name, t in module_tensors(engine).items()}
    return values | zero_snapshot(engine)


def copy_state(source: Any, target: Any) -> None:
    """Give an engine all that another one has."""
    states = [engine.optimizer.optimizer.state for engine in (source, target)]
    pairs = zip(zero_flat_parameters(source), zero_flat_parameters(target), strict=True)
    for old, new in pairs:
        new.flat.detach().copy_(old.flat.detach())
        states[1][new.flat] = copy.deepcopy(states[0][old.flat])
    for name, tensor in module_tensors(target).items():
        tensor.copy_(module_tensors(source)[name])


def is_trained(name: str, actives: list[Active]) -> bool:
    """Whether one of the ranks has trained a parameter in one of its micro-batches."""
    owners = [key for key, path in MAP.items() if name.startswith(f"{path}.")]
    if not owners:
        return True
    key = {owners[0]} if isinstance(owners[0], str) else set(owners[0])
    return any(key <= set(active) for active in actives)


def steps_with_a_hold(rank: int, stage: int, name: str) -> tuple[list[str], int, int]:
    """What is wrong, in how many cases a step without a hold moves what is held, and skipped steps.

    A second engine without a hold starts each step from the same state.
    """
    variant = VARIANTS[name]
    held, free = make(stage, variant), make(stage, variant)
    wrappers = [DummyLossWrapper(engine, MAP) for engine in (held, free)]
    for wrapper, engine in zip(wrappers, (held, free), strict=True):
        shadow_inactive(wrapper, engine, examples=[(batch_of(NAMES, 99),)])
    hold_inactive(wrappers[0], held)
    num_micros = held.gradient_accumulation_steps()
    choices, wrong, num_moved = random.Random(1), [], 0
    for step in range(20):
        copy_state(held, free)
        before = snapshot(held)
        actives: list[Active] = []
        for micro in range(num_micros):
            ranks = [tuple(n for n in NAMES if choices.random() < 0.3) for _ in range(2)]
            actives += ranks
            for wrapper, engine in zip(wrappers, (held, free), strict=True):
                real = loss_of(engine(batch_of(ranks[rank], step, micro, rank)))
                engine.backward(wrapper.total(real, ranks[rank]))
                engine.step()
        after, without = snapshot(held), snapshot(free)
        for key, new in after.items():
            if is_trained(key[0], actives):
                wrong += [] if torch.equal(new, without[key]) else [f"step {step}: {key} differs"]
                continue
            old = before.get(key, torch.zeros_like(new))  # state that this step has made
            wrong += [] if torch.equal(old, new) else [f"step {step}: {key} moved"]
            num_moved += not torch.equal(old, without[key])
    return wrong, num_moved, held.skipped_steps


def resumed(rank: int, stage: int, folder: str) -> list[str]:
    """What differs after 20 steps between a training that went on and one that was resumed."""
    first, second = make(stage, Variant()), make(stage, Variant())
    wrapper = wrapper_with_hold(first)
    train(first, wrapper, range(10), rank)
    first.save_checkpoint(folder)
    train(first, wrapper, range(10, 20), rank)
    second.load_checkpoint(folder)
    train(second, wrapper_with_hold(second), range(10, 20), rank)
    expected, found = snapshot(first), snapshot(second)
    assert expected.keys() == found.keys()
    return [str(key) for key in expected if not torch.equal(found[key], expected[key])]


def wrapper_with_hold(engine: Any) -> DummyLossWrapper:
    """A wrapper with a shadow, which holds the engine."""
    wrapper = DummyLossWrapper(engine, MAP)
    shadow_inactive(wrapper, engine, examples=[(batch_of(NAMES, 99),)])
    hold_inactive(wrapper, engine)
    return wrapper


def train(engine: Any, wrapper: DummyLossWrapper, steps: range, rank: int) -> None:
    """Steps on random batches."""
    for step in steps:
        choices = random.Random(step)
        ranks = [tuple(n for n in NAMES if choices.random() < 0.3) for _ in range(2)]
        real = loss_of(engine(batch_of(ranks[rank], step, rank)))
        engine.backward(wrapper.total(real, ranks[rank]))
        engine.step()


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_training_goes_on_as_before(two: Fleet, stage: int, tmp_path: Path) -> None:
    for different in two.ask(resumed, stage, str(tmp_path)):
        assert different == []


@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        pytest.param(*cell, id=name, marks=[pytest.mark.long] * (name not in CORE))
        for name, cell in CELLS.items()
    ],
)
def test_what_no_rank_has_trained_stays_bit_for_bit(two: Fleet, stage: int, variant: str) -> None:
    answers = two.ask(steps_with_a_hold, stage, variant)
    for wrong, _, num_skipped in answers:
        assert wrong == []
        assert (num_skipped > 0) == ("skipped" in variant)
    assert sum(num_moved for _, num_moved, _ in answers) > 20
