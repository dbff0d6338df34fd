"""What a Trainer with the mixin logs: the report, and gradient norms before clipping."""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from modaldummy import DummyLossWrapper, gradient_norms
from modaldummy.integrations import gradient_norm_callback
from modaldummy.integrations.accumulated_report import WeightedReport, accumulated_report
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    MAP,
    SCALE,
    Recorder,
    Scanner,
    arguments,
    labels_of,
    mixed,
    own,
    plain,
    rows_of,
    scanner,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = {"gradient_accumulation_steps": 4}


def reports_of(model: Scanner, losses: Mapping[float, list[str]]) -> list[WeightedReport]:
    """Of batches with these losses and modalities, a quarter of a step each."""
    wrapper, found = DummyLossWrapper(model, MAP, 1e-5), []
    for loss, names in losses.items():
        wrapper.total(torch.tensor(loss), names)
        assert wrapper.last is not None
        found.append(WeightedReport(wrapper.last, 0.25))
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_accumulated_reports_are_combined(turned: bool) -> None:
    """Losses and dummies by their shares; the largest fraction; what no batch contains."""
    model = scanner()
    reports = reports_of(model, {8.0: ["T1"], -4.0: ["T1", "dMRI"]})
    first, second = (batch.report for batch in reports)
    row = accumulated_report(wrapper_of(model), reports[::-1] if turned else reports)
    assert row["modaldummy/real"] == 1
    dummy = 0.25 * (first.dummy + second.dummy).item()
    assert row["modaldummy/dummy"] == pytest.approx(dummy)
    assert first.fraction != second.fraction
    assert row["modaldummy/fraction"] == max(first.fraction, second.fraction)
    assert row["modaldummy/num_params"] == 2
    assert row["modaldummy/num_elements"] == 18  # of rsfMRI
    flags = {key[18:]: row[key] for key in row if key.startswith("modaldummy/active/")}
    assert flags == {"T1": 1, "dMRI": 1, "rsfMRI": 0}
    assert row.keys() == first.as_dict().keys()


@pytest.mark.parametrize("turned", [False, True])
def test_a_loss_that_is_not_a_number_shows_in_the_sum(turned: bool) -> None:
    model = scanner()
    reports = reports_of(model, {math.nan: ["T1"], 1.0: ["T1"]})
    row = accumulated_report(wrapper_of(model), reports[::-1] if turned else reports)
    assert math.isnan(row["modaldummy/real"])
    assert math.isnan(row["modaldummy/fraction"])


