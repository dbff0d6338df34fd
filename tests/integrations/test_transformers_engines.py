"""The mixin under DeepSpeed and FSDP2: each rank has images or not, as its samples say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from tests.distributed.models import make
from tests.fleet import Fleet, RankError
from tests.integrations.vlm import (
    NUM_RANKS,
    PLACES,
    TOWER,
    WITH_IMAGE,
    collate,
    has_image,
    images_of_step,
    largest_error,
    trained_in_one_process,
    trainer_under,
    weights_of,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]
FLEET = "DeepSpeed"
NUM_STEPS = 20


# Each rank reads its samples itself.
OWN = {
    "accelerator_config": {"dispatch_batches": False},
    "train_sampling_strategy": "random",
}


class Stream(IterableDataset[Any]):
    """Samples without indexes."""

    def __iter__(self) -> Iterator[Any]:
        return iter(PLACES)


def trained(rank: int, engine: str, folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after 20 steps of SGD."""
    with trainer_under(engine, rank, folder, **options) as trainer:
        trainer.train()
        return weights_of(trainer)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ZeRO-2", {}),
        ("ZeRO-3", {}),
        ("FSDP2", {}),
        ("ZeRO-3", {"shadow_examples": [WITH_IMAGE]}),
        ("FSDP2", {"recorded": True}),
    ],
)
def test_weights_are_those_of_one_process(
    engine: str, options: dict[str, Any], two: Fleet, tmp_path: Path
) -> None:
    """With examples that the mixin finds, or that it gets, or with a shadow of the user."""
    right = trained_in_one_process(NUM_STEPS)
    for found in two.ask(trained, engine, str(tmp_path), options):
        assert largest_error(found, right) < 1e-6


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3", "FSDP2"])
def test_the_trainer_alone_fails(engine: str, tmp_path: Path) -> None:
    """It hangs until a timeout, or has other weights."""
    with Fleet(NUM_RANKS, timeout=8, limit=60, quiet=True) as fleet:
        answers = fleet.answers(trained, engine, str(tmp_path), {"kind": Trainer})
    right = trained_in_one_process(NUM_STEPS)
    for answer in answers:
        assert isinstance(answer, RankError) or largest_error(answer, right) > 1e-4


class Observer(TrainerCallback):
    """What each step did.

    Attributes:
        moved: Whether the step has moved the tower.
        losses: Those that were logged.
    """

    trainer: Any

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.losses: list[float] = []
        self._before: dict[str, Tensor] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._before = weights_of(self.trainer, TOWER)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        after = weights_of(self.trainer, TOWER)
        self.moved.append(any(not torch.equal(after[name], self._before[name]) for name in after))

    def on_log(self, *_: Any, **given: Any) -> None:
        logs = given["logs"]
        self.losses += [logs["loss"]] if "loss" in logs else []


ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}


def observed(
    rank: int, engine: str, folder: str, hold: bool, num_steps: int
) -> tuple[list[bool], list[float]]:
    """Which steps of AdamW have moved the tower, and their losses."""
    seen = Observer()
    with trainer_under(
        engine, rank, folder, hold=hold, callbacks=[seen], args=ADAMW | {"max_steps": num_steps}
    ) as trainer:
        seen.trainer = trainer
        trainer.train()
    return seen.moved, seen.losses


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_a_held_tower_moves_where_a_rank_has_an_image(
    engine: str, two: Fleet, tmp_path: Path
) -> None:
    for moved, losses in two.ask(observed, engine, str(tmp_path), True, 50):
        assert moved == [any(images_of_step(step)) for step in range(50)]
        assert sum(losses[-10:]) < 0.97 * sum(losses[:10])


