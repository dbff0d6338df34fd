"""Loggers return our rows as they were, and `diagnose` reads what they return."""

import csv
import itertools
import json
import os
import posixpath
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modaldummy import DummyLossWrapper, diagnose, gradient_norms
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import arguments, mixed, rows_of, scanner

PAGE = Path(__file__).parents[2] / "docs/how-to/loggers.md"
# What the gradients of inactive modalities are multiplied by, and what `diagnose` finds then.
RUNS: dict[str, tuple[float, set[str]]] = {"healthy": (1.0, set()), "zeroed": (0.0, {"MD211"})}
SIZES = {"T1": 8, "dMRI": 64}
Row = dict[str, float]


def make_wrapper() -> DummyLossWrapper:
    """Of a model with two modalities and a fusion of both."""
    torch.manual_seed(0)
    towers = {name: nn.Linear(size, 4) for name, size in SIZES.items()}
    model = nn.ModuleDict(towers | {"fusion": nn.Linear(4, 4), "trunk": nn.Linear(4, 1)})
    return DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI", ("T1", "dMRI"): "fusion"})


def log_of(run: str, *, label: bool, steps: int = 60) -> list[Row]:
    """The rows that a training loop logs."""
    wrapper = make_wrapper()
    model: Any = wrapper.parameters.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = []
    for step in range(steps):
        active = [["T1"], ["dMRI"], ["T1", "dMRI"]][step % 3]
        hidden = torch.stack([model[m](torch.randn(16, SIZES[m])) for m in active])
        fused = model["fusion"](hidden.mean(0)) if len(active) == 2 else hidden.mean(0)
        total = wrapper.total((model["trunk"](fused) - 1).square().mean(), active)
        total.backward()
        for entry in wrapper.parameters.split(active).inactive_parameters:
            assert entry.parameter.grad is not None
            entry.parameter.grad.mul_(RUNS[run][0])
        assert wrapper.last is not None
        norms = gradient_norms(wrapper, label=label)
        rows.append({"loss": total.item()} | wrapper.last.as_dict() | norms)
        optimizer.step()
        optimizer.zero_grad()
    return rows


def codes(history: Path | Iterable[Mapping[str, float]]) -> set[str]:
    return {finding.code for finding in diagnose(history)}


def assert_same(found: list[Row], logged: list[Row], kind: Callable[[Any], Any] = float) -> None:
    """The same keys in each row, and the same numbers in the logger's `kind`."""
    assert [row.keys() for row in found] == [row.keys() for row in logged]
    for row, expected in zip(found, logged, strict=True):
        for key, number in expected.items():
            np.testing.assert_equal(kind(row[key]), kind(number), err_msg=key)


# --- CSV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_csv_takes_rows_without_labels(run: str, tmp_path: Path) -> None:
    """Their keys are the same at each step, so that the first row makes the header."""
    logged = log_of(run, label=False)
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, logged[0].keys())
        writer.writeheader()
        writer.writerows(logged)
    assert codes(path) == RUNS[run][1]
    assert len({frozenset(row) for row in log_of(run, label=True, steps=3)}) == 3


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


def test_mlflow_takes_names_without_labels() -> None:
    (row,) = log_of("healthy", label=False, steps=1)
    assert [name for name in row if not is_mlflow_name(name)] == []
    assert clashes(row) == set()
    (labelled,) = log_of("healthy", label=True, steps=1)
    assert {is_mlflow_name(name) for name in labelled if "[" in name} == {False}


def test_the_trainers_own_norm_clashes_in_mlflows_file_store_without_a_prefix() -> None:
    """Hugging Face logs `grad_norm`, which is a folder of ours."""
    rows = [row | {"grad_norm": 1.0} for row in log_of("zeroed", label=False)]
    assert clashes(rows[0]) == {("grad_norm", f"grad_norm/{n}") for n in (*SIZES, "T1-dMRI")}
    own = re.compile("^grad(?!_norm$)")
    moved = [{own.sub("modaldummy/grad", key): row[key] for key in row} for row in rows]
    assert clashes(moved[0]) == set()
    assert codes(moved) == RUNS["zeroed"][1]