def test_the_history_has_report_and_norms(tmp_path: Path) -> None:
    model = scanner()
    trainer = mixed(model, arguments(tmp_path), callbacks=[GradientNormCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert len(rows) == 10
    for row in rows:
        assert row.keys() >= trainer.wrapper.last.as_dict().keys()
        assert row.keys() >= {"grad_norm/T1", "grad_norm/rsfMRI", "grad_norm/dMRI", "grad_ratio"}
    last = trainer.state.log_history[-1]
    assert "train_loss" in last
    assert not any(key.startswith(("modaldummy/", "grad")) for key in last)


def test_labels_are_of_all_accumulated_batches(tmp_path: Path) -> None:
    """And the report counts what is inactive in all batches of the step."""
    model = scanner()
    trainer = mixed(model, arguments(tmp_path, **FOUR), callbacks=[GradientNormCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert [labels_of(row) for row in rows] == [
        {"T1", "inactive"},
        {"T1", "dMRI", "inactive"},
        {"T1", "rsfMRI", "inactive"},
    ]
    for row in rows:
        active = {name for name in labels_of(row) if name != "inactive"}
        flags = {name for name in ("T1", "rsfMRI", "dMRI") if row[f"modaldummy/active/{name}"]}
        assert flags == active
        idle = [
            p for name in {"T1", "rsfMRI", "dMRI"} - active for p in model.towers[name].parameters()
        ]
        assert row["modaldummy/num_params"] == len(idle)
        elements = sum(p.numel() for p in idle)
        assert row["modaldummy/num_elements"] == elements
        norm = math.hypot(*(v for key, v in row.items() if key.startswith("grad/[inactive]")))
        assert norm == pytest.approx(SCALE * elements**0.5, rel=1e-6)


def test_norms_are_those_before_clipping(tmp_path: Path) -> None:
    maximum = 1e-3
    after = Recorder()
    args = arguments(tmp_path, learning_rate=0.0, max_grad_norm=maximum)
    trainer = mixed(scanner(), args, callbacks=[GradientNormCallback(), after])
    trainer.train()
    reference, unclipped = scanner(), Recorder()
    args = arguments(tmp_path, learning_rate=0.0)
    plain(reference, args, callbacks=[unclipped]).train()
    for row, step, clipped in zip(rows_of(trainer), unclipped.steps, after.steps, strict=True):
        gradient, seen = step["towers.T1.weight"], clipped["towers.T1.weight"]
        assert seen is not None
        assert seen.norm() <= maximum
        if gradient is not None:
            norm = row["grad/[T1]/towers.T1.weight"]
            assert norm == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert row["grad_norm"] > maximum


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that gradients are measured."""
    times: list[int] = []
    measure = gradient_norms

    def count(*args: Any, **kwargs: Any) -> dict[str, float]:
        times.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(gradient_norm_callback, "gradient_norms", count)
    return times


STRATEGIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every third": ({"logging_steps": 3}, [3, 6, 9]),
    "and the first": ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6, 9]),
    "the first alone": ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    "a share of all": ({"logging_steps": 0.5}, [5, 10]),
    "none": ({"logging_strategy": "no"}, []),
}


@pytest.mark.parametrize(("args", "steps"), STRATEGIES.values(), ids=STRATEGIES.keys())
def test_what_is_logged_is_measured_and_nothing_else(
    args: dict[str, Any], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = counted(monkeypatch)
    trainer = mixed(scanner(), arguments(tmp_path, **args), callbacks=[GradientNormCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == steps
    assert len(times) == len(steps)
    assert all("grad_norm/T1" in row for row in rows)


def test_epochs_are_logged_with_the_norms_of_their_last_step(tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_strategy="epoch", num_train_epochs=2)
    trainer = mixed(scanner(), args, callbacks=[GradientNormCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [10, 20]
    assert [labels_of(row) for row in rows] == [{"rsfMRI", "inactive"}] * 2
    assert [row["modaldummy/active/T1"] for row in rows] == [0, 0]


class LogAt(TrainerCallback):
    """Has the Trainer log a step that it would not log."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, *given: Any, **_: Any) -> None:
        _, state, control = given
        control.should_log = control.should_log or state.global_step == self.step


def test_a_step_that_was_not_measured_has_no_norms(tmp_path: Path) -> None:
    """Those of an earlier step would be wrong; the report is its own."""
    callbacks = [GradientNormCallback(), LogAt(6)]
    trainer = mixed(scanner(), arguments(tmp_path, logging_steps=5), callbacks=callbacks)
    trainer.train()
    rows = {row["step"]: row for row in rows_of(trainer)}
    assert list(rows) == [5, 6, 10]
    assert "grad_norm/T1" in rows[5]
    assert not any(key.startswith(("grad/", "grad_norm/")) for key in rows[6])
    assert rows[6]["modaldummy/active/dMRI"] == 1
    assert rows[5]["modaldummy/active/dMRI"] == 0


def test_a_second_training_does_not_log_norms_of_the_first(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1)
    trainer = mixed(scanner(), args, callbacks=[GradientNormCallback()])
    norms = []
    for _ in range(2):
        trainer.train()
        (row,) = rows_of(trainer)
        norms.append(row["grad_norm/T1"])
    assert norms[0] != norms[1]


def test_keys_can_be_constant_and_called_otherwise(tmp_path: Path) -> None:
    callback = GradientNormCallback(label=False, prefix="norms")
    trainer = mixed(scanner(), arguments(tmp_path), callbacks=[callback])
    trainer.train()
    keys = [{key for key in row if key.startswith("norms/")} for row in rows_of(trainer)]
    assert len(keys[0]) == 6
    assert "norms/T1/towers.T1.weight" in keys[0]
    assert all(own == keys[0] for own in keys)


@pytest.mark.parametrize("maximum", [0.0, 1e-3])
def test_the_callback_serves_other_trainers_too(maximum: float, tmp_path: Path) -> None:
    """There the norms are those that the optimizer gets."""
    trainer = own(scanner(), arguments(tmp_path, max_grad_norm=maximum, **FOUR))
    trainer.train()
    rows = rows_of(trainer)
    assert [labels_of(row) - {"inactive"} for row in rows] == [
        {"T1"},
        {"T1", "dMRI"},
        {"T1", "rsfMRI"},
    ]
    assert all((row["grad_norm/T1"] < 1e-3) == bool(maximum) for row in rows)


def test_a_callback_that_comes_later_measures_too(tmp_path: Path) -> None:
    trainer = mixed(scanner(), arguments(tmp_path))
    trainer.train()
    trainer.add_callback(GradientNormCallback)
    trainer.train()
    assert labels_of(rows_of(trainer)[0]) == {"T1", "inactive"}


def test_a_callback_with_a_wrapper_of_its_own_keeps_it(tmp_path: Path) -> None:
    """No loss goes through it here."""
    model = scanner()
    callback = GradientNormCallback(wrapper_of(model))
    with pytest.raises(RuntimeError, match="No loss has gone through the wrapper"):
        mixed(model, arguments(tmp_path), callbacks=[callback]).train()


def test_a_callback_without_a_wrapper_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"GradientNormCallback\(wrapper\)"):
        plain(scanner(), arguments(tmp_path), callbacks=[GradientNormCallback()]).train()


def test_the_callback_takes_no_other_wrapper() -> None:
    with pytest.raises(TypeError, match="must be a DummyLossWrapper, got"):
        GradientNormCallback(scanner())  # type: ignore[arg-type]


@pytest.mark.long
def test_tensorboard_gets_all_of_it(tmp_path: Path) -> None:
    # They ship no type information.
    events_of: Any = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    args = arguments(tmp_path, report_to=["tensorboard"])
    mixed(scanner(), args, callbacks=[GradientNormCallback()]).train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = events_of.EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/modaldummy/fraction", "train/grad_norm/T1", "train/loss"} <= tags
    assert len(events.Scalars("train/grad_norm/T1")) == 10
