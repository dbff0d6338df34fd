"""Train under DistributedDataParallel while ranks hold different modalities.

    torchrun --nproc-per-node 2 examples/ddp.py
    python -m modaldummy doctor ddp-output/metrics.jsonl

Each rank gets a GPU where there are any, else all share the CPU. `--no-dummy` shows how DDP stops
without the wrapper, `--find-unused` how to keep `find_unused_parameters=True`. The scans come with
`pip install '.[demo]'`. Exit code 0 means that all promises held on every rank.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modaldummy import (
    DummyLossWrapper,
    attach_to_outputs,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans


def train(options: argparse.Namespace, device: torch.device) -> bool:
    """Train, and tell whether all promises held on every rank."""
    rank = dist.get_rank()
    scans = load_scans()
    torch.manual_seed(options.seed)
    model = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()}).to(device)
    ddp = DistributedDataParallel(model, find_unused_parameters=options.find_unused)
    # A DDP that looks for unused parameters has to see in its output what the dummy will reach.
    wrapper = DummyLossWrapper(model if options.find_unused else ddp, parameter_map(tuple(scans)))
    if options.find_unused:
        attach_to_outputs(wrapper, ddp)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    hold_inactive(wrapper, optimizer)
    if rank == 0:
        findings = preflight(wrapper, optimizer, ddp)
        print(f"Findings of preflight: {len(findings)}", *findings, sep="\n")

    before = evaluate(model, scans, device)
    draw = random.Random(options.seed + rank)  # so that each rank has modalities of its own
    masks = torch.Generator(device).manual_seed(options.seed + rank)
    drawn, fractions, rows = Counter[str](), [], []
    for step in range(1, options.steps + 1):
        names = draw.sample(list(scans), draw.choice([1, 1, 1, 2]))
        places = {name: draw.sample(range(len(scans[name])), 64) for name in names}
        batch = {name: scans[name][places[name]].to(device) for name in names}
        drawn.update(names)
        optimizer.zero_grad()
        loss = torch.stack(list(ddp(batch, masks).values())).mean()
        if not options.no_dummy:
            loss = wrapper.total(loss, batch)
        loss.backward()
        if wrapper.last is not None:  # None without the dummy
            missing_gradients(wrapper, strict=True)  # raises if any is
            fractions.append(wrapper.last.fraction)
            if rank == 0:
                row = {"step": step, "loss": loss.item()}
                rows.append(row | wrapper.last.as_dict() | gradient_norms(wrapper))
        optimizer.step()
    after = evaluate(model, scans, device)

    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    first = own.clone()
    dist.broadcast(first, src=0)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (drawn, max(fractions, default=0.0), torch.equal(own, first)))
    counts, largest, same = zip(*ranks, strict=True)
    promises = {
        "each parameter had a gradient at each step": len(fractions) == options.steps,
        f"the dummy was at most {max(largest):.1e} of the loss": max(largest) <= 1e-4,
        "all ranks end with the same parameters": all(same),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        (options.out / "metrics.jsonl").write_text("".join(lines))
        print("modality   steps of each rank   error before   after")
        for name in scans:
            steps = [count[name] for count in counts]
            print(f"{name:<8}{steps!s:>21}{before[name]:>15.3f}{after[name]:>8.3f}")
        for promise, held in promises.items():
            print("yes:" if held else "NO: ", promise)
    return all(promises.values())


@torch.no_grad()
def evaluate(model: nn.Module, scans: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Error of each modality over all of its samples, under masks that are always the same."""
    batch = {name: samples.to(device) for name, samples in scans.items()}
    errors = model(batch, torch.Generator(device).manual_seed(0))
    return {name: error.item() for name, error in errors.items()}


def main() -> int:
    """Run on this rank; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("ddp-output"), help="folder of the log")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--no-dummy", action="store_true", help="leave the loss as it is")
    modes.add_argument("--find-unused", action="store_true", help="find_unused_parameters=True")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        held = train(options, device)
    except RuntimeError as error:
        if not options.no_dummy or "Expected to have finished reduction" not in str(error):
            raise
        held = False
        if dist.get_rank() == 0:
            print(
                "DDP stopped: 'Expected to have finished reduction in the prior iteration'. It "
                "waits for a gradient of each parameter, and absent modalities got none."
            )
    # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
    time.sleep(0.2)
    dist.destroy_process_group()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
