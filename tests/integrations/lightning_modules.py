"""A LightningModule to train, a logger that keeps its rows, and a Trainer for both."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from modaldummy import DummyLossWrapper
from tests.holding import NAMES, Towers

Batch = dict[str, list[str]]
Gradients = dict[str, Tensor | None]

TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI is never active

# Warnings that tests of Lightning ignore.
QUIET = [
    "ignore:.*does not have many workers",  # the data are lists of names
    r"ignore:.*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 with torch 2.13
    "ignore:GPU available but not used",  # tests want the CPU
]


class Module(LightningModule):
    """Towers, with or without the wrapper.

    Attributes:
        gradients_by_batch: Gradients after backward of each batch.
        stepped: Gradients after the step, clipped, of each batch.
    """

    def __init__(self, wrapped: bool = True, **options: Any) -> None:
        super().__init__()
        self.model = Towers()
        spec = {name: f"model.towers.{name}" for name in NAMES}
        if wrapped:
            self.wrapper = DummyLossWrapper(self, spec, **options)
        self.wrapped = wrapped
        self.gradients_by_batch: list[Gradients] = []
        self.stepped: list[Gradients] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = self.model.loss(batch["modality"])
        self.log("train_loss", loss)
        return self.wrapper.total(loss, batch) if self.wrapped else loss

    def on_after_backward(self) -> None:
        self.gradients_by_batch.append(gradients(self))

    def on_train_batch_end(self, *_: Any) -> None:
        self.stepped.append(gradients(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Kept(Logger):
    """Keeps its rows, as pairs of a step and metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, Mapping[str, float]]] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def ours(self) -> dict[int, Mapping[str, float]]:
        """The rows of the callback, by step."""
        return {step or 0: row for step, row in self.rows if "modaldummy/real" in row}

    def lightnings(self) -> dict[int | None, Mapping[str, float]]:
        """The rows of Lightning's own, by step."""
        return {step: row for step, row in self.rows if "train_loss" in row}


def batches(*active: Sequence[str]) -> "DataLoader[Batch]":
    """Batches that contain these modalities, one after the other."""
    data: Any = [{"modality": list(names)} for names in active]
    return DataLoader(data, batch_size=None)


def trainer(*callbacks: Callback, logger: Logger | None = None, **options: Any) -> Trainer:
    """A Trainer for one epoch on the CPU that writes nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[*callbacks], logger=logger or False, **(settings | options))


def fit(
    module: LightningModule,
    active: Sequence[Sequence[str]],
    *callbacks: Callback,
    logger: Logger | None = None,
    **options: Any,
) -> Trainer:
    """Train on batches that contain these modalities."""
    made = trainer(*callbacks, logger=logger, **options)
    made.fit(module, batches(*active))
    return made


def gradients(module: LightningModule) -> Gradients:
    """A copy of each gradient by name."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
