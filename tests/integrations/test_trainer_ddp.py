"""On two ranks with different modalities the Trainer gets the gradients of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fleet import Fleet
from tests.integrations.trainer_ranks import refused, told, trained
from tests.integrations.trainers import (
    MODELS,
    SCALE,
    Recorder,
    arguments,
    mixed,
    owner_of,
    values_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = {"activation_checkpointing": True}
REENTRANT = CHECKPOINT | {"activation_checkpointing_kwargs": {"use_reentrant": True}}
# Model, arguments of the run, options of the mixin, and whether DDP looks for unused parameters.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "a language model": ("reader", {}, {}, True),
    "accumulation": ("scanner", {"gradient_accumulation_steps": 2}, {}, True),
    "num_items, accumulation": ("reader", {"gradient_accumulation_steps": 2}, {}, True),
    "nothing is looked for": ("reader", {"ddp_find_unused_parameters": False}, {}, False),
    "a static graph": (
        "scanner",
        {"ddp_static_graph": True, "ddp_find_unused_parameters": False},
        {},
        False,
    ),
    "checkpointing": ("reader", CHECKPOINT, {}, False),
    "reentrant checkpointing": ("reader", REENTRANT, {}, False),
    "checkpointing, unused are looked for": (
        "reader",
        CHECKPOINT | {"ddp_find_unused_parameters": True},
        {},
        True,
    ),
    "bfloat16": ("reader", {"bf16": True}, {}, True),
    "a scale of 0.0": ("scanner", {}, {"scale": 0.0}, True),
    "of None": ("scanner", {"ddp_find_unused_parameters": False}, {"scale": None}, False),
}


def check(
    two: Fleet, folder: Path, name: str, args: dict[str, Any], options: dict[str, Any], finds: bool
) -> None:
    """Each step against one process that accumulates what both ranks had."""
    accumulated = 2 * args.get("gradient_accumulation_steps", 1)
    model, seen = MODELS[name](), Recorder()
    alone = {k: v for k, v in args.items() if not k.startswith("ddp_")}
    alone |= {"learning_rate": 0.0, "gradient_accumulation_steps": accumulated}
    mixed(model, arguments(folder, **alone), callbacks=[seen]).train()
    # A matter of rounding: of bfloat16, ranks and accumulation add up in another order.
    tolerance = 1e-2 if args.get("bf16") else 1e-5
    answers = two.ask(trained, name, args | {"learning_rate": 0.0}, options)
    scale = options.get("scale", SCALE)
    for steps, _, _, flags in answers:
        assert flags == ("DistributedDataParallel", finds)
        assert len(steps) == len(seen.steps)
        for step, expected in zip(steps, seen.steps, strict=True):
            for key, gradient in step.items():
                right = expected[key]
                assert gradient is not None, key
                assert right is not None
                idle = owner_of(key) is not None and right.abs().max() < 2e-7
                if idle:
                    torch.testing.assert_close(
                        gradient, torch.full_like(gradient, scale or 0.0), rtol=1e-5, atol=0
                    )
                else:
                    room = tolerance * float(right.abs().max())
                    torch.testing.assert_close(gradient, right, rtol=0, atol=room)


def test_the_trainer_looks_for_unused_parameters_and_trains(two: Fleet, tmp_path: Path) -> None:
    """As it is: the gradients are averages, the ranks end alike, and where one process does."""
    check(two, tmp_path, "scanner", {}, {}, finds=True)
    args = {"optim": "adamw_torch", "weight_decay": 0.1, "num_train_epochs": 2}
    answers = two.ask(trained, "scanner", args, {"hold": True})
    (_, first, rows, _), (_, second, _, _) = answers
    model = MODELS["scanner"]()
    alone = arguments(tmp_path, **args, gradient_accumulation_steps=2)
    mixed(model, alone, hold=True).train()
    expected = values_of(model)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert [row["grad_ranks"] for row in rows] == [2] * 10
    assert all("grad_norm/dMRI" in row for row in rows)
    # What is inactive on all ranks is at the first steps as it was made.
    assert rows[0]["modaldummy/active/dMRI"] == 0


@pytest.mark.long
@pytest.mark.parametrize(("name", "args", "options", "finds"), CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_one_process(
    name: str,
    args: dict[str, Any],
    options: dict[str, Any],
    finds: bool,
    two: Fleet,
    tmp_path: Path,
) -> None:
    check(two, tmp_path, name, args, options, finds)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a static graph, None": (
        "scanner",
        {"ddp_static_graph": True},
        {"scale": None},
        "UnsupportedEngineError: With scale=None, DDP with static_graph=True never reduces",
    ),
    "reentrant checkpoints, unused are looked for": (
        "reader",
        REENTRANT | {"ddp_find_unused_parameters": True},
        {},
        "UnsupportedEngineError: ReaderForCausalLM uses reentrant checkpoints.",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "args", "options", "expected"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_cannot_be_right_is_refused(
    name: str, args: dict[str, Any], options: dict[str, Any], expected: str, two: Fleet
) -> None:
    for message in two.ask(refused, name, args, options):
        assert message.startswith(expected)


@pytest.mark.long
@pytest.mark.parametrize("dispatched", [True, False])
def test_batches_that_the_first_rank_deals_out_are_warned_of(dispatched: bool, two: Fleet) -> None:
    for logged in two.ask(told, dispatched):
        warned = [message for message in logged if "dispatch_batches" in message]
        assert len(warned) == dispatched


@pytest.mark.long
def test_without_the_mixin_ddp_stops(two: Fleet) -> None:
    """So that the tests above can fail."""
    messages = two.ask(refused, "scanner", {"ddp_find_unused_parameters": False}, {"bare": True})
    assert any("Expected to have finished reduction" in message for message in messages)
