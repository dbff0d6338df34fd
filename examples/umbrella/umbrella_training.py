"""Trains an `Umbrella` with Hugging Face's Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from modaldummy import DummyLossWrapper, missing_gradients
from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback
from umbrella_batches import ModalitySampler, collate
from umbrella_config import Config
from umbrella_generation import Generation
from umbrella_model import Umbrella, parameter_map
from umbrella_scans import Sample, load_samples


class UmbrellaTrainer(DummyLossMixin, Trainer):
    """The Trainer with the dummy term, which counts missing gradients at each step.

    Args:
        mixed_share: Share of batches with several modalities.
        generation: What describes held-out crops.
        **options: Those of the mixin and of the Trainer.
    """

    def __init__(self, *, mixed_share: float, generation: Generation, **options: Any) -> None:
        super().__init__(**options)
        self.add_callback(generation)
        self.generation = generation
        self._mixed_share = mixed_share
        self._num_missing = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one modality or several, other ones on each rank."""
        samples: Any = self.train_dataset
        sampler = ModalitySampler(
            [sample.modality for sample in samples],
            batch_size=self.args.train_batch_size,
            num_batches=self.args.max_steps * self.args.world_size,
            mixed_share=self._mixed_share,
            seed=self.args.seed,
        )
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_size=self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As the mixin's; after backward it counts who has no usable gradient."""
        loss = super().training_step(model, *args, **kwargs)
        self._num_missing = sum(map(len, missing_gradients(self.wrapper).values()))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the mixin's, with that count."""
        if "loss" in logs:
            logs["missing_gradients"] = float(self._num_missing)
        super().log(logs, *args, **kwargs)


def make_model(config: Config) -> Umbrella:
    """The model as it is before training."""
    set_seed(config.seed)
    return Umbrella(config.towers)


def make_trainer(config: Config) -> UmbrellaTrainer:
    """All that a run needs; `train()` starts it."""
    out = Path(config.out)
    train: list[Sample] = []
    held_out: dict[str, Sequence[Sample]] = {}
    for name in config.modalities:
        own, held_out[name] = load_samples(name)
        train += own
    model = make_model(config)
    trainer = UmbrellaTrainer(
        model=model,
        args=_arguments(config),
        wrapper=DummyLossWrapper(model, parameter_map(config.towers), scale=config.scale),
        hold=config.hold,
        train_dataset=train,
        data_collator=collate,
        callbacks=[GradientNormCallback()],
        mixed_share=config.mixed_share,
        generation=Generation(held_out, out / "generated.jsonl", config.generate_every),
    )
    trainer.remove_callback(PrinterCallback)  # 30 numbers a step
    return trainer


def _arguments(config: Config) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        weight_decay=0.01,  # moves what AdamW is not kept from
        seed=config.seed,
        save_steps=config.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is NaN has to be seen
        remove_unused_columns=False,  # samples have no columns
        use_cpu=not torch.cuda.is_available(),  # else torchrun's processes train each for itself
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=config.report_to,
        disable_tqdm=True,
    )
