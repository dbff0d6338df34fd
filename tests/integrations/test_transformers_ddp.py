"""On two ranks with different modalities the Trainer has the gradients of one process."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from modaldummy.integrations.transformers import GradientNormCallback
from tests.fleet import Fleet
from tests.integrations.trainers import (
    EVALUATING,
    MODELS,
    SCALE,
    Recorder,
    arguments,
    mixed,
    owner_of,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- what each rank runs -------------------------------------------------------------------------

Found = tuple[list[dict[str, Tensor | None]], dict[str, Tensor], list[dict[str, float]], bool]


@contextlib.contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment variables of a launcher, from which accelerate knows the ranks."""
    with pytest.MonkeyPatch.context() as patch:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
        ranks |= {"LOCAL_WORLD_SIZE": dist.get_world_size(), "OMP_NUM_THREADS": 1}
        for name, number in ranks.items():
            patch.setenv(name, str(number))
        before = dict(os.environ)
        yield
        os.environ.clear()
        os.environ.update(before)  # without what accelerate sets


def train(
    rank: int, name: str, args: dict[str, Any], scale: float | None, options: dict[str, Any]
) -> Found:
    """Gradients of each step, parameters, logged rows, and whether DDP looks for unused ones."""
    with launched(rank), tempfile.TemporaryDirectory() as folder:
        model, seen = MODELS[name](), Recorder()
        options = {"wrapper": wrapper_of(model, scale)} | options
        run = arguments(Path(folder), **args)
        trainer = mixed(model, run, callbacks=[seen, GradientNormCallback()], **options)
        trainer.train()
        ddp = trainer.model_wrapped
        return seen.steps, values_of(model), rows_of(trainer), ddp.find_unused_parameters


class Stream(IterableDataset[Any]):
    """Samples of T1."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(scanner(), [["T1"]] * 4))


def messages(rank: int, args: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """What the mixin logs."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("modaldummy.integrations.transformers")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(rank, "scanner", args, SCALE, options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return logged


# --- tests ---------------------------------------------------------------------------------------


def check(
    two: Fleet, folder: Path, name: str, args: dict[str, Any], scale: float | None, finds: bool
) -> None:
    """Compare each step with one process that accumulates the batches of both ranks."""
    accumulated = 2 * args.get("gradient_accumulation_steps", 1)
    seen = Recorder()
    alone = {key: value for key, value in args.items() if not key.startswith("ddp_")}
    alone |= {"learning_rate": 0.0, "gradient_accumulation_steps": accumulated}
    mixed(MODELS[name](), arguments(folder, **alone), callbacks=[seen]).train()
    # Ranks and accumulation add in another order, which matters more in bfloat16.
    tolerance = 1e-2 if args.get("bf16") else 1e-5
    for steps, _, _, found in two.ask(train, name, args | {"learning_rate": 0.0}, scale, {}):
        assert found == finds
        assert len(steps) == len(seen.steps)
        for step, expected in zip(steps, seen.steps, strict=True):
            for key, gradient in step.items():
                right = expected[key]
                assert gradient is not None, key
                assert right is not None
                if owner_of(key) is not None and right.abs().max() < 2e-7:  # a dummy gradient
                    dummy = torch.full_like(gradient, scale or 0.0)
                    torch.testing.assert_close(gradient, dummy, rtol=1e-5, atol=0)
                else:
                    room = tolerance * float(right.abs().max())
                    torch.testing.assert_close(gradient, right, rtol=0, atol=room)


def test_two_ranks_train_like_one_process(two: Fleet, tmp_path: Path) -> None:
    """With the Trainer's defaults: DDP looks for unused parameters, and the hold is exact."""
    check(two, tmp_path, "scanner", {}, SCALE, finds=True)
    args = {"optim": "adamw_torch", "weight_decay": 0.1, "num_train_epochs": 2}
    answers = two.ask(train, "scanner", args, SCALE, {"hold": True})
    (_, first, rows, _), (_, second, _, _) = answers
    model = MODELS["scanner"]()
    alone = arguments(tmp_path, **args, gradient_accumulation_steps=2)
    mixed(model, alone, hold=True).train()
    for name, value in values_of(model).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    assert [row["grad_ranks"] for row in rows] == [2] * 10
    assert all("grad_norm/dMRI" in row for row in rows)


CHECKPOINT = {"activation_checkpointing": True}
REENTRANT = CHECKPOINT | {"activation_checkpointing_kwargs": {"use_reentrant": True}}
NOT_FOUND = {"ddp_find_unused_parameters": False}
# Model, arguments of the run, scale, and whether DDP looks for unused parameters.
CASES: dict[str, tuple[str, dict[str, Any], float | None, bool]] = {
    "bfloat16": ("reader", {"bf16": True}, SCALE, True),
    "accumulation": ("reader", {"gradient_accumulation_steps": 2}, SCALE, True),
    "nothing is looked for, None": ("scanner", NOT_FOUND, None, False),
    "a static graph": ("scanner", {"ddp_static_graph": True} | NOT_FOUND, SCALE, False),
    "checkpoints": ("reader", CHECKPOINT | {"ddp_find_unused_parameters": True}, SCALE, True),
    "reentrant checkpoints": ("reader", REENTRANT, SCALE, False),
}


@pytest.mark.long
@pytest.mark.parametrize(("name", "args", "scale", "finds"), CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_one_process(
    name: str, args: dict[str, Any], scale: float | None, finds: bool, two: Fleet, tmp_path: Path
) -> None:
    check(two, tmp_path, name, args, scale, finds)


@pytest.mark.long
def test_a_static_graph_refuses_a_scale_of_none(two: Fleet) -> None:
    for error in two.answers(train, "scanner", {"ddp_static_graph": True}, None, {}):
        assert error.kind == "UnsupportedEngineError"
        assert error.message.startswith("With scale=None, DDP with static_graph=True never reduces")


@pytest.mark.long
@pytest.mark.parametrize("dispatched", [True, False])
def test_batches_that_the_first_rank_dispatches_are_warned_of(dispatched: bool, two: Fleet) -> None:
    config = {"dispatch_batches": dispatched}
    args = {"max_steps": 1, "accelerator_config": config, "train_sampling_strategy": "random"}
    for logged in two.ask(messages, args, {"train_dataset": Stream()}):
        assert sum("dispatch_batches" in message for message in logged) == dispatched


@pytest.mark.long
def test_what_was_set_up_is_logged_once_and_says_what_is_cheaper(two: Fleet) -> None:
    options = {"hold": True, "eval_dataset": samples(scanner(), [["T1"]] * 2)}
    first, second = two.ask(messages, EVALUATING | {"max_steps": 3}, options)
    (line,) = [message for message in first if message.startswith("The mixin has set up")]
    assert "`ddp_find_unused_parameters=False` is cheaper; a hold of the optimizer" in line
    assert not any(message.startswith("The mixin has set up") for message in second)
