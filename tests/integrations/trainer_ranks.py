"""What a rank does that trains with the Trainer: asked of a `Fleet`, which has a group already."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    MODELS,
    SCALE,
    Recorder,
    arguments,
    mixed,
    plain,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

Found = tuple[list[dict[str, Tensor | None]], dict[str, Tensor], list[dict[str, float]], Any]


@contextlib.contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment that a launcher makes, by which accelerate knows of ranks."""
    before = dict(os.environ)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    ranks |= {"LOCAL_WORLD_SIZE": dist.get_world_size(), "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(number) for name, number in ranks.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def trained(rank: int, name: str, args: dict[str, Any], options: dict[str, Any]) -> Found:
    """Gradients of each step, parameters at the end, rows that were logged, and flags of DDP."""
    with launched(rank), tempfile.TemporaryDirectory() as folder:
        model, seen = MODELS[name](), Recorder()
        run = arguments(Path(folder), **args)
        if options.pop("bare", False):
            trainer = plain(model, run, callbacks=[seen])
        else:
            options["wrapper"] = wrapper_of(model, options.pop("scale", SCALE))
            trainer = mixed(model, run, callbacks=[seen, GradientNormCallback()], **options)
        trainer.train()
        ddp = trainer.model_wrapped
        flags = (type(ddp).__name__, getattr(ddp, "find_unused_parameters", None))
        return seen.steps, values_of(model), rows_of(trainer), flags


class Stream(IterableDataset[Any]):
    """Samples of T1, one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(scanner(), [["T1"]] * 4))


def told(rank: int, dispatched: bool) -> list[str]:
    """What the mixin logs where it trains on an iterable dataset."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("modaldummy.integrations.transformers")
    logger.addHandler(handler)
    config = {"dispatch_batches": dispatched}
    args = {"max_steps": 1, "accelerator_config": config, "train_sampling_strategy": "random"}
    try:
        trained(rank, "scanner", args, {"train_dataset": Stream()})
    finally:
        logger.removeHandler(handler)
    return logged


def refused(rank: int, name: str, args: dict[str, Any], options: dict[str, Any]) -> str:
    """What the mixin says where it does not train."""
    try:
        trained(rank, name, args, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"
