"""`examples/umbrella` keeps the promises of its page: one run, and the same run resumed."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modaldummy import diagnose
from tests.launch import TORCHRUN, launched

EXAMPLE = Path(__file__).parents[2] / "examples/umbrella"
STEPS = 40
TIMEOUT = 300  # seconds; a quiet machine takes about 15


def command(folder: Path, *options: str) -> list[str]:
    settings = (f"out={folder}", f"steps={STEPS}", "save_every=20", "generate_every=40")
    set_them = [argument for setting in settings for argument in ("--set", setting)]
    return ["--config", str(EXAMPLE / "all.yaml"), *set_them, *options]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a healthy run: one a step, no gradient missing, bounded, and the loss falls."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in log if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["missing_gradients"] for row in rows) == 0
    assert 0 < max(row["modaldummy/fraction"] for row in rows) <= 1e-4
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    findings = diagnose(folder / "trainer_state.json")
    assert "error" not in {finding.severity for finding in findings}
    return rows


def test_a_run_is_healthy_and_can_be_resumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """The resumed run ends bit for bit with the same parameters, optimizer state and log."""
    monkeypatch.syspath_prepend(EXAMPLE)
    main = import_module("train").main
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(command(whole)) == 0
    shutil.copytree(whole / "checkpoint-20", resumed / "checkpoint-20")
    assert main(command(resumed, "--resume")) == 0
    shown = capsys.readouterr().out
    assert shown.count("yes: ") == 8
    assert "step 40, rsfMRI: right in 84 crops: drift" in shown
    assert log_of(resumed) == log_of(whole)
    ends = [folder / f"checkpoint-{STEPS}" for folder in (resumed, whole)]
    ours, expected = (load_file(end / "model.safetensors") for end in ends)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    states = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.long
def test_two_ranks_are_healthy(tmp_path: Path) -> None:
    """A modality that is inactive here has real gradients if it is active on the other rank."""
    script = EXAMPLE / "train.py"
    code, shown = launched(tmp_path, script, *command(tmp_path), by=TORCHRUN, timeout=TIMEOUT)
    assert code == 0, shown
    rows = log_of(tmp_path)
    assert {row["grad_ranks"] for row in rows} == {2}
    inactive = [row["grad_norm/T1"] for row in rows if not row["modaldummy/active/T1"]]
    assert min(inactive) < 1e-4 < max(inactive)