# --- TensorBoard ---------------------------------------------------------------------------------


def read_events(folder: Path) -> list[Row]:
    """The rows of an event file, as the page shows how to read them."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


@pytest.mark.long
@pytest.mark.parametrize(("run", "label"), [("healthy", True), ("zeroed", False)])
def test_tensorboard_returns_rows_in_float32(run: str, label: bool, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    logged = log_of(run, label=label)
    with SummaryWriter(tmp_path) as writer:
        for step, row in enumerate(logged):
            for name, number in row.items():
                writer.add_scalar(name, number, step)
    found = read_events(tmp_path)
    assert_same(found, logged, np.float32)
    assert codes(found) == RUNS[run][1]


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_the_trainer_sends_all_rows_to_tensorboard(tmp_path: Path) -> None:
    """With `train/` before each name, which `diagnose` knows."""
    args = arguments(tmp_path, report_to=["tensorboard"])
    trainer = mixed(scanner(), args, callbacks=[GradientNormCallback()])
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    found = [row for row in read_events(folder) if "train/loss" in row]
    history = [{f"train/{k}": v for k, v in row.items() if k != "step"} for row in rows_of(trainer)]
    for row, sent in zip(found, history, strict=True):
        assert sent.keys() <= row.keys()
        assert row["train/grad_norm/T1"] == np.float32(sent["train/grad_norm/T1"])
    assert codes(found) == codes(trainer.state.log_history)


# The blocks before it need only the package and run with those of all pages.
@pytest.mark.long
def test_the_page_reads_event_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    shown = [code for kind, code in blocks if kind == "python" or "tensorboard" in code]
    namespace: dict[str, Any] = {}
    for code in shown:
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert namespace["findings"] == []


# --- Weights & Biases ----------------------------------------------------------------------------

WANDB = """
import json, sys
import wandb

settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True)
with wandb.init(project="modaldummy", mode="offline", settings=settings) as run:
    for row in json.load(sys.stdin):
        run.log(row)
"""


def log_offline(rows: list[Row], folder: Path) -> bytes:
    """Log in another process, and return the file of the run."""
    places = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_DIR", "HOME")
    environment = os.environ | dict.fromkeys(places, str(folder))
    subprocess.run(
        [sys.executable, "-c", WANDB],
        input=json.dumps(rows),
        text=True,
        env=environment | {"WANDB_ERROR_REPORTING": "false"},
        check=True,
        timeout=120,
    )
    (found,) = folder.glob("wandb/offline-run-*/*.wandb")
    return found.read_bytes()


def payloads(data: bytes) -> Iterator[bytes]:
    """The records in LevelDB's log format, whose first block begins with 7 other bytes."""
    block, place, payload = 2**15, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # padding, because no header fits
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        payload += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield payload
            payload = b""


def read_run(data: bytes) -> Iterator[Row]:
    from wandb.proto.wandb_internal_pb2 import Record

    for record in map(Record.FromString, payloads(data)):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            yield {key: number for key, number in row.items() if not key.startswith("_")}


@pytest.mark.long
@pytest.mark.parametrize(("run", "label"), [("healthy", True), ("zeroed", False)])
def test_wandb_returns_rows_offline(run: str, label: bool, tmp_path: Path) -> None:
    """Brackets, slashes, dots and NaN survive, also in the CSV file of an exported panel."""
    logged = log_of(run, label=label)
    found = list(read_run(log_offline(logged, tmp_path)))
    assert_same(found, logged)
    assert codes(found) == RUNS[run][1]
    panel = tmp_path / "panel.csv"
    names = list(dict.fromkeys(key for row in found for key in row))
    columns = [f"run-1 - {name}{end}" for name in names for end in ("", "__MIN", "__MAX")]
    with panel.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["Step", *columns])
        for step, row in enumerate(found):
            cells = [(row.get(name, ""), 0.0, 1e6) for name in names]
            writer.writerow([step, *itertools.chain.from_iterable(cells)])
    assert codes(panel) == RUNS[run][1]
