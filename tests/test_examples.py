"""The examples do under torchrun what they say, on two ranks."""

import json
from pathlib import Path

import pytest

from modaldummy.__main__ import main
from modaldummy.demo.scans import MODALITIES
from tests.launch import TORCHRUN, launched

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 30  # more than an epoch of fsdp2.py
TIMEOUT = 180  # seconds; a quiet machine takes about 7


def torchrun(folder: Path, example: str, *options: str) -> tuple[int, str]:
    """Exit code of an example that runs on two ranks, and what it wrote."""
    run = ["--steps", str(STEPS), *options]
    return launched(folder, EXAMPLES / example, *run, by=TORCHRUN, timeout=TIMEOUT)


def table(shown: str) -> list[str]:
    """What an example prints once it has trained."""
    lines = shown.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("modality"))
    return [line for line in lines[start:] if line.startswith((*MODALITIES, "yes:", "NO:"))]


def test_ddp_trains_while_ranks_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The promises hold on all ranks, and the doctor finds no fault with the log."""
    code, shown = torchrun(tmp_path, "ddp.py")
    assert code == 0, shown
    assert "Findings of preflight: 0\n" in shown
    assert [line.split()[0] for line in table(shown)] == [*MODALITIES, *["yes:"] * 4]
    log = tmp_path / "ddp-output" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(
        range(1, STEPS + 1)
    )
    main(["doctor", "--json", str(log)])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == STEPS
    assert "error" not in {finding["severity"] for finding in found["findings"]}


def test_ddp_that_finds_unused_parameters_trains_too(tmp_path: Path) -> None:
    code, shown = torchrun(tmp_path, "ddp.py", "--find-unused", "--out", "log")
    assert code == 0, shown
    assert "Findings of preflight: 0\n" in shown
    assert [line.split()[0] for line in table(shown)] == [*MODALITIES, *["yes:"] * 4]
    assert (tmp_path / "log" / "metrics.jsonl").exists()


def test_ddp_without_the_dummy_stops(tmp_path: Path) -> None:
    """With one sentence from the example itself, and no traceback of a rank."""
    code, shown = torchrun(tmp_path, "ddp.py", "--no-dummy")
    assert code == 1, shown
    assert shown.count("DDP stopped: 'Expected to have finished reduction") == 1
    assert 'ddp.py", line' not in shown
    assert not (tmp_path / "ddp-output").exists()


@pytest.mark.parametrize("option", [None, "--whole"])
def test_fsdp2_trains(option: str | None, tmp_path: Path) -> None:
    """Ranks differ only where the model is sharded as a whole."""
    code, shown = torchrun(tmp_path, "fsdp2.py", *[option] if option else [])
    assert code == 0, shown
    assert [line.split()[0] for line in table(shown)] == [*MODALITIES, *["yes:"] * 3]
    agreed = f"Ranks held different modalities at 0 of {STEPS} steps." in shown
    assert agreed == (option is None)


def test_fsdp2_refuses_ranks_that_disagree(tmp_path: Path) -> None:
    """With one sentence from the example itself, and no traceback of a rank."""
    code, shown = torchrun(tmp_path, "fsdp2.py", "--disagree")
    assert code == 1, shown
    assert shown.count("Refused: ") == 1
    assert 'fsdp2.py", line' not in shown
    assert any(name in shown for name in MODALITIES)
