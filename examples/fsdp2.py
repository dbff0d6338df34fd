"""Train under FSDP2 with a unit for each tower, on ranks that have different modalities.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Each rank gets a GPU where there are any, else all share the CPU. A shadow lets each rank take part
in the collectives of towers that it does not run. `--no-shadow` leaves it out, which `check_ranks`
refuses. The scans come with `pip install '.[demo]'`. Exit code 0 means that all promises held on
every rank.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from modaldummy import (
    DummyLossWrapper,
    ModalityBatchSampler,
    RankDisagreementError,
    check_ranks,
    hold_inactive,
    missing_gradients,
    shadow_inactive,
)
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans


def train(options: argparse.Namespace, device: torch.device) -> bool:
    """Train, and tell whether all promises held on every rank."""
    rank = dist.get_rank()
    scans = load_scans()
    torch.manual_seed(options.seed)  # the same on all ranks, each of which keeps its shards
    model = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()}).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name in scans:
        fully_shard(model.vision_tower[f"{name}_patch_embed"], mesh=mesh)
        fully_shard(model.heads[name], mesh=mesh)
    fully_shard(model, mesh=mesh)
    wrapper = DummyLossWrapper(model, parameter_map(tuple(scans)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding, of the shards
    hold_inactive(wrapper, optimizer)

    before = evaluate(model, scans, device)
    masks = torch.Generator(device).manual_seed(options.seed + rank)
    shadow = None
    if not options.no_shadow:  # recorded with a single sample of each modality
        examples = [({name: data[:1].to(device)}, masks) for name, data in scans.items()]
        shadow = shadow_inactive(wrapper, model, examples=examples)
    drawn: list[str] = []
    for batch in islice(batches(scans, options.seed + rank), options.steps):
        batch = {name: samples.to(device) for name, samples in batch.items()}
        check_ranks(wrapper, batch)  # raises on every rank
        drawn.extend(batch)
        optimizer.zero_grad()
        loss = torch.stack(list(model(batch, masks).values())).mean()
        wrapper.total(loss, batch).backward()
        missing_gradients(wrapper, strict=True)  # raises if any is
        optimizer.step()
    with shadow.paused() if shadow else nullcontext():  # all ranks do the same there
        after = evaluate(model, scans, device)

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (drawn, after))
    histories, errors = zip(*ranks, strict=True)
    differing = sum(len(set(names)) > 1 for names in zip(*histories, strict=True))
    promises = {
        "each parameter had a gradient at each step": len(drawn) == options.steps,
        "all ranks end with the same model": all(other == after for other in errors),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    if rank == 0:
        print(f"Ranks had different modalities at {differing} of {options.steps} steps.")
        print("modality   steps of each rank   error before   after")
        for name in scans:
            steps = [history.count(name) for history in histories]
            print(f"{name:<8}{steps!s:>21}{before[name]:>15.3f}{after[name]:>8.3f}")
        for promise, held in promises.items():
            print("yes:" if held else "NO: ", promise)
    return all(promises.values())


def batches(scans: dict[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one modality without end, drawn as if this rank were alone."""
    samples: Any = [(name, sample) for name, data in scans.items() for sample in data]
    names = [name for name, _ in samples]
    sampler = ModalityBatchSampler(names, 64, seed=seed, num_replicas=1, rank=0)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def collate(samples: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A batch as the model takes it; all of its samples are of one modality."""
    return {samples[0][0]: torch.stack([sample for _, sample in samples])}


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
    parser.add_argument("--no-shadow", action="store_true", help="see what is refused without it")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        held = train(options, device)
    except RankDisagreementError as error:
        held = False
        if dist.get_rank() == 0:
            print(f"Refused: {error}")
    # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
    time.sleep(0.2)
    dist.destroy_process_group()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
