"""Train in a loop with Accelerate: accumulation, clipping, a tracker, ranks that differ.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    python -m modaldummy doctor accelerate-output/metrics.jsonl

Each rank gets a GPU where there are any, else all share the CPU, `--multi_gpu` or not (`--cpu`
starts one process, whatever the number asked for). Needs
`pip install '.[demo,transformers]'`. Exit code 0 means that all promises held on every
rank.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from modaldummy import (
    DummyLossWrapper,
    StepReport,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans


class JsonLines(GeneralTracker):  # type: ignore[misc]  # it ships no type information
    """Writes what is logged to a file that the doctor reads."""

    name = "jsonl"
    requires_logging_directory = False
    tracker = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.lines = folder, list[str]()

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        """Add a line; called on the main process alone, like `finish`."""
        self.lines.append(json.dumps({"step": step} | values) + "\n")

    def finish(self) -> None:
        """Write all lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("".join(self.lines))


def train(options: argparse.Namespace, accelerator: Accelerator) -> bool:
    """Train, and tell whether all promises held on every rank."""
    device = accelerator.device
    scans = {name: data.to(device) for name, data in load_scans().items()}
    torch.manual_seed(options.seed)
    bare = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()})
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), lr=1e-3))
    wrapper = DummyLossWrapper(model, parameter_map(tuple(scans)))
    hold_inactive(wrapper, optimizer.optimizer)
    accelerator.init_trackers("demo")
    scaler = accelerator.scaler  # None but with float16
    findings = preflight(
        wrapper, optimizer.optimizer, model, scaler=scaler, max_norm=1.0, accumulation_steps=2
    )
    accelerator.print(f"Findings of preflight: {len(findings)}", *findings, sep="\n")

    before = evaluate(model, scans)
    draw = random.Random(options.seed + accelerator.process_index)
    masks = torch.Generator(device).manual_seed(options.seed + accelerator.process_index)
    drawn, seen, largest, steps = Counter[str](), list[StepReport](), 0.0, 0
    while steps < options.steps:
        name = draw.choice(list(scans))
        batch = {name: scans[name][draw.sample(range(len(scans[name])), 64)]}
        with accelerator.accumulate(model):
            loss = wrapper.total(model(batch, masks)[name], batch)
            accelerator.backward(loss)
            assert wrapper.last is not None
            seen.append(wrapper.last)
            drawn[name] += 1
            largest = max(largest, wrapper.last.fraction)
            if accelerator.sync_gradients:
                steps += 1
                missing_gradients(wrapper, strict=True)  # raises if any is
                row = {"loss": loss.item()} | wrapper.last.as_dict()
                row |= {
                    f"modaldummy/active/{name}": 1.0 for report in seen for name in report.active
                }
                row |= gradient_norms(wrapper, active=seen, scaler=scaler)
                accelerator.log(row, step=steps)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                seen.clear()
            optimizer.step()
            optimizer.zero_grad()
    after = evaluate(model, scans)

    ranks: list[Any] = [(drawn, largest, after)] * accelerator.num_processes
    if dist.is_initialized():
        dist.all_gather_object(ranks, ranks[0])
    counts, fractions, errors = zip(*ranks, strict=True)
    promises = {
        "each parameter had a gradient at each step": steps == options.steps,
        f"the dummy was at most {max(fractions):.1e} of the loss": max(fractions) <= 1e-4,
        "all ranks end with the same model": all(other == after for other in errors),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    accelerator.print("modality   batches of each rank   error before   after")
    for name in scans:
        batches = [count[name] for count in counts]
        accelerator.print(f"{name:<8}{batches!s:>23}{before[name]:>15.3f}{after[name]:>8.3f}")
    for promise, held in promises.items():
        accelerator.print("yes:" if held else "NO: ", promise)
    return all(promises.values())


@torch.no_grad()
def evaluate(model: nn.Module, scans: dict[str, Tensor]) -> dict[str, float]:
    """Error of each modality over all of its samples, under masks that are always the same."""
    masks = torch.Generator(next(iter(scans.values())).device).manual_seed(0)
    return {name: error.item() for name, error in model(scans, masks).items()}


def main() -> int:
    """Run on this rank; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("accelerate-output"), help="of the log")
    options = parser.parse_args()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=2,
        log_with=JsonLines(options.out),
    )
    held = train(options, accelerator)
    # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
    time.sleep(0.2)
    accelerator.end_training()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
