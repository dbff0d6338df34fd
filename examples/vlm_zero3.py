"""Train a small vision-language model with Hugging Face's Trainer under DeepSpeed's ZeRO-3.

    torchrun --nproc-per-node 2 examples/vlm_zero3.py

About one batch in three has an image, so that ranks have different modalities at many steps. The
mixin lets each rank take part in the collectives of the vision tower, by a shadow, and keeps the
optimizer from moving the tower in steps without any image, by a hold. `--no-shadow` leaves the
mixin out: ranks then wait for each other until a timeout. The model and the data are made up;
nothing is downloaded. Exit code 0 means that all promises held on every rank.
"""

import argparse
import os
import random
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import deepspeed
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modaldummy import DummyLossWrapper
from modaldummy.integrations.transformers import DummyLossMixin

IMAGE = 31  # the token of a patch
TOWER = ["model.vision_tower", "model.multi_modal_projector"]
TIMEOUT = 20  # seconds until a rank that waits for another gives up
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # Small parameters would stay whole on each rank, and all of this model are small.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def make_model() -> LlavaForConditionalGeneration:
    """LLaVA with two layers in the tower and in the trunk."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", "vocab_size": 32, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=vision | sizes | heads,
        text_config=text | sizes | heads | {"num_key_value_heads": 2},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def sample(seed: int) -> dict[str, Tensor]:
    """A text that repeats one word; with an image, the color says which."""
    draw = random.Random(seed)
    word = draw.randrange(3, 25)
    text = torch.full((6,), word)
    if draw.random() > 0.3:
        return {"input_ids": text, "labels": text}
    patches = torch.full((4,), IMAGE)
    return {
        "input_ids": torch.cat([patches, text]),
        "labels": torch.cat([torch.full((4,), -100), text]),
        "pixel_values": torch.full((3, 8, 8), word / 25),
    }


class Collator:
    """Makes batches of numbers, each the seed of a sample.

    DeepSpeed on CPUs makes accelerate believe in one process, so that all ranks get the same
    numbers: `num_ranks` and `rank` then make them different.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        """A batch."""
        rows = [sample(number * self.num_ranks + self.rank) for number in numbers]
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            return torch.stack(
                [pad(r[name], (0, length - len(r[name])), value=value) for r in rows]
            )

        ids = padded("input_ids", 0)
        batch = {"input_ids": ids, "labels": padded("labels", -100)}
        batch["attention_mask"] = (ids != 0).long()
        images = [row["pixel_values"] for row in rows if "pixel_values" in row]
        return batch | ({"pixel_values": torch.stack(images)} if images else {})


def modalities_of(batch: dict[str, Tensor]) -> list[str]:
    """What a batch contains."""
    return ["image"] if "pixel_values" in batch else []


class VLMTrainer(DummyLossMixin, Trainer):
    """Adds the dummy term, the shadow and the hold."""


class Watcher(TrainerCallback):
    """Notes what each step did on this rank: active, shadowed, held, moved."""

    trainer: Any

    def __init__(self) -> None:
        self.steps: list[tuple[bool, bool, bool, bool]] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Keep the values of the tower."""
        self.before = self.tower()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Compare them."""
        trainer = self.trainer
        moved = any(not torch.equal(*pair) for pair in zip(self.before, self.tower(), strict=True))
        active = "image" in trainer.wrapper.last.active
        self.steps.append((active, "image" in trainer.shadow.shadowed, bool(trainer.held), moved))

    def on_log(self, *_: Any, **given: Any) -> None:
        """Keep the loss."""
        self.losses += [given["logs"]["loss"]] if "loss" in given["logs"] else []

    def tower(self) -> list[Tensor]:
        """Whole parameters, for which all ranks have to ask."""
        parameters = self.trainer.model.model.vision_tower.parameters()
        return [safe_get_full_fp32_param(p).clone() for p in parameters if p.requires_grad]


def train(options: argparse.Namespace, folder: str) -> bool:
    """Train, and tell whether all promises held on every rank."""
    model = make_model()  # transformers would make it in parts after the next line
    # The norm of the pooled output of the tower, which LLaVA does not use.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=3e-3,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        deepspeed=ZERO3,
    )
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": list(range(10_000)),
        "data_collator": Collator(rank, num_ranks) if args.world_size == 1 else Collator(0, 1),
    }
    if options.no_shadow:
        Trainer(**common).train()
        return True
    watcher = Watcher()
    wrapper = DummyLossWrapper(model, {"image": TOWER}, resolver=modalities_of)
    trainer = VLMTrainer(**common, wrapper=wrapper, hold=True, callbacks=[watcher])
    watcher.trainer = trainer
    trainer.train()
    ranks: list[Any] = [None] * num_ranks
    dist.all_gather_object(ranks, (watcher.steps, watcher.losses))
    return report(ranks)


def report(ranks: list[tuple[list[tuple[bool, bool, bool, bool]], list[float]]]) -> bool:
    """Print what happened, and tell whether all promises held."""
    steps, losses = [list(each) for each in zip(*ranks, strict=True)]
    num_steps = len(steps[0])
    together = list(zip(*steps, strict=True))
    with_image = [any(rank[0] for rank in step) for step in together]
    fell = sum(map(sum, (own[-10:] for own in losses))) < sum(map(sum, (o[:10] for o in losses)))
    promises = {
        "a rank without an image shadowed the tower": all(
            active != shadowed for step in together for active, shadowed, *_ in step
        ),
        "the tower moved in each step with an image, and in no other": all(
            moved is image
            for step, image in zip(together, with_image, strict=True)
            for *_, moved in step
        ),
        "the loss fell": fell,
    }
    if dist.get_rank() == 0:
        differ = sum(len({rank[0] for rank in step}) > 1 for step in together)
        print(f"Ranks had different modalities at {differ} of {num_steps} steps.")
        for rank, own in enumerate(steps):
            active, shadowed, held, _ = (sum(column) for column in zip(*own, strict=True))
            print(f"rank {rank}: image active {active}, shadowed {shadowed}, held {held} times")
        for promise, kept in promises.items():
            print("yes:" if kept else "NO: ", promise)
    return all(promises.values())


def main() -> int:
    """Run on this rank; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no-shadow", action="store_true", help="see what happens without it")
    options = parser.parse_args()
    deepspeed.init_distributed(timeout=timedelta(seconds=TIMEOUT))
    try:
        with tempfile.TemporaryDirectory() as folder:
            kept = train(options, folder)
    except (RuntimeError, dist.DistBackendError) as error:
        if not options.no_shadow:
            raise
        print(f"Stopped on rank {dist.get_rank()}: {error}".splitlines()[0])
        return 1
    dist.destroy_process_group()
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
