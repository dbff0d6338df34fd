"""The demo: real scans, the promises it shows, the files it writes."""

import functools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from modaldummy import DummyLossWrapper
from modaldummy.__main__ import main
from modaldummy.demo.scans import MODALITIES, SOURCES, load_scans
from modaldummy.demo.summary import largest_fraction, summarise
from modaldummy.demo.training import Training


@pytest.fixture(scope="module")
def scans() -> dict[str, Tensor]:
    return load_scans()


def train(scans: dict[str, Tensor], steps: int, **options: Any) -> Training:
    training = Training(scans, options.pop("present", MODALITIES), **{"seed": 0, **options})
    for _ in training.run(steps):
        pass
    return training


def test_scans_are_real_and_standardised(scans: dict[str, Tensor]) -> None:
    """The shapes are those of the files; nothing is constant, NaN or infinite."""
    assert {name: list(data.shape) for name, data in scans.items()} == {
        "T1": [910, 125],
        "rsfMRI": [1071, 20],
        "dMRI": [996, 64],
    }
    for data in scans.values():
        assert data.isfinite().all()
        assert data.mean().item() == pytest.approx(0, abs=1e-3)
        assert data.square().mean().item() == pytest.approx(1, abs=0.06)
        assert data.std(dim=1).min() > 0


def test_nobody_misses_a_gradient(scans: dict[str, Tensor]) -> None:
    """The promises over 200 steps, from the records alone."""
    training = train(scans, 200, use_dummy=True)
    assert all(record[f"grad_norm/{name}"] for record in training.records for name in MODALITIES)
    for summary in summarise(training):
        assert summary.missed == ()
        assert summary.active
        expected = 1e-7 * math.sqrt(summary.num_elements)
        assert summary.inactive == pytest.approx([expected] * summary.num_inactive, rel=1e-4)
        assert summary.ratio is not None
        assert summary.ratio > 1000
    fraction = largest_fraction(training.records)
    assert fraction is not None
    assert 0 < fraction <= 1e-4


def test_it_learns(scans: dict[str, Tensor]) -> None:
    """Late errors lie below early ones, so there is something to connect."""
    records = train(scans, 200, use_dummy=True).records
    for name in MODALITIES:
        errors = [error for r in records if (error := r[f"loss/{name}"]) is not None]
        assert sum(errors[-15:]) < 0.9 * sum(errors[:15])


def test_without_the_dummy_the_inactive_miss_theirs(scans: dict[str, Tensor]) -> None:
    """The same batches; every parameter of every modality misses a gradient at some step."""
    with_dummy, without = (train(scans, 30, use_dummy=flag) for flag in (True, False))
    for summary in summarise(without):
        assert len(summary.missed) == summary.num_params
        assert summary.inactive == ()
    for one, other in zip(with_dummy.records, without.records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for name in MODALITIES:
            assert one[f"active/{name}"] == other[f"active/{name}"]
            assert other[f"active/{name}"] or f"grad_norm/{name}" not in other
    assert largest_fraction(without.records) is None


def test_a_modality_that_is_never_active_still_gets_gradients(scans: dict[str, Tensor]) -> None:
    training = train(scans, 10, use_dummy=True, present=["T1"])
    by_name = {summary.name: summary for summary in summarise(training)}
    assert by_name["T1"].num_inactive == 0
    assert by_name["dMRI"].active == ()
    assert len(by_name["dMRI"].inactive) == 10
    assert by_name["T1"].ratio is by_name["dMRI"].ratio is None


def test_batches_contain_one_modality_or_two(scans: dict[str, Tensor]) -> None:
    records = train(scans, 100, use_dummy=True).records
    counts = [sum(record[f"active/{name}"] or 0 for name in MODALITIES) for record in records]
    assert set(counts) == {1, 2}


def test_a_seed_repeats_a_run(scans: dict[str, Tensor]) -> None:
    """Bit for bit; another seed gives another run."""
    first, again, other = (train(scans, 5, use_dummy=True, seed=seed) for seed in (3, 3, 4))
    assert first.records == again.records
    assert first.records != other.records


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user types: exit code, table, and three files."""
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--steps", "12", "--seed", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "0 parameters missed a gradient." in shown
    assert "the bound is 1e-04" in shown
    assert "The doctor says: Nothing wrong in" in shown
    assert all(name in shown for name in MODALITIES)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(record[f"grad_norm/{name}"] > 0 for record in records for name in MODALITIES)
    assert any(key.startswith("grad/[inactive]/vision_tower.") for key in records[0])
    assert records[0]["modaldummy/fraction"] <= 1e-4
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "SOURCES.md").read_text() == SOURCES


def test_command_without_dummy_names_who_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--no-dummy", "--steps", "6", "--modalities", "T1", "dMRI"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "vision_tower.rsfMRI_patch_embed.weight" in shown
    assert "heads.dMRI.bias" in shown
    assert "MD212 error: Inactive modalities never had a gradient" in shown
    assert "bound" not in shown


def test_without_out_each_kind_of_run_has_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--no-dummy"]):
        assert main(["demo", "--steps", "2", "--modalities", "T1", "T1", *extra]) == 0
    written = {path.parent.name for path in tmp_path.glob("*/demo.png")}
    assert written == {"demo-output", "demo-output-no-dummy"}


@pytest.mark.parametrize("broken", ["missing", "bound"])
def test_the_exit_code_tells_when_a_promise_breaks(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with a wrapper that connects nothing, once with one that knows no bound."""
    options = {"scale": None} if broken == "missing" else {"scale": 1.0, "max_fraction": None}
    monkeypatch.setattr(
        "modaldummy.demo.training.DummyLossWrapper", functools.partial(DummyLossWrapper, **options)
    )
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
    assert shown == f"The demo needs {package}: pip install 'modaldummy[demo]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "at least 1 and below 2**63, got '0'"),
        (["demo", "--steps", "many"], "got 'many'"),
        (["demo", "--seed", "-1"], "at least 0"),
        (["demo", "--seed", "99999999999999999999"], "below 2**63"),
        (["demo", "--modalities", "PET"], "'PET'"),
        ([], "COMMAND"),
        (["train"], "'train'"),
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
