"""A tiny LLaVA in the Trainer, under engines that shard, on texts with and without an image."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modaldummy import DummyLossWrapper, shadow_inactive
from modaldummy.integrations.transformers import DummyLossMixin
from tests.distributed.deepspeed_engines import deepspeed_on_cpus
from tests.distributed.models import CASES, TOKENS, batch_of, make
from tests.distributed.oracle import whole
from tests.integrations.test_transformers_ddp import launched
from tests.integrations.trainers import arguments

NUM_RANKS = 2
LR = 0.05
PLACES = [{"place": place} for place in range(200)]  # the samples of training
TOWER = "vision_tower"
UNUSED = ("encoder.layers.2", "post_layernorm")
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
FSDP2: dict[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["CLIPEncoderLayer", "LlamaDecoderLayer"],
}


def zero(stage: int) -> dict[str, Any]:
    options = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"use_cpu": False, "deepspeed": ZERO | {"zero_optimization": options}}


ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "FSDP2": {"fsdp": True, "fsdp_config": FSDP2},
}


def has_image(place: int) -> bool:
    return random.Random(place).random() < 0.3


def sample(place: int) -> dict[str, Tensor]:
    """A row of text, with an image before it or without."""
    rows = batch_of("LLaVA", ["image"] if has_image(place) else [], place)
    return {name: tensor[:1] for name, tensor in rows.items()}


def collate(samples: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """A batch."""
    rows = [sample(each["place"]) for each in samples]
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str, value: int) -> Tensor:
        tensors = [row[name] for row in rows]
        return torch.cat([pad(each, (0, length - each.shape[1]), value=value) for each in tensors])

    ids = padded("input_ids", 0)
    batch = {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids > 0).long()}
    images = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return batch | ({"pixel_values": torch.cat(images)} if images else {})


def wrapper_of(model: nn.Module) -> DummyLossWrapper:
    return DummyLossWrapper(model, CASES["LLaVA"].paths, resolver=modalities_of)


def modalities_of(batch: Mapping[str, Tensor]) -> list[str]:
    return ["image"] if TOKENS["image"] in batch["input_ids"] else []


WITH_IMAGE = collate([next(each for each in PLACES if has_image(each["place"]))])


class VLMTrainer(DummyLossMixin, Trainer):
    """As a user would write it."""


@contextmanager
def accelerate_on(engine: str, rank: int) -> Iterator[None]:
    """Let accelerate run an engine on CPU ranks.

    It makes no FSDP of CPU ranks, so that it is told that they are GPUs. With DeepSpeed on CPUs it
    believes in one process, and is told how many there are.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    is_zero = engine.startswith("ZeRO")
    if is_zero:
        deepspeed_on_cpus()
    original = PartialState.__init__

    def init(state: Any, *args: Any, **kwargs: Any) -> None:
        original(state, *args, **kwargs)
        if is_zero:
            state.num_processes, state.process_index = NUM_RANKS, rank
        elif state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    unset: Any = unset_hf_deepspeed_config
    unset()  # of an earlier Trainer, or models are made without weights
    reset: Any = AcceleratorState._reset_state
    reset(reset_partial_state=True)
    with launched(rank), patch.object(PartialState, "__init__", init):
        yield


@contextmanager
def trainer_under(
    engine: str,
    rank: int,
    folder: str,
    kind: Any = VLMTrainer,
    *,
    config: Any = TrainingArguments,
    all_used: bool = False,
    recorded: bool = False,
    model: Any = None,
    **options: Any,
) -> Iterator[Any]:
    """A Trainer of a new model, whose batches are single samples.

    Args:
        engine: A key of `ENGINES`.
        rank: Of this process.
        folder: For checkpoints.
        kind: The class of the Trainer.
        config: That of its arguments.
        all_used: Freeze parameters of the tower that forward never uses.
        recorded: Shadow the plain model before, as a user may.
        model: The model; a new one by default.
        options: Of the Trainer; `args` are more of its arguments.
    """
    args: dict[str, Any] = {
        "max_steps": 20,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
        "learning_rate": LR,
    }
    args |= ENGINES[engine] | options.pop("args", {})
    with accelerate_on(engine, rank):
        model = model or make("LLaVA", "")
        for part in UNUSED if all_used else ():
            model.get_submodule(f"model.vision_tower.{part}").requires_grad_(False)
        if kind is not Trainer:
            options["wrapper"] = wrapper_of(model)
        if recorded:
            shadow_inactive(options["wrapper"], model, examples=[WITH_IMAGE])
        options = {"train_dataset": PLACES, "data_collator": collate} | options
        yield kind(model, arguments(Path(folder), config, **args), **options)


def weights_of(trainer: Any, part: str = "") -> dict[str, Tensor]:
    """Whole parameters with `part` in their names, for which all ranks have to ask."""
    return read_whole(trainer.model, "ZeRO" if trainer.is_deepspeed_enabled else "FSDP2", part)


def read_whole(model: nn.Module, engine: str, part: str = "") -> dict[str, Tensor]:
    """The same under an engine."""
    read: Callable[..., Any] = whole
    if engine.startswith("ZeRO"):
        read = deepspeed_on_cpus().utils.safe_get_full_fp32_param
    named = model.named_parameters()
    return {name: read(p).detach().clone() for name, p in named if part in name and p.requires_grad}


def images_of_step(step: int) -> list[bool]:
    """Whether each rank has an image."""
    return [has_image(NUM_RANKS * step + rank) for rank in range(NUM_RANKS)]


def trained_in_one_process(num_steps: int) -> dict[str, Tensor]:
    """The weights after steps of SGD on the batches of all ranks, without the library."""
    model: Any = make("LLaVA", "")
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for step in range(num_steps):
        for rank in range(NUM_RANKS):
            batch = collate([{"place": NUM_RANKS * step + rank}])
            (model(**batch).loss / NUM_RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def largest_error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert found.keys() == right.keys()
    return max(float((found[name] - right[name]).abs().max()) for name in right)
