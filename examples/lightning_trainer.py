"""Train with Lightning's Trainer, on one process or on several that hold different modalities.

    python examples/lightning_trainer.py
    torchrun --nproc-per-node 2 examples/lightning_trainer.py
    python -m modaldummy doctor lightning-output/metrics.csv

Each rank gets a GPU where there are any, else all share the CPU. `--find-unused` has DDP look for
unused parameters, which Lightning suggests and the dummy makes unnecessary. Needs
`pip install '.[demo,lightning]'`. Exit code 0 means that all promises held on every rank.
"""

import argparse
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from modaldummy import DummyLossWrapper, missing_gradients
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans
from modaldummy.integrations.lightning import DummyLossCallback

Batch = dict[str, Tensor]


class Reconstruction(LightningModule):
    """The demo's model, what it is trained by, and a count of what it saw."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.model = MaskedAutoencoder(widths)
        self.wrapper = DummyLossWrapper(self.model, parameter_map(tuple(widths)))
        self.drawn, self.fractions = Counter[str](), list[float]()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The total of one batch."""
        masks = torch.Generator(self.device).manual_seed(batch_idx)
        loss = torch.stack(list(self.model(batch, masks).values())).mean()
        self.log("train_loss", loss)
        self.drawn.update(batch.keys())
        return self.wrapper.total(loss, batch)

    def on_after_backward(self) -> None:
        """Look whether the promises hold at this step."""
        missing_gradients(self.wrapper, strict=True)  # raises if any is
        assert self.wrapper.last is not None
        self.fractions.append(self.wrapper.last.fraction)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that makes a full step out of any gradient, unless it is held."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Draws(IterableDataset[Batch]):
    """Batches of one modality, sometimes two, without end; on each rank others."""

    def __init__(self, scans: dict[str, Tensor]) -> None:
        self._scans = scans

    def __iter__(self) -> Iterator[Batch]:
        draw = random.Random(dist.get_rank() if dist.is_initialized() else 0)
        while True:
            names = draw.sample(list(self._scans), draw.choice([1, 1, 1, 2]))
            yield {n: self._scans[n][draw.sample(range(len(self._scans[n])), 64)] for n in names}


def train(options: argparse.Namespace) -> bool:
    """Train, and tell whether all promises held on every rank."""
    scans = load_scans()
    torch.manual_seed(0)
    module = Reconstruction({name: data.shape[1] for name, data in scans.items()})
    callback = DummyLossCallback(hold=True)
    strategy = "ddp_find_unused_parameters_true" if options.find_unused else "ddp"
    trainer = Trainer(
        max_steps=options.steps,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),  # set by torchrun
        strategy=strategy if "LOCAL_WORLD_SIZE" in os.environ else "auto",
        logger=CSVLogger(options.out, name="", version=""),
        log_every_n_steps=1,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    before = evaluate(module.model, scans)
    trainer.fit(module, DataLoader(Draws(scans), batch_size=None))
    after = evaluate(module.model, scans)

    ranks: list[Any] = [(module.drawn, max(module.fractions), after)]
    if dist.is_initialized():
        ranks *= dist.get_world_size()
        dist.all_gather_object(ranks, ranks[0])
    counts, largest, errors = zip(*ranks, strict=True)
    promises = {
        "each parameter had a gradient at each step": len(module.fractions) == options.steps,
        f"the dummy was at most {max(largest):.1e} of the loss": max(largest) <= 1e-4,
        "all ranks end with the same model": all(other == after for other in errors),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    if trainer.is_global_zero:
        print(f"Findings of preflight: {len(callback.findings)}", *callback.findings, sep="\n")
        print("modality   steps of each rank   error before   after")
        for name in scans:
            steps = [count[name] for count in counts]
            print(f"{name:<8}{steps!s:>21}{before[name]:>15.3f}{after[name]:>8.3f}")
        for promise, held in promises.items():
            print("yes:" if held else "NO: ", promise)
    return all(promises.values())


@torch.no_grad()
def evaluate(model: nn.Module, scans: dict[str, Tensor]) -> dict[str, float]:
    """Error of each modality over all of its samples, under masks that are always the same."""
    errors = model.cpu()(scans, torch.Generator().manual_seed(0))
    return {name: error.item() for name, error in errors.items()}


def main() -> int:
    """Run on this rank; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("lightning-output"), help="of the log")
    parser.add_argument("--find-unused", action="store_true", help="find_unused_parameters=True")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # batches lie in memory
    held = train(options)
    if dist.is_initialized():
        # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
        time.sleep(0.2)
        dist.destroy_process_group()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
