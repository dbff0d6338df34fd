"""The examples keep the promises that they print."""

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

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 30  # more than an epoch of fsdp2.py
TIMEOUT = 300  # seconds; a quiet machine takes about 10, and for inductor about 30
# With a free port.
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--main_process_port=0",
)

pytestmark = [*map(pytest.mark.filterwarnings, QUIET)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """Examples write into the current directory, and Accelerate keeps one state per process."""
    monkeypatch.chdir(tmp_path)
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


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


def on_two_ranks(example: str, *options: str, by: Sequence[str] = TORCHRUN, code: int = 0) -> str:
    """What an example writes on two ranks; it has to end with this exit code."""
    run = ["--steps", str(STEPS), *options]
    found, shown = launched(Path(), EXAMPLES / example, *run, by=by, timeout=TIMEOUT)
    assert found == code, shown
    return shown


def errors_in(log: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Codes of the errors that the doctor finds in a log of all steps."""
    main(["doctor", "--json", log])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == STEPS
    return {f["code"] for f in found["findings"] if f["severity"] == "error"}


def promises(shown: str) -> list[str]:
    """The verdict on each promise."""
    return re.findall(r"^(yes|NO): ", shown, re.M)


# --- one process ---------------------------------------------------------------------------------


def test_custom_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """It adopts the wrapper in five lines, which it numbers."""
    assert call("custom_loop", "--steps", "40") == 0
    assert promises(capsys.readouterr().out) == ["yes"]
    lines = (EXAMPLES / "custom_loop.py").read_text().splitlines()
    marked = [line for line in lines if re.search(r"  # \d", line)]
    assert [line.partition("  # ")[2][0] for line in marked] == list("12345")
    ours = ("DummyLossWrapper", "hold_inactive", "wrapper", "missing_gradients")
    assert [line for line in lines if any(name in line for name in ours)] == marked


# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compile_amp(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert call("compile_amp", "--steps", "40", "--dtype", dtype, "--backend", "eager") == 0
    shown = capsys.readouterr().out
    assert promises(shown) == ["yes"] * 4
    assert "5 sets of modalities took 5 graphs" in shown


@pytest.mark.long
def test_compile_amp_with_inductor() -> None:
    script = EXAMPLES / "compile_amp.py"
    code, shown = launched(Path(), script, "--steps", "2", timeout=TIMEOUT)
    assert code == 0, shown
    assert promises(shown) == ["yes"] * 4
    assert "2 sets of modalities took 2 graphs" in shown


@pytest.mark.parametrize(
    ("example", "options", "log"),
    [
        ("lightning_trainer", [], "lightning-output/metrics.csv"),
        ("fabric", ["--precision", "bf16-mixed"], None),
        ("accelerate_loop", [], "accelerate-output/metrics.jsonl"),
    ],
)
def test_one_process(
    example: str, options: list[str], log: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor finds no error in what it logs."""
    assert call(example, "--steps", str(STEPS), *options) == 0
    shown = capsys.readouterr().out
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    assert log is None or errors_in(log, capsys) == set()


# --- two ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [[], pytest.param(["--find-unused"], marks=pytest.mark.long)], ids=str
)
def test_ddp(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = on_two_ranks("ddp.py", *option)
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    assert errors_in("ddp-output/metrics.jsonl", capsys) == set()


@pytest.mark.long
@pytest.mark.parametrize(
    ("example", "option", "message"),
    [
        ("ddp.py", "--no-dummy", "DDP stopped: 'Expected to have finished reduction"),
        ("fsdp2.py", "--no-shadow", "Refused: "),
        ("vlm_zero3.py", "--no-shadow", "Stopped on rank 0: "),
    ],
)
def test_a_run_that_cannot_go_on_says_so_once(example: str, option: str, message: str) -> None:
    """Without a traceback of a rank."""
    shown = on_two_ranks(example, option, code=1)
    assert shown.count(message) == 1
    assert f'{example}", line' not in shown


def test_fsdp2() -> None:
    shown = on_two_ranks("fsdp2.py")
    assert promises(shown) == ["yes"] * 3
    assert f"Ranks had different modalities at 0 of {STEPS} steps." not in shown


@pytest.mark.long
def test_vlm_zero3() -> None:
    """The counts are those of what ranks drew."""
    shown = on_two_ranks("vlm_zero3.py")
    assert promises(shown) == ["yes"] * 3
    counts = re.findall(r"image active (\d+), shadowed (\d+), held (\d+)", shown)
    assert [int(active) + int(shadowed) for active, shadowed, _ in counts] == [STEPS] * 2
    assert "Ranks had different modalities at 0 of" not in shown
    assert all(0 < int(held) < STEPS for *_, held in counts)


@pytest.mark.long
@pytest.mark.parametrize(
    ("example", "options", "launcher"),
    [
        ("lightning_trainer.py", [], TORCHRUN),
        ("lightning_trainer.py", ["--find-unused"], TORCHRUN),
        ("fabric.py", [], TORCHRUN),
        ("accelerate_loop.py", [], ACCELERATE),
    ],
)
def test_frameworks(example: str, options: list[str], launcher: Sequence[str]) -> None:
    """Ranks have different modalities."""
    shown = on_two_ranks(example, *options, by=launcher)
    assert "Findings of preflight: 0\n" in shown
    assert promises(shown) == ["yes"] * 4
    counts = [re.search(rf"^{name} +\[(\d+), (\d+)\]", shown, re.M) for name in MODALITIES]
    assert any(count is not None and count[1] != count[2] for count in counts)
