"""`python -m modaldummy info` says what is here and what is in use."""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

from modaldummy import __main__ as command


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """First word of each line to the rest of it."""
    assert command.main(["info"]) == 0
    printed = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in printed}


def test_versions_and_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys)
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["cpu"] == "plain torch"
    assert list(found)[:5] == ["modaldummy", "torch", "numpy", "triton", "python"]


@pytest.mark.parametrize("wanted", ["torch", "triton", "cuda"])
def test_what_each_cuda_device_uses(
    wanted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("MODALDUMMY_REDUCTIONS", wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = lines(capsys)
    uses = {"torch": "plain torch", "triton": "fused Triton kernels"}
    use = uses.get(wanted, "MODALDUMMY_REDUCTIONS must be torch or triton, got 'cuda'.")
    assert found["cuda:0"] == found["cuda:1"] == use


def test_without_triton_and_without_metadata(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a source tree that is only on PYTHONPATH."""

    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(command, "version", version)
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "triton" else name)
    found = lines(capsys)
    assert found["triton"] == "not installed"
    assert found["modaldummy"] == "not installed, but importable"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `python -m modaldummy info | head -1`."""
    command = [sys.executable, "-m", "modaldummy", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 141


def test_output_that_nobody_reads_goes_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a process: what is printed afterwards must not raise once more."""

    def run(arguments: argparse.Namespace) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(command, "_run", run)
    path = tmp_path / "printed"
    with path.open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert command.main(["info"]) == 141
        sys.stdout.write("more")
        sys.stdout.flush()
    assert path.read_text() == ""
