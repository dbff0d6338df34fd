"""The benchmarks run, their contenders do what they are said to do, their rows are whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bench_sum
import gpu
import measure
import targets
from shapes import SHAPES

FOLDER = Path(measure.__file__).parent
# What a parameter holds after two steps that accumulate, or after one; None where there is none.
GRADIENT = {
    "naive loop": 1e-7,
    "0 * sum": 0.0,
    "stack(sum)": 1e-7,
    "ours": 1e-7,
    "ours, gradient_only": 1e-7,
    "ours, scale=0.0": 0.0,
    "ours, scale=None": None,
}


@pytest.mark.parametrize("mode", bench_sum.MODES)
def test_contenders_leave_the_gradients_that_they_should(mode: str) -> None:
    tower = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    entrants = bench_sum.contenders(tower, mode, compiled=False)
    for name, expected in GRADIENT.items():
        entrants["naive loop"].reset()
        for parameter in tower.parameters():
            parameter.grad = None
        for _ in range(2):
            entrants[name].reset()
            entrants[name].backward(entrants[name].forward())  # type: ignore[misc]
        times = 1 if mode == "fresh" else 2
        for parameter in tower.parameters():
            if expected is None and mode == "fresh":
                assert parameter.grad is None
            else:
                assert parameter.grad is not None
                wanted = torch.full_like(parameter, times * (expected or 0.0))
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=0)


def test_the_limit_reads_and_writes_every_byte() -> None:
    params = [nn.Parameter(torch.ones(5, 2)), nn.Parameter(torch.ones(3))]
    for mode in bench_sum.MODES:
        for name in ("limit", "limit, fill each"):
            contender = bench_sum.limits(params, mode, lambda: None)[name]
            assert contender.forward() == 13
            filled = contender.backward(None)  # type: ignore[misc]
            filled = filled if isinstance(filled, list) else [filled]
            assert sum(part.numel() for part in filled) == 13
            assert all((part == 1e-7).all() for part in filled)


def test_work_counts_operators_and_memory() -> None:
    contender = measure.Contender(
        lambda: torch.ones(1000, requires_grad=True) * 2, lambda out: out.sum().backward(), int
    )
    done = measure.work(contender, torch.device("cpu"))
    assert 4 <= done.operators <= 12
    assert done.launches is None
    assert 3 * 4000 <= done.peak_bytes < 6 * 4000


def test_turns_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender runs twice a round, and the second run is the one that counts."""
    ran: list[str] = []

    def entrant(name: str) -> measure.Contender:
        return measure.Contender(lambda: ran.append(name), lambda _: None, lambda: None)

    found = measure.take_turns({n: entrant(n) for n in "abc"}, 7, torch.device("cpu"))
    assert ran[::2] == ran[1::2]
    assert all(sorted(ran[i : i + 6 : 2]) == list("abc") for i in range(0, len(ran), 6))
    assert len({tuple(ran[i : i + 6]) for i in range(0, len(ran), 6)}) > 1
    assert all(times.both.shape == (7,) for times in found.values())


