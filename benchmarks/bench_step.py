"""What a user feels: whole training steps with and without the dummy term.

A ViT-like model with three towers and a shared trunk is trained with AdamW on batches that hold one
modality. `bare` adds nothing: the optimizer then skips absent towers, while a dummy gradient makes
it work on them, as the naive line does, unless they are held. `norms logged` brings the norms of
all gradients to the host at each step. `all active`: each batch holds everything, so that there is
nothing to hold, and what a hold costs shows alone. Held contenders are also compared with the same
without a hold.
"""

import argparse
import json
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from measure import (
    Contender,
    Times,
    environment,
    keep_memory,
    percentiles,
    pick_device,
    print_environment,
    ratio,
    result_path,
    take_turns,
    work,
    write_csv,
)
from modaldummy import DummyLossWrapper, hold_inactive
from modaldummy._monitor.tensor_norms import tensor_norms

Add = Callable[[Tensor, dict[str, Tensor]], Tensor]

SCALE = 1e-7
NAMES = ("T1", "rsfMRI", "dMRI")
# Tokens and values per token of each modality.
TOKENS = {"T1": (64, 512), "rsfMRI": (64, 320), "dMRI": (64, 640)}


class Model(nn.Module):
    """A tower of two layers for each modality, and a trunk of four, all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )

        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(TOKENS[name][1], width), layer(), layer())
                for name in NAMES
            }
        )
        self.trunk = nn.Sequential(*(layer() for _ in range(4)), nn.Linear(width, 10))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits `[B, 10]` of the modalities in the batch, averaged over tokens."""
        tokens = torch.cat([self.towers[name](batch[name]) for name in batch], dim=1)
        logits: Tensor = self.trunk(tokens).mean(1)
        return logits


# A way to add a dummy term, for a model and its optimizer.
Way = Callable[[Model, Optimizer], Add]


def main() -> None:
    """Time the steps in turns, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print rows, not a table")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    entrants = contenders(arguments.width, arguments.batch, device)
    times = take_turns(entrants, arguments.rounds, device)
    rows = [row(name, times, entrants[name], device) for name in entrants]
    print(json.dumps(rows)) if arguments.json else print_table(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_step.csv", device), rows)


def contenders(width: int, size: int, device: torch.device) -> dict[str, Contender]:
    """For each name a model and an optimizer of its own, and a way to add the dummy term."""

    def bare(model: Model, optimizer: Optimizer) -> Add:
        return lambda loss, batch: loss

    def naive(model: Model, optimizer: Optimizer) -> Add:
        def add(loss: Tensor, batch: dict[str, Tensor]) -> Tensor:
            absent = [tower for name, tower in model.towers.items() if name not in batch]
            return loss + SCALE * sum(p.sum() for tower in absent for p in tower.parameters())

        return add

    paths = {name: f"towers.{name}" for name in NAMES}

    def ours(**options: Any) -> Way:
        return lambda model, optimizer: DummyLossWrapper(model, paths, **options).total

    def held(model: Model, optimizer: Optimizer) -> Add:
        wrapper = DummyLossWrapper(model, paths)
        hold_inactive(wrapper, optimizer)
        return wrapper.total

    ways = {
        "bare": bare,
        "naive line": naive,
        "ours": ours(),
        "ours, gradient_only": ours(gradient_only=True),
        "ours, scale=0.0": ours(scale=0.0),
        "ours, scale=None": ours(scale=None),
        "ours, hold": held,
    }
    found = {name: training(way, width, size, device) for name, way in ways.items()}
    for name in ("naive line", "ours"):
        found[f"{name}, norms logged"] = training(ways[name], width, size, device, log=True)
    for name in ("ours", "ours, hold"):
        found[f"{name}, all active"] = training(ways[name], width, size, device, together=True)
    return found


def training(
    way: Way,
    width: int,
    size: int,
    device: torch.device,
    *,
    log: bool = False,
    together: bool = False,
) -> Contender:
    """Steps of AdamW on one modality after the other, or on all of them `together`.

    With `log`, all gradient norms are brought to the host at each of them.
    """
    torch.manual_seed(0)
    model = Model(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    add = way(model, optimizer)
    data = {name: torch.randn(size, *TOKENS[name], device=device) for name in NAMES}
    batches = cycle([data] if together else [{name: data[name]} for name in NAMES])
    labels = torch.randint(10, (size,), device=device)

    def forward() -> Tensor:
        batch = next(batches)
        return add(nn.functional.cross_entropy(model(batch), labels), batch)

    def backward(total: Tensor) -> None:
        total.backward()
        if log:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            tensor_norms(gradients, device=device).tolist()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(forward, backward, lambda: None)


def row(
    name: str, times: dict[str, Times], contender: Contender, device: torch.device
) -> dict[str, Any]:
    """Step time of one contender, and its ratios with what chance would make of them."""
    done = work(contender, device)
    found: dict[str, Any] = {"contender": name} | percentiles(times[name].both)
    bases = {"bare": "bare", "naive": "naive line", "unheld": name.replace(", hold", "")}
    for kind, base in bases.items():
        low, high = interval(times[name].both / times[base].both)
        found |= {
            f"to_{kind}": ratio(times[name], times[base], "both"),
            f"to_{kind}_low": low,
            f"to_{kind}_high": high,
        }
    found |= {"rounds": len(times[name].both), "peak_MB": done.peak_bytes / 1e6}
    return found | {"operators": done.operators, "launches": done.launches} | environment(device)


def interval(ratios: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Bounds that hold the median of such ratios with 95 % confidence, from 2,000 resamples."""
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def with_interval(row: dict[str, Any], title: str) -> str:
    """A ratio, with its interval of 95 %."""
    return f"{row[title]:.3f} ({row[f'{title}_low']:.3f} to {row[f'{title}_high']:.3f})"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Median times, ratios with their intervals, memory."""
    print_environment(rows[0])
    titles = ("/ bare (95 %)", "/ naive (95 %)", "/ unheld (95 %)")
    print(f"{'':26}{'ms':>8}" + "".join(f"{title:>24}" for title in titles) + f"{'peak MB':>9}")
    for row in rows:
        cells = [
            f"{row[key]:8.3f} ({row[key + '_low']:.3f}-{row[key + '_high']:.3f})"
            for key in ("to_bare", "to_naive", "to_unheld")
        ]
        print(f"{row['contender']:26}{row['p50_ms']:8.2f}", *cells, f"{row['peak_MB']:8.1f}")


if __name__ == "__main__":
    main()
