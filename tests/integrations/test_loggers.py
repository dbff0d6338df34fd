"""What loggers make of our rows: names and numbers come back as they were, and can be diagnosed."""

import csv
import itertools
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modaldummy import DummyLossWrapper, diagnose, gradient_norms
from tests.integrations.logged import RUNS, Row, log_offline, read_events, read_run, rows_of

LIBRARIES: tuple[str, ...] = ()  # of each test: what it imports

PAGE = Path(__file__).parents[2] / "docs/how-to/loggers.md"


def codes(history: Path | Iterable[Mapping[str, float]]) -> set[str]:
    return {finding.code for finding in diagnose(history)}


def assert_same(found: list[Row], logged: list[Row], kind: Callable[[Any], Any] = float) -> None:
    """The same keys in each row, and the same numbers once they are of the logger's `kind`."""
    assert [row.keys() for row in found] == [row.keys() for row in logged]
    for row, expected in zip(found, logged, strict=True):
        for key, number in expected.items():
            np.testing.assert_equal(kind(row[key]), kind(number), err_msg=key)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_csv_takes_rows_without_labels(run: str, tmp_path: Path) -> None:
    """Their keys are the same at each step, so that the first row makes the header."""
    logged = list(rows_of(run, label=False))
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, logged[0].keys())
        writer.writeheader()
        writer.writerows(logged)
    with path.open(newline="") as file:
        found = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert_same(found, logged)
    assert codes(path) == RUNS[run][0]


def test_rows_with_labels_need_a_logger_that_takes_new_keys() -> None:
    rows = rows_of("healthy", label=True, steps=3)
    assert len({frozenset(row) for row in rows}) == 3


# --- MLflow --------------------------------------------------------------------------------------

# As mlflow/utils/validation.py has it in releases before 3; later ones take colons too.
MLFLOW_NAME = re.compile(r"[/\w.\- ]*")
MLFLOW_LENGTH = 250  # MAX_ENTITY_KEY_LENGTH there


def is_mlflow_name(name: str) -> bool:
    """What `_validate_metric` asks of a name there: characters, a path of its own, the length."""
    fits = MLFLOW_NAME.fullmatch(name) is not None and len(name) <= MLFLOW_LENGTH
    return fits and posixpath.normpath(name) == name and name[0] not in "./"


def clashes(names: Iterable[str]) -> set[tuple[str, str]]:
    """Names that MLflow's file store would write to a file and to a folder of the same path."""
    return {(a, b) for a, b in itertools.permutations(names, 2) if b.startswith(f"{a}/")}


@pytest.mark.parametrize("prefix", ["grad", "train/grad"])
def test_names_without_labels_pass_mlflows_rule(prefix: str) -> None:
    model = nn.ModuleDict({"T1": nn.Linear(8, 4), "dMRI": nn.Linear(64, 4)})
    wrapper = DummyLossWrapper(model, {"T1": "T1", ("T1", "dMRI"): "dMRI"})
    wrapper.total(model["T1"](torch.ones(2, 8)).square().mean(), ["T1"]).backward()
    assert wrapper.last is not None
    report = wrapper.last.as_dict()
    names = report | gradient_norms(wrapper, label=False, prefix=prefix)
    assert [name for name in names if not is_mlflow_name(name)] == []
    assert clashes(names) == set()
    labelled = [name for name in gradient_norms(wrapper, prefix=prefix) if "[" in name]
    assert len(labelled) == 4
    assert not any(is_mlflow_name(name) for name in labelled)


@pytest.mark.parametrize("run", RUNS)
def test_the_trainers_own_norm_clashes_in_mlflows_file_store(run: str) -> None:
    """`grad_norm`, which Hugging Face logs, is a folder of ours; not so behind a prefix."""
    rows = [row | {"grad_norm": 1.0} for row in rows_of(run, label=False)]
    folders = {f"grad_norm/{name}" for name in ("T1", "dMRI", "T1-dMRI")}
    assert clashes(rows[0]) == {("grad_norm", folder) for folder in folders}
    own = re.compile("^grad(?!_norm$)")
    moved = [{own.sub("modaldummy/grad", key): row[key] for key in row} for row in rows]
    assert clashes(moved[0]) == set()
    assert moved[0].keys() >= {f"modaldummy/{folder}" for folder in folders}
    assert codes(moved) == RUNS[run][0]


