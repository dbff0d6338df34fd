"""Twenty thousand steps with changing active sets: memory must stay flat.

Run by `make soak`; not collected by pytest.
"""

import argparse
import os
import random
import sys
from pathlib import Path

import torch
from torch import nn

from modaldummy import DummyLossWrapper

MODALITIES = ("T1", "rsfMRI", "dMRI")


def resident_bytes() -> int:
    """Resident memory of this process, from /proc (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(steps: int, warm_up: int, *, leak: bool) -> float:
    """Resident memory after `steps` relative to that after `warm_up`, less one."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in MODALITIES})
    wrapper = DummyLossWrapper(model, {name: name for name in MODALITIES})
    criterion = wrapper(nn.functional.mse_loss)
    optimizer = torch.optim.Adam(model.parameters())
    target, kept, before = torch.zeros(8, 64), [], 0
    choose = random.Random(0)
    for step in range(1, steps + 1):
        active = choose.sample(MODALITIES, choose.randint(1, len(MODALITIES)))
        batch = {name: torch.randn(8, 64) for name in active}
        output = torch.stack([model[name](data) for name, data in batch.items()]).sum(0)
        if step % 2:
            loss = wrapper.total(nn.functional.mse_loss(output, target), batch)
        else:
            loss = criterion(output, target, modalities=active)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if leak:
            kept.append(loss)
        if step == warm_up:
            before = resident_bytes()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:>6}: {resident_bytes() / 2**20:.1f} MiB", flush=True)
    return resident_bytes() / before - 1


def main() -> int:
    """Run the loop; the exit status is 1 if memory grew by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--warm-up", type=int, default=2_000)
    parser.add_argument("--limit", type=float, default=0.01, help="largest growth to accept")
    parser.add_argument("--leak", action="store_true", help="keep every loss, to see it fail")
    arguments = parser.parse_args()
    if not 0 < arguments.warm_up < arguments.steps:
        parser.error("--warm-up must be at least 1 and less than --steps")
    grown = growth(arguments.steps, arguments.warm_up, leak=arguments.leak)
    passed = grown <= arguments.limit
    print(
        f"{'passed' if passed else 'FAILED'}: resident memory grew by {grown:.2%} from step "
        f"{arguments.warm_up} to {arguments.steps}; the limit is {arguments.limit:.2%}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
