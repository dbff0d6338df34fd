"""Train with Lightning Fabric: accumulation, clipping, ranks that hold different modalities.

    python examples/fabric.py
    torchrun --nproc-per-node 2 examples/fabric.py

Each rank gets a GPU where there are any, else all share the CPU. Needs
`pip install '.[demo,lightning]'`. Exit code 0 means that all promises held on every rank.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
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

ACCUMULATED = 2  # batches a step


def train(options: argparse.Namespace, fabric: Fabric) -> bool:
    """Train, and tell whether all promises held on every rank."""
    scans = {name: data.to(fabric.device) for name, data in load_scans().items()}
    torch.manual_seed(options.seed)
    bare = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()})
    model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=1e-3))
    wrapper = DummyLossWrapper(bare, parameter_map(tuple(scans)))
    hold_inactive(wrapper, optimizer.optimizer)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # with --precision 16-mixed
    findings = preflight(
        wrapper,
        optimizer.optimizer,
        model,
        scaler=scaler,
        max_norm=1.0,
        accumulation_steps=ACCUMULATED,
    )
    fabric.print(f"Findings of preflight: {len(findings)}", *findings, sep="\n")

    before = evaluate(model, scans)
    draw = random.Random(options.seed + fabric.global_rank)
    masks = torch.Generator(fabric.device).manual_seed(options.seed + fabric.global_rank)
    drawn, largest, sizes = Counter[str](), 0.0, list[float]()
    for _ in range(options.steps):
        seen = list[StepReport]()
        for last in [*[False] * (ACCUMULATED - 1), True]:
            name = draw.choice(list(scans))
            batch = {name: scans[name][draw.sample(range(len(scans[name])), 64)]}
            with fabric.no_backward_sync(model, enabled=not last):
                total = wrapper.total(model(batch, masks)[name], batch)
                fabric.backward(total / ACCUMULATED)
            assert wrapper.last is not None
            seen.append(wrapper.last)
            drawn[name] += 1
            largest = max(largest, wrapper.last.fraction)
        missing_gradients(wrapper, strict=True)  # raises if any is
        norms = gradient_norms(wrapper, active=seen, scaler=scaler)
        held = {name for report in seen for name in report.active}
        absent = set(scans) - set[str]().union(*gathered(held))  # on all ranks
        for name in absent:
            own = wrapper.named_parameters(name).values()
            expected = 1e-7 * sum(parameter.numel() for parameter in own) ** 0.5
            sizes.append(norms[f"grad_norm/{name}"] / expected)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, scans)

    counts, fractions, errors = zip(*gathered((drawn, largest, after)), strict=True)
    promises = {
        f"{len(sizes)} dummy gradients had their size": all(abs(s - 1) < 1e-3 for s in sizes),
        f"the dummy was at most {max(fractions):.1e} of the loss": max(fractions) <= 1e-4,
        "all ranks end with the same model": all(other == after for other in errors),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    fabric.print("modality   batches of each rank   error before   after")
    for name in scans:
        batches = [count[name] for count in counts]
        fabric.print(f"{name:<8}{batches!s:>23}{before[name]:>15.3f}{after[name]:>8.3f}")
    for promise, held in promises.items():
        fabric.print("yes:" if held else "NO: ", promise)
    return all(promises.values())


def gathered(own: Any) -> list[Any]:
    """What each rank has."""
    if not dist.is_initialized():
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


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
    parser.add_argument("--precision", default="32-true", help="of Fabric")
    options = parser.parse_args()
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    strategy = "ddp" if "LOCAL_WORLD_SIZE" in os.environ else "auto"
    fabric = Fabric(devices=devices, strategy=strategy, precision=options.precision)
    fabric.launch()
    held = train(options, fabric)
    if dist.is_initialized():
        # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
        time.sleep(0.2)
        dist.destroy_process_group()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
