"""The demo: real scans, the promises it shows, the files it writes."""

import functools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from modaldummy import DummyLossWrapper
from modaldummy.__main__ import main
from modaldummy.demo.scans import MODALITIES, SOURCES, load_scans
from modaldummy.demo.summary import ModalitySummary, largest_fraction
from modaldummy.demo.training import Training


@functools.cache
def train(steps: int, *present: str, seed: int = 0, use_dummy: bool = True) -> Training:
    training = Training(load_scans(), present or MODALITIES, seed=seed, use_dummy=use_dummy)
    for _ in training.run(steps):
        pass
    return training


def summaries(training: Training) -> list[ModalitySummary]:
    return [ModalitySummary(training, name) for name in MODALITIES]


def test_scans_are_real_and_standardised() -> None:
    """The shapes are those of the files; nothing is constant, NaN or infinite."""
    scans = load_scans()
    shapes = {name: list(data.shape) for name, data in scans.items()}
    assert shapes == {"T1": [910, 125], "rsfMRI": [1071, 20], "dMRI": [996, 64]}
    for data in scans.values():
        assert data.isfinite().all()
        assert data.mean().item() == pytest.approx(0, abs=1e-3)
        assert data.square().mean().item() == pytest.approx(1, abs=0.06)
        assert data.std(dim=1).min() > 0


def test_the_promises_hold_over_a_run() -> None:
    """No parameter misses a gradient, dummies are small, errors fall, batches differ."""
    records = train(200).records
    assert all(record[f"grad_norm/{name}"] for record in records for name in MODALITIES)
    assert 0 < (largest_fraction(records) or 0) <= 1e-4
    counts = {sum(record[f"active/{name}"] or 0 for name in MODALITIES) for record in records}
    assert counts == {1, 2}
    for summary in summaries(train(200)):
        assert summary.missed == []
        expected = 1e-7 * math.sqrt(summary.num_elements)
        assert summary.inactive == pytest.approx([expected] * summary.num_inactive, rel=1e-4)
        assert (summary.ratio or 0) > 1000
        errors = [error for r in records if (error := r[f"loss/{summary.name}"]) is not None]
        assert sum(errors[-15:]) < 0.9 * sum(errors[:15])


def test_without_the_dummy_the_inactive_miss_theirs() -> None:
    """The same batches; every parameter of every modality misses a gradient at some step."""
    without = train(30, use_dummy=False)
    for summary in summaries(without):
        assert len(summary.missed) == summary.num_params
        assert summary.inactive == []
        assert summary.ratio is None
    for one, other in zip(train(200).records, without.records, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for name in MODALITIES:
            assert one[f"active/{name}"] == other[f"active/{name}"]
            assert other[f"active/{name}"] or f"grad_norm/{name}" not in other


def test_a_seed_repeats_a_run() -> None:
    """Bit for bit; another seed gives another run."""
    assert train(5).records == train(200).records[:5]
    assert train(5).records != train(5, seed=4).records


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user types: exit code, table, and three files."""
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--steps", "12", "--seed", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "0 parameters missed a gradient.\n" in shown
    assert "the bound is 1e-04" in shown
    assert "The doctor says: Nothing wrong in" in shown
    assert all(name in shown for name in MODALITIES)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records == train(12, seed=1).records
    assert any(key.startswith("grad/[inactive]/vision_tower.") for key in records[0])
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "SOURCES.md").read_text() == SOURCES


def test_the_command_without_dummy_names_who_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a folder of its own. A modality that no batch contains still has its towers."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--no-dummy", "--steps", "6", "--modalities", "T1", "T1"]) == 0
    shown = capsys.readouterr().out
    assert "vision_tower.rsfMRI_patch_embed.weight" in shown
    assert "heads.dMRI.bias" in shown
    assert "MD212 error: Inactive modalities never had a gradient" in shown
    assert "bound" not in shown
    assert main(["demo", "--steps", "2", "--modalities", "T1"]) == 0
    written = {path.parent.name for path in tmp_path.glob("*/demo.png")}
    assert written == {"demo-output", "demo-output-no-dummy"}


@pytest.mark.parametrize("options", [{"scale": None}, {"scale": 1.0, "max_fraction": None}])
def test_the_exit_code_tells_when_a_promise_breaks(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with a wrapper that connects nothing, once with one that knows no bound."""
    made = functools.partial(DummyLossWrapper, **options)
    monkeypatch.setattr("modaldummy.demo.training.DummyLossWrapper", made)
    assert main(["demo", "--steps", "3", "--out", str(tmp_path)]) == 1


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before any training."""
    (tmp_path / "file").write_text("")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "file" / "sub")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Cannot write to")
    assert "--out" in shown


@pytest.mark.parametrize("package", ["nibabel", "dipy", "matplotlib", "rich"])
def test_a_missing_package_is_one_sentence(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command that installs it, and no traceback."""
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert shown == f"The demo needs {package}: pip install {package}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "at least 1 and below 2**63, got '0'"),
        (["demo", "--seed", "99999999999999999999"], "below 2**63"),
        (["demo", "--modalities", "PET"], "'PET'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_package_runs_as_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m modaldummy --help`, with the exit status that a shell sees."""
    monkeypatch.setattr(sys, "argv", ["modaldummy", "--help"])
    monkeypatch.delitem(sys.modules, "modaldummy.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("modaldummy", run_name="__main__")
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out
