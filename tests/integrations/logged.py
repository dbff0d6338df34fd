"""Rows of runs for `test_loggers.py`, and what reads them back from where loggers put them."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from modaldummy import DummyLossWrapper, gradient_norms

# What diagnose says of a run, and what its loop does to the gradients of inactive modalities.
RUNS: dict[str, tuple[set[str], float]] = {"healthy": (set(), 1.0), "zeroed": ({"MD211"}, 0.0)}
SIZES = {"T1": 8, "dMRI": 64}
Row = dict[str, float]


def rows_of(run: str, *, label: bool, steps: int = 60) -> Iterator[Row]:
    """A log as a loop writes it, of a model with a fusion and two modalities."""
    torch.manual_seed(0)
    towers = {name: nn.Linear(size, 4) for name, size in SIZES.items()}
    model = nn.ModuleDict(towers | {"fusion": nn.Linear(4, 4), "trunk": nn.Linear(4, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI", ("T1", "dMRI"): "fusion"})
    for step in range(steps):
        active = [["T1"], ["dMRI"], ["T1", "dMRI"]][step % 3]
        hidden = torch.stack([model[m](torch.randn(16, SIZES[m])) for m in active])
        mixed = model["fusion"](hidden.mean(0)) if len(active) == 2 else hidden.mean(0)
        total = wrapper.total((model["trunk"](mixed) - 1).square().mean(), active)
        total.backward()
        for key in ("T1", "dMRI", ("T1", "dMRI")):
            if not set(active).issuperset([key] if isinstance(key, str) else key):
                for parameter in wrapper.named_parameters(key).values():
                    assert parameter.grad is not None
                    parameter.grad.mul_(RUNS[run][1])
        norms = gradient_norms(wrapper, label=label)
        assert wrapper.last is not None
        yield {"loss": total.item()} | wrapper.last.as_dict() | norms
        optimizer.step()
        optimizer.zero_grad()


def read_events(folder: Path) -> list[Row]:
    """The rows of an event file, as the page shows how to read them."""
    from tensorboard.backend.event_processing import (
        event_accumulator,
    )

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


WANDB = """
import json, sys
from pathlib import Path
import wandb

rows = json.loads(Path(sys.argv[1]).read_text())
settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True)
with wandb.init(project="modaldummy", mode="offline", dir=sys.argv[2], settings=settings) as run:
    for row in rows:
        run.log(row)
"""


def log_offline(rows: list[Row], folder: Path) -> Path:
    """Log in a process of its own; returns the file of the run."""
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    places = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME")
    environment = os.environ | dict.fromkeys(places, str(folder))
    subprocess.run(
        [sys.executable, "-c", WANDB, str(path), str(folder)],
        env=environment | {"WANDB_ERROR_REPORTING": "false"},
        check=True,
        timeout=120,
    )
    (found,) = folder.glob("wandb/offline-run-*/*.wandb")
    return found


def payloads(data: bytes) -> Iterator[bytes]:
    """What is in a run's file: LevelDB's log format, the first block begins with 7 other bytes."""
    block, place, payload = 2**15, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # too little for a header is filled up
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        payload += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield payload
            payload = b""


def read_run(path: Path) -> list[Row]:
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for payload in payloads(path.read_bytes()):
        record = Record.FromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows
