"""The examples for loops, Lightning, Fabric and Accelerate do what they say."""

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from modaldummy.__main__ import main
from modaldummy.demo.scans import MODALITIES
from tests.integrations.lightning_modules import QUIET
from tests.launch import TORCHRUN, launched

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 300  # seconds; a quiet machine takes about 10, and for inductor about 30

pytestmark = [*map(pytest.mark.filterwarnings, QUIET)]


@pytest.fixture
def accelerate() -> Iterator[None]:
    """Accelerate keeps a state for the whole process."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Examples write where they are called."""
    monkeypatch.chdir(tmp_path)


def call(name: str, *options: str) -> int:
    """Exit code of an example in this process."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *options])
        code: int = example.main()
    return code


def errors_of(log: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Codes of the errors that the doctor finds in a log."""
    main(["doctor", "--json", log])
    found = json.loads(capsys.readouterr().out)
    return {f["code"] for f in found["findings"] if f["severity"] == "error"}


def promises(shown: str) -> list[str]:
    """Verdict on each promise."""
    return re.findall(r"^(yes|NO): ", shown, re.M)


def test_custom_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("custom_loop", "--steps", "40") == 0
    assert promises(capsys.readouterr().out) == ["yes"]


def test_custom_loop_adopts_the_wrapper_in_five_lines() -> None:
    lines = (EXAMPLES / "custom_loop.py").read_text().splitlines()
    marked = [line for line in lines if re.search(r"  # \d", line)]
    assert [line.partition("  # ")[2][0] for line in marked] == list("12345")
    ours = ("DummyLossWrapper", "hold_inactive", "wrapper", "missing_gradients")
    assert [line for line in lines if any(name in line for name in ours)] == marked


# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_compile_amp(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert call("compile_amp", "--steps", "40", "--dtype", dtype, "--backend", "eager") == 0
    shown = capsys.readouterr().out
    assert promises(shown) == ["yes"] * 4
    assert "5 sets of modalities took 5 graphs" in shown


def test_lightning_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    """The doctor reads what Lightning's own logger wrote."""
    assert call("lightning_trainer", "--steps", "30") == 0
    shown = capsys.readouterr().out
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    with Path("lightning-output/metrics.csv").open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == set(range(30))
    assert errors_of("lightning-output/metrics.csv", capsys) == set()


def test_fabric(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("fabric", "--steps", "30", "--precision", "bf16-mixed") == 0
    shown = capsys.readouterr().out
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4


@pytest.mark.usefixtures("accelerate")
def test_accelerate_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("accelerate_loop", "--steps", "30") == 0
    shown = capsys.readouterr().out
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    assert len(Path("accelerate-output/metrics.jsonl").read_text().splitlines()) == 30
    assert errors_of("accelerate-output/metrics.jsonl", capsys) == set()


# A port of its own choice.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--main_process_port=0"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "example", "options"),
    [
        (TORCHRUN, "lightning_trainer.py", []),
        (TORCHRUN, "lightning_trainer.py", ["--find-unused"]),
        (TORCHRUN, "fabric.py", []),
        (TORCHRUN, "accelerate_loop.py", []),
        (ACCELERATE, "accelerate_loop.py", []),
    ],
    ids=["lightning", "lightning, find unused", "fabric", "accelerate, torchrun", "accelerate"],
)
def test_two_ranks(
    launcher: Sequence[str], example: str, options: list[str], tmp_path: Path
) -> None:
    """Both ranks keep the promises with different modalities."""
    run = ["--steps", "30", *options]
    code, shown = launched(tmp_path, EXAMPLES / example, *run, by=launcher, timeout=TIMEOUT)
    assert code == 0, shown
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    counts = [re.search(rf"^{name} +\[(\d+), (\d+)\]", shown, re.M) for name in MODALITIES]
    assert any(count is not None and count[1] != count[2] for count in counts)


@pytest.mark.long
def test_compile_amp_with_inductor(tmp_path: Path) -> None:
    script = EXAMPLES / "compile_amp.py"
    code, shown = launched(tmp_path, script, "--steps", "2", timeout=TIMEOUT)
    assert code == 0, shown
    assert promises(shown) == ["yes"] * 4
    assert "2 sets of modalities took 2 graphs" in shown
