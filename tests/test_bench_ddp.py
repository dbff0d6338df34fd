"""The benchmark of DDP: its contenders are right or it stops, and no rank is waited for in vain."""

import csv
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import bench_ddp
import ddp
from fleet import Fleet

CPU = torch.device("cpu")


def test_rows_and_table(tmp_path: Path) -> None:
    """As the command writes and prints them; one contender with a wrong gradient would stop it."""
    command = [sys.executable, bench_ddp.__file__, "--ranks", "2", "--shapes", "tiny"]
    options = ["--rounds", "2", "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == list(ddp.WAYS)
    elements = sum(p.numel() for p in ddp.Model(ddp.SHAPES["tiny"]).parameters())
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        for base, name in (("to_find_unused", ddp.FIND_UNUSED), ("to_naive", ddp.NAIVE)):
            assert float(row[f"{base}_low"]) <= float(row[base]) <= float(row[f"{base}_high"])
            assert row["contender"] != name or float(row[base]) == 1
        found = {key: row[key] for key in ("ranks", "shape", "rounds", "threads", "backend")}
        wanted = {"ranks": "2", "shape": "tiny", "rounds": "2", "threads": "1", "backend": "gloo"}
        assert found == wanted
        assert row["torch"] == torch.__version__
        assert int(row["elements"]) == elements
        assert row["peak_MB"] == ""
    assert list(rows[0])[-6:] == ["device", "threads", "torch", "python", "commit", "date"]
    assert "MALLOC_TRIM_THRESHOLD_" in done.stdout
    assert "2 ranks, gloo, tiny: three towers and a trunk, each 1 layer of width 24" in done.stdout
    assert "2 ranks, tiny, scale=None / naive  0.90" in done.stdout


def wrong(rank: int) -> Any:
    with patch.dict(ddp.WAYS, {"ours": ddp.Way(ddp.line(2 * ddp.SCALE).make)}):
        return bench_ddp.timed(rank, "tiny", 1, "cpu")


def test_a_wrong_gradient_stops_the_benchmark() -> None:
    """Twice the dummy that was announced is found before anything is timed."""
    with Fleet(1) as one, pytest.raises(RuntimeError, match="with `ours` is off by") as raised:
        one.ask(wrong)
    assert "`towers." in str(raised.value)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak is known here")
def test_peak_memory_is_that_of_the_steps() -> None:
    """At least the gradients, far from all that the process has."""
    found = bench_ddp.peak(1, "norms", "ours", CPU)
    assert found is not None
    gradients = sum(4 * p.numel() for p in ddp.Model(ddp.SHAPES["norms"]).parameters())
    assert gradients / 1e6 < found < 100


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("towers.rsfMRI.0.linear1.weight", -1e-7),  # on no rank: no dummy at all
        ("towers.T1.0.linear1.weight", 5e-8),  # on one of two: the dummy of two
        ("trunk.1.bias", 2e-5),
        ("trunk.1.bias", float("nan")),
    ],
)
def test_what_is_compared(name: str, change: float) -> None:
    """One element that is off, in any part of the model, is enough."""
    model = ddp.Model(ddp.SHAPES["tiny"])
    share = {"T1": 0.5, "rsfMRI": 1.0, "dMRI": 0.5, "trunk": 0.0}
    expected = {}
    for parameter_name, parameter in model.named_parameters():
        part = next(part for part in share if f".{part}." in f".{parameter_name}")
        expected[parameter_name] = torch.full_like(parameter, 0.0 if part == "rsfMRI" else 1e-3)
        parameter.grad = expected[parameter_name] + share[part] * ddp.SCALE
    ddp.compare("ours", ddp.SCALE, ["T1", "dMRI"], expected, model)
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[-1] += change
    with pytest.raises(RuntimeError, match=name):
        ddp.compare("ours", ddp.SCALE, ["T1", "dMRI"], expected, model)


def test_ranks_differ_and_each_has_everything_in_turn() -> None:
    for num_ranks in (2, 3, 4):
        for step in range(3):
            held = [ddp.modality(rank, step) for rank in range(num_ranks)]
            assert all(one != other for one, other in pairwise(held))
    assert {ddp.modality(1, step) for step in range(3)} == set(ddp.NAMES)


def test_targets_are_of_the_best_that_hands_out_a_gradient() -> None:
    def row(contender: str, unused: float, naive: float) -> dict[str, Any]:
        found: dict[str, Any] = {"ranks": 2, "shape": "vit", "contender": contender}
        found |= {"to_find_unused": unused, "to_find_unused_low": unused - 0.1}
        return found | {"to_naive": naive, "to_naive_low": naive - 0.1}

    names = (ddp.FIND_UNUSED, "ours", "ours, gradient_only", "ours, scale=None")
    rows = [row(*line) for line in zip(names, (1, 1.2, 1.1, 0.5), (1, 1, 1, 0.8), strict=True)]
    best = "2 ranks, vit, ours, gradient_only / find_unused"
    assert bench_ddp.targets(rows) == [
        (best, 1.05, 1.1, 1.0),
        (f"{best}, goal", 0.95, 1.1, 1.0),
        ("2 ranks, vit, scale=None / naive", 0.9, 0.8, pytest.approx(0.7)),
    ]


def test_too_few_gpus_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not bench_ddp.enough(2, torch.device("cuda"))
    assert "2 ranks: not measured. NCCL needs a GPU for each rank" in capsys.readouterr().out
    assert bench_ddp.enough(1, torch.device("cuda"))
    assert bench_ddp.enough(64, CPU)
