"""The rebuilt original over 200 steps: one process, two processes, and resumed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modaldummy import diagnose
from tests.launch import TORCHRUN, launched

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples/umbrella"
STEPS = 200
TIMEOUT = 240  # seconds; a quiet machine takes about 15
HEALTHY = ["0 gradients were missing at 200 steps", "the dummy was", "the loss fell", "the doctor"]


def train(folder: Path, *options: str, by: Sequence[str] = ()) -> str:
    """What a run in `folder` wrote; it has to end with exit code 0."""
    run = ["--config", str(EXAMPLE / "all.yaml"), "--set", f"out={folder}", *options]
    code, shown = launched(folder, EXAMPLE / "train.py", *run, by=by, timeout=TIMEOUT)
    assert code == 0, shown
    return shown


def log_of(folder: Path) -> list[dict[str, Any]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


def promises(shown: str) -> list[str]:
    lines = shown.splitlines()
    assert not [line for line in lines if line.startswith("NO: ")]
    return [line.removeprefix("yes: ") for line in lines if line.startswith("yes: ")]


def check_healthy(folder: Path, shown: str) -> None:
    """The claims, from the log alone, and what the run itself says of them."""
    rows = log_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["missing_gradients"] for row in rows) == 0
    assert max(row["modaldummy/fraction"] for row in rows) <= 1e-4
    losses = [row["loss"] for row in rows]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    severities = {finding.severity for finding in diagnose(folder / "trainer_state.json")}
    assert severities <= {"info"}
    assert "The doctor says: healthy." in shown
    told = promises(shown)
    assert all(line.startswith(start) for line, start in zip(told, HEALTHY, strict=False))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def test_one_process_is_healthy(whole: tuple[Path, str]) -> None:
    """And learns: held-out crops are described far better than by the commonest words."""
    folder, shown = whole
    check_healthy(folder, shown)
    assert len(promises(shown)) == 4
    lines = [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [s for s in (50, 100, 150, 200) for _ in range(3)]
    last = {
        fact: right / line["of"] for line in lines[-3:] for fact, right in line["right"].items()
    }
    assert last["brighter"] > 0.8
    assert last["peak"] > 0.6
    assert last["signal"] > 0.8


def test_two_processes_are_healthy(tmp_path: Path) -> None:
    """Ranks have different modalities, and end with the same parameters."""
    shown = train(tmp_path, by=TORCHRUN)
    check_healthy(tmp_path, shown)
    assert promises(shown)[4:] == ["all ranks end with the same parameters"]
    assert shown.count("The doctor says") == 1
    rows = log_of(tmp_path)
    assert {row["grad_ranks"] for row in rows} == {2}
    # An embedding that is inactive here has a real gradient where it is active on the other rank.
    inactive = [row["grad_norm/T1"] for row in rows if not row["modaldummy/active/T1"]]
    assert min(inactive) < 1e-4 < max(inactive)


def test_a_resumed_run_equals_the_uninterrupted_one(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    """From the checkpoint at step 100: parameters, optimizer and log, bit for bit."""
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-100", tmp_path / "checkpoint-100")
    shown = train(tmp_path, "--resume")
    assert "step 150" in shown
    assert "step 100" not in shown
    rows, expected = log_of(tmp_path), log_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == expected
    one, other = (f / "checkpoint-200" for f in (tmp_path, folder))
    resumed, uninterrupted = (load_file(f / "model.safetensors") for f in (one, other))
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    states = [torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in (one, other)]
    assert states[0].keys() == states[1].keys()
    for place, state in states[0].items():
        assert all(torch.equal(value, states[1][place][key]) for key, value in state.items())
