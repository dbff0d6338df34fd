"""Runs of training, healthy ones and sick ones, and what they log.

Every run really trains a small model on a task that can be learned: the modalities are noisy linear
views of a hidden state, and so is the target. A sickness is a mistake in the loop, never a change
of the numbers that were logged.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, gradient_norms, hold_inactive

Record = dict[str, float]
Loop = Callable[["Run"], Iterable[Record]]
SEED = 0  # added to that of each run
WIDTHS = {"T1": 6, "rsfMRI": 4, "dMRI": 8}


class Views(nn.Module):
    """A tower for each modality, which meet in a trunk."""

    def __init__(self, widths: dict[str, int], hidden: int = 8) -> None:
        super().__init__()
        self.towers: Any = nn.ModuleDict({name: nn.Linear(w, hidden) for name, w in widths.items()})
        self.trunk = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = torch.stack([self.towers[name](data) for name, data in batch.items()]).mean(0)
        output: Tensor = self.trunk(hidden)[:, 0]
        return output


@dataclass
class Run:
    """What a loop needs; each field is a place for a mistake.

    Attributes:
        schedule: Active modalities at a step.
        log: What is logged of gradients.
    """

    steps: int = 150
    widths: dict[str, int] = field(default_factory=lambda: dict(WIDTHS))
    seed: int = 0
    size: int = 32
    scale: float | None = 1e-7
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    lr: float = 0.1
    hold: bool = False
    schedule: Callable[[int, list[str]], list[str]] | None = None
    label: bool = True
    noise: float = 0.1

    def __post_init__(self) -> None:
        torch.manual_seed(SEED + self.seed)
        self.names = list(self.widths)
        self.model = Views(self.widths).to(self.dtype)
        self.wrapper = DummyLossWrapper(
            self.model, {name: f"towers.{name}" for name in self.names}, self.scale, **self.options
        )
        self.optimizer = self.make(self.model.parameters(), lr=self.lr)
        self.views = {name: torch.randn(3, width) for name, width in self.widths.items()}
        self.target = torch.randn(3)
        if self.hold:
            hold_inactive(self.wrapper, self.optimizer)

    def active(self, step: int) -> list[str]:
        """One or two modalities, by default; the first steps have each of them."""
        if self.schedule is not None:
            return self.schedule(step, self.names)
        first = self.names[step % len(self.names)]
        other = self.names[int(torch.randint(len(self.names), ()))]
        return list(dict.fromkeys([first, other]))

    def batch(self, active: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        hidden = torch.randn(self.size, 3)
        data = {}
        for name in active:
            view = hidden @ self.views[name]
            data[name] = (view + self.noise * torch.randn_like(view)).to(self.dtype)
        return data, (hidden @ self.target).to(self.dtype)

    def loss(self, active: Iterable[str]) -> Tensor:
        data, target = self.batch(active)
        error: Tensor = self.model(data) - target
        return error.square().mean()

    def record(self, step: int, loss: Tensor, **options: Any) -> Record:
        """A row of a log, as after `backward()`."""
        row = {"step": float(step), "loss": loss.item()}
        if self.wrapper.last is not None:
            row |= self.wrapper.last.as_dict()
        return row | gradient_norms(self.wrapper, label=self.label, **options)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(run: Run) -> Iterable[Record]:
    """The loop as it should be."""
    for step in range(run.steps):
        active = run.active(step)
        total = run.wrapper.total(run.loss(active), active)
        total.backward()
        yield run.record(step, total)
        run.step()
