"""Tiny models, data and Trainers with three modalities, and the gradients of each step."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modaldummy import DummyLossWrapper
from modaldummy.integrations.transformers import DummyLossMixin

SCALE = 1e-7
WIDTHS = {"T1": 4, "rsfMRI": 5, "dMRI": 6}
MAP = {name: f"towers.{name}" for name in WIDTHS}
BATCH = 2
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
Batches = Sequence[Sequence[str]]  # the modalities of each
# With four batches a step: one modality in all, two that take turns, and a remainder of two.
BATCHES: Batches = [["T1"]] * 4 + [["T1"], ["dMRI"]] * 2 + [["rsfMRI", "T1"], ["rsfMRI"]]


class MixedTrainer(DummyLossMixin, Trainer):
    """As a user would write it."""


class Scanner(nn.Module):
    """A regression whose `forward` says by its arguments which modalities it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: nn.Linear(size, 3) for name, size in WIDTHS.items()})
        self.trunk = nn.Linear(3, 1)

    def forward(
        self,
        T1: Tensor | None = None,  # noqa: N803  # columns are called as modalities are
        rsfMRI: Tensor | None = None,  # noqa: N803
        dMRI: Tensor | None = None,  # noqa: N803
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {"T1": T1, "rsfMRI": rsfMRI, "dMRI": dMRI}
        present = {name: data for name, data in given.items() if data is not None}
        hidden = [self.towers[name](data) for name, data in present.items()]
        logits = self.trunk(torch.stack(hidden).mean(0).tanh())[:, 0]
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss((logits - labels).square().mean(), present), "logits": logits}

    def loss(self, error: Tensor, present: Collection[str]) -> Tensor:
        """The loss of a squared error; derived models change it."""
        return error


class ReaderForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A language model that adds what its towers see to each token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        towers = {name: nn.Linear(size, config.hidden_size) for name, size in WIDTHS.items()}
        self.towers = nn.ModuleDict(towers)

    def forward(
        self,
        input_ids: Tensor,
        T1: Tensor | None = None,  # noqa: N803
        rsfMRI: Tensor | None = None,  # noqa: N803
        dMRI: Tensor | None = None,  # noqa: N803
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        seen = self.get_input_embeddings()(input_ids)
        for name, data in {"T1": T1, "rsfMRI": rsfMRI, "dMRI": dMRI}.items():
            if data is not None:
                seen = seen + self.towers[name](data)[:, None]
        return super().forward(inputs_embeds=seen, labels=labels, **kwargs)


def scanner(seed: int = 0) -> Scanner:
    torch.manual_seed(seed)
    return Scanner()


def reader(seed: int = 0) -> ReaderForCausalLM:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return ReaderForCausalLM(LlamaConfig(**shape))


MODELS: dict[str, Callable[[], Any]] = {"scanner": scanner, "reader": reader}


def samples(model: nn.Module, batches: Batches = BATCHES, seed: int = 0) -> list[dict[str, Any]]:
    """A dataset whose batches contain these modalities, if they are drawn in order."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for place, names in enumerate(batches):
        for _ in range(BATCH):
            sample: dict[str, Any] = {
                name: torch.randn(WIDTHS[name], generator=draw) for name in names
            }
            if isinstance(model, Scanner):
                sample["labels"] = torch.randn((), generator=draw)
            else:
                sample["input_ids"] = torch.randint(32, (6,), generator=draw)
                # Batches differ in how many tokens count.
                ignored = torch.arange(6) < place % 4
                sample["labels"] = sample["input_ids"].masked_fill(ignored, -100)
            found.append(sample)
    return found


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> TrainingArguments:
    """Arguments of a run on the CPU that takes the samples in order and writes nothing."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    made: TrainingArguments = kind(output_dir=str(folder), **defaults | options)
    return made


@dataclass
class Recorder(TrainerCallback):
    """Keeps all gradients as they are before each step of the optimizer.

    Attributes:
        steps: For each step, full name to gradient, or to None if there is none.
    """

    steps: list[dict[str, Tensor | None]] = field(default_factory=list)

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        self.steps.append(
            {
                name: None if p.grad is None else p.grad.clone()
                for name, p in given["model"].named_parameters()
            }
        )


def wrapper_of(model: nn.Module, scale: float | None = SCALE) -> DummyLossWrapper:
    return DummyLossWrapper(model, MAP, scale)


def mixed(
    model: nn.Module | None,
    args: TrainingArguments,
    kind: Any = MixedTrainer,
    **options: Any,
) -> Any:
    """A Trainer with the mixin, on samples of `BATCHES` if no dataset is given."""
    if model is not None:
        options = {"wrapper": wrapper_of(model), "train_dataset": samples(model)} | options
    return _quiet(kind(model, args, **options))


def plain(model: nn.Module, args: TrainingArguments, kind: Any = Trainer, **options: Any) -> Any:
    """The same without the mixin."""
    return _quiet(kind(model, args, **{"train_dataset": samples(model)} | options))


def _quiet(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


def rows_of(trainer: Any) -> list[dict[str, float]]:
    """What training has logged, a row for each step."""
    return [row for row in trainer.state.log_history if "loss" in row]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def owner_of(name: str) -> str | None:
    """The modality that a parameter of `Scanner` or `ReaderForCausalLM` belongs to."""
    _, _, rest = name.rpartition("towers.")
    return next((modality for modality in WIDTHS if rest.startswith(f"{modality}.")), None)


def labels_of(row: dict[str, float]) -> set[str]:
    """The labels of gradient norms, such as `T1` and `inactive`."""
    return {key.split("[")[1].split("]")[0] for key in row if key.startswith("grad/[")}