def test_ratios_are_within_rounds() -> None:
    """A round that was slow for all does not count as slow for one."""
    slow = measure.Times(np.array([1.0, 10.0, 1.0]), np.zeros(3))
    fast = measure.Times(np.array([0.5, 5.0, 0.5]), np.zeros(3))
    assert measure.ratio(slow, fast, "both") == 2


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(FOLDER / script), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_bench_sum_writes_a_row_for_each_measurement(tmp_path: Path) -> None:
    paths = tmp_path / "rows.csv", tmp_path / "picture.png"
    options = ("--device", "cpu", "--shapes", "patches", "--seconds", "0.05", "--no-compile")
    table = run("bench_sum.py", *options, "--csv", str(paths[0]), "--plot", str(paths[1]))
    rows = gpu._read(paths[0])
    measured = {(row["gradients"], row["contender"], row["phase"]) for row in rows}
    names = {*GRADIENT, "one element each", "limit", "limit, fill each"}
    phases = ("forward", "backward", "both")
    wanted = {(mode, name, phase) for mode in bench_sum.MODES for name in names for phase in phases}
    wanted |= {(mode, "_foreach_norm", "forward") for mode in bench_sum.MODES}
    assert measured == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["torch"] == torch.__version__
        assert int(row["elements"]) == sum(p.numel() for p in SHAPES["patches"]().parameters())
        if row["contender"] == "limit":
            assert float(row["to_limit"]) == 1
    assert "patches: 6 tensors" in table
    assert "MALLOC_TRIM_THRESHOLD_" in table
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_bench_step_says_how_sure_it_is() -> None:
    rows: list[dict[str, Any]] = json.loads(
        run("bench_step.py", "--device", "cpu", "--width", "16", "--rounds", "2", "--json")
    )
    by_name = {row["contender"]: row for row in rows}
    assert {"bare", "naive line", "ours", "ours, scale=None"} <= by_name.keys()
    for row in rows:
        for base in ("to_bare", "to_naive", "to_unheld"):
            assert row[f"{base}_low"] <= row[base] <= row[f"{base}_high"]
        assert (row["to_unheld"] == 1) == (", hold" not in row["contender"])
    assert by_name["ours, scale=None"]["peak_MB"] < by_name["ours"]["peak_MB"]


def test_targets_take_the_best_process_and_name_what_is_worst() -> None:
    def rows(slower: float) -> list[dict[str, Any]]:
        names = ("naive loop", "0 * sum", "limit", targets.FLAT_AND_FILLS, *targets.OURS)
        return [
            {"shape": s, "gradients": m, "contender": c, "phase": p}
            | {"p50_ms": (slower if c in targets.OURS else 1.0) * (9 if s == "lora" else 1)}
            | {"tensors": 1}
            for s in (*targets.SHAPES, *targets.GROWTH)
            for m in bench_sum.MODES
            for c in names
            for p in ("forward", "both")
        ]

    found = targets.sum_targets([rows(3.0), rows(2.0)])
    assert found[0] == ("300 x (768,), both / naive", 0.38, 2.0)
    assert all(value == 2.0 for _, _, value in found[:-1])
    assert found[-1][2] == pytest.approx(100)  # the same time for 100 and 10,000 tensors


def test_a_target_is_missed_only_beyond_chance() -> None:
    row = {"contender": "ours", "to_naive": 1.01, "to_naive_low": 0.99, "to_naive_high": 1.02}
    ((what, aim, found, low),) = targets.step_targets([row])
    assert (what, aim) == ("training step, ours / naive (0.99 to 1.02)", 1.0)
    assert targets.verdict(found, low, aim) == "within chance"
    held = {"contender": "ours, hold", "to_unheld": 0.9}
    held |= {"to_unheld_low": 0.89, "to_unheld_high": 0.91}
    assert targets.step_targets([held]) == [
        ("training step, ours, hold / without hold (0.890 to 0.910)", 1.0, 0.9, 0.89)
    ]
    assert targets.verdict(0.99, 0.97, 1.0) == "met"
    assert targets.verdict(1.02, 1.01, 1.0) == "MISSED"


def test_the_report_judges_what_was_measured(tmp_path: Path) -> None:
    keys = {"gradients": "fresh", "contender": "ours"}
    rows = [
        keys | {"shape": "small", "phase": "both", "to_naive": "0.05"},
        keys | {"shape": "billion", "phase": "forward", "share_of_copy": "0.8"},
    ]
    assert [verdict for _, _, verdict in gpu.targets(rows)] == ["met", "MISSED"]
    failed = gpu.Outcome("tests", "stopped after 150 s", 150, ok=False)
    text = gpu.report(tmp_path, [failed], torch.device("cpu"))
    assert "FAILED: stopped after 150 s" in text
