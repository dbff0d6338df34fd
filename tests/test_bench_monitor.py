"""The benchmark of watching: its contenders find the same norms, and its counts are counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bench_monitor
from measure import Contender


def test_contenders_find_the_same_norms() -> None:
    tower = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    found = {name: way.forward() for name, way in bench_monitor.contenders(tower).items()}
    assert found["missing_gradients"] == {}
    loop = found["loop"]
    assert len(loop) == 6
    assert found["foreach"] == pytest.approx(loop)
    for name in ("gradient_norms", "gradient_norms, label=False"):
        by_parameter = {key.rpartition("/")[2]: norm for key, norm in found[name].items()}
        for key, norm in loop.items():
            assert by_parameter[key.removeprefix("grad/")] == pytest.approx(norm)


def test_host_waits_are_counted() -> None:
    def three() -> None:
        numbers = torch.ones(2)
        numbers.tolist()
        numbers[0].item()
        numbers.numpy()

    assert bench_monitor.host_waits(Contender(three, None, lambda: None)) == 3
    entrants = bench_monitor.contenders(nn.Linear(2, 2))
    waits = {name: bench_monitor.host_waits(entrant) for name, entrant in entrants.items()}
    assert waits == {
        "loop": 4,
        "foreach": 1,
        "gradient_norms": 1,
        "gradient_norms, label=False": 1,
        "missing_gradients": 1,
    }


def test_rows(tmp_path: Path) -> None:
    """As the command prints and writes them."""
    script = Path(bench_monitor.__file__)
    options = ["--device", "cpu", "--rounds", "1", "--cases", "1,000 x (16,)", "--json"]
    command = [sys.executable, str(script), *options, "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [row["contender"] for row in rows] == list(bench_monitor.contenders(nn.Linear(1, 1)))
    assert rows[0]["to_loop"] == 1
    assert {row["host_waits"] for row in rows} == {1002, 1}
    assert (tmp_path / "rows.csv").read_text().count("\n") == 6


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_monitor.measure("1,000 x (16,)", 1, torch.device("cpu"))
    bench_monitor.print_table(rows)
    shown = capsys.readouterr().out
    assert "| 1,000 x (16,) | loop | " in shown
    assert shown.count("| 1 |\n") == 4