# --- TensorBoard ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_tensorboard_gives_back_what_was_written(run: str, label: bool, tmp_path: Path) -> None:
    """In float32, which is what it stores."""
    from torch.utils.tensorboard import SummaryWriter

    logged = list(rows_of(run, label=label))
    with SummaryWriter(tmp_path) as writer:
        for step, row in enumerate(logged):
            for name, number in row.items():
                writer.add_scalar(name, number, step)
    found = read_events(tmp_path)
    assert_same(found, logged, np.float32)
    assert codes(found) == RUNS[run][0]


class Brain(nn.Module):
    """A model as the Trainer wants it, of two modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"T1": nn.Linear(8, 4), "dMRI": nn.Linear(64, 4)})
        self.trunk = nn.Linear(4, 1)

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.stack([self.towers[name](data) for name, data in batch.items()]).mean(0)
        return {"loss": (self.trunk(hidden) - 1).square().mean()}


def collate(samples: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    name = samples[0][0]
    return {name: torch.stack([data for kind, data in samples if kind == name])}


@pytest.mark.long
@pytest.mark.parametrize("label", [True, False])
def test_the_trainer_sends_our_rows_to_tensorboard(label: bool, tmp_path: Path) -> None:
    """All that is in its history, with `train/` before each name."""
    from transformers import Trainer, TrainingArguments

    from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback

    class MyTrainer(DummyLossMixin, Trainer): ...

    torch.manual_seed(0)
    model = Brain()
    samples = [("T1", torch.randn(8)) if i % 2 else ("dMRI", torch.randn(64)) for i in range(64)]
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=12,
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = MyTrainer(
        model,
        args,
        wrapper=DummyLossWrapper(model, {"T1": "towers.T1", "dMRI": "towers.dMRI"}),
        train_dataset=samples,
        data_collator=collate,
        callbacks=[GradientNormCallback(label=label)],
        hold=True,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 12
    assert all("grad_norm/T1" in row for row in history)
    (folder,) = {path.parent for path in tmp_path.glob("runs/**/events*")}
    found = [row for row in read_events(folder) if "train/loss" in row]
    for row in history:
        row.pop("step")
    last = {key for key in found[-1] if key.removeprefix("train/") not in history[-1]}
    found[-1] = {key: number for key, number in found[-1].items() if key not in last}
    sent = [{f"train/{key}": number for key, number in row.items()} for row in history]
    assert_same(found, sent, np.float32)
    assert codes(found) == codes(history)


# --- Weights & Biases ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_wandb_gives_back_what_was_logged(run: str, label: bool, tmp_path: Path) -> None:
    """Offline; brackets, slashes, dots and NaN come through, also in a panel's export."""
    logged = list(rows_of(run, label=label))
    found = read_run(log_offline(logged, tmp_path))
    own = [{k: number for k, number in row.items() if not k.startswith("_")} for row in found]
    assert_same(own, logged)
    assert codes(found) == RUNS[run][0]
    panel = tmp_path / "panel.csv"
    names = list(dict.fromkeys(key for row in own for key in row))
    columns = [f"run-1 - {name}{end}" for name in names for end in ("", "__MIN", "__MAX")]
    with panel.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["Step", *columns])
        for row in found:
            cells = [(row.get(name, ""), 0.0, 1e6) for name in names]
            writer.writerow([row["_step"], *itertools.chain.from_iterable(cells)])
    assert codes(panel) == RUNS[run][0]


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_page_shows_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks for TensorBoard, after those that need nothing else."""
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", page, re.M | re.S)
    shown = [code for kind, code in blocks if kind == "python" or "tensorboard" in code]
    assert len(shown) > len(re.findall("^```python", page, re.M))
    namespace: dict[str, Any] = {}
    for code in shown:
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert namespace["findings"] == []
