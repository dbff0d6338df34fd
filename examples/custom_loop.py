"""The five lines that a plain PyTorch loop needs; they end in `# 1` to `# 5`.

    python examples/custom_loop.py

The scans come with `pip install '.[demo]'`. Exit code 0 means that all promises held.
"""

import argparse
import random
import sys

import torch
from torch import Tensor

from modaldummy import DummyLossWrapper, hold_inactive, missing_gradients  # 1
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans


def main() -> int:
    """Train; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    draw, masks = random.Random(0), torch.Generator()
    scans = load_scans()
    model = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapper = DummyLossWrapper(model, parameter_map(tuple(scans)))  # 2
    hold_inactive(wrapper, optimizer)  # 3

    before = evaluate(model, scans)
    for _ in range(steps):
        name = draw.choice(list(scans))
        batch = {name: scans[name][draw.sample(range(len(scans[name])), 64)]}
        optimizer.zero_grad()
        loss = model(batch, masks)[name]
        wrapper.total(loss, batch).backward()  # 4
        missing_gradients(wrapper, strict=True)  # 5: raises if a parameter has none
        optimizer.step()
    after = evaluate(model, scans)

    for name in scans:
        print(f"{name:<8} error {before[name]:.3f} before, {after[name]:.3f} after")
    fell = all(after[name] < before[name] for name in scans)
    print("yes:" if fell else "NO: ", "the error fell for each modality")
    return 0 if fell else 1


@torch.no_grad()
def evaluate(model: MaskedAutoencoder, scans: dict[str, Tensor]) -> dict[str, float]:
    """Error of each modality over all of its samples, under masks that are always the same."""
    return {name: e.item() for name, e in model(scans, torch.Generator().manual_seed(0)).items()}


if __name__ == "__main__":
    sys.exit(main())