def trained_twice(rank: int, engine: str, folder: str, options: dict[str, Any]) -> list[Any]:
    """Modes of an evaluation, and what a second Trainer of the same model shadows."""
    args = {"max_steps": 1, "eval_strategy": "steps", "eval_on_start": True}
    modes: list[bool] = []
    with trainer_under(
        engine, rank, folder, args=args, eval_dataset=PLACES[:2], **options
    ) as trainer:
        trainer.model.lm_head.register_forward_hook(
            lambda module, *_: modes.append(module.training)
        )
        trainer.train()
    of_first = list(modes)
    with trainer_under(
        engine, rank, folder, model=trainer.model, args={"max_steps": 1}, **options
    ) as second:
        second.train()
    return [of_first, repr(second.shadow), second.shadow.shadowed]


def test_a_second_trainer_of_a_model_has_a_shadow_of_its_own(two: Fleet, tmp_path: Path) -> None:
    """Evaluation before the first step is in evaluation mode, though the record is not."""
    for rank, (modes, second, shadowed) in enumerate(
        two.ask(trained_twice, "ZeRO-2", str(tmp_path), {})
    ):
        assert modes == [True, False, True, False]  # record, evaluation, step, evaluation
        assert second == "<ShadowHandle of DeepSpeedEngine, in effect>"
        assert shadowed == (() if has_image(rank) else ("image",))


def refused(rank: int, folder: str, options: dict[str, Any]) -> None:
    with trainer_under("ZeRO-2", rank, folder, **options) as trainer:
        trainer.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shadow": False}, "rank"),
        ({"train_dataset": Stream(), "args": OWN}, "cannot be searched for examples"),
        ({"train_dataset": PLACES[:1]}, "None of the first 1 samples contains image"),
    ],
)
def test_without_a_shadow_or_examples_all_ranks_stop(
    options: dict[str, Any], words: str, two: Fleet, tmp_path: Path
) -> None:
    for error in two.answers(refused, str(tmp_path), options):
        assert isinstance(error, RankError)
        assert words in error.message
        assert error.kind in ("ValueError", "RankDisagreementError")


def resumed(rank: int, engine: str, folder: str) -> list[str]:
    """Weights that differ between a training of 20 steps and one that was resumed at step 10.

    Under FSDP2, torch loads no state of an optimizer that has none for a trained parameter.
    """
    args = ADAMW | {"save_strategy": "steps", "save_steps": 10}
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-10"):
        with trainer_under(engine, rank, folder, all_used=True, hold=True, args=args) as trainer:
            trainer.train(resume_from_checkpoint=checkpoint)
            found.append(weights_of(trainer))
    first, second = found
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_a_resumed_training_goes_on_as_before(engine: str, two: Fleet, tmp_path: Path) -> None:
    for different in two.ask(resumed, engine, str(tmp_path)):
        assert different == []


EVALUATED = range(200, 206)


def evaluated(rank: int, engine: str, folder: str) -> list[float]:
    """Losses of evaluation, before the first step and after it."""
    args = {"max_steps": 1, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    places = [{"place": place} for place in EVALUATED]
    with trainer_under(
        engine, rank, folder, eval_dataset=places, args=args | {"eval_on_start": True}
    ) as trainer:
        trainer.train()
        history = trainer.state.log_history
        return [row["eval_loss"] for row in history if "eval_loss" in row]


@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_ranks_evaluate_different_modalities(engine: str, two: Fleet, tmp_path: Path) -> None:
    model: Any = make("LLaVA", "")
    with torch.no_grad():
        right = [float(model(**collate([{"place": place}])).loss) for place in EVALUATED]
    for losses in two.ask(evaluated, engine, str(tmp_path)):
        assert losses == pytest.approx([sum(right) / len(right)] * 2, rel=1e-5)


@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_a_tower_that_is_not_held_moves_always(engine: str, two: Fleet, tmp_path: Path) -> None:
    first = next(step for step in range(15) if any(images_of_step(step)))
    for moved, _ in two.ask(observed, engine, str(tmp_path), False, 15):
        assert all(moved[first:])
