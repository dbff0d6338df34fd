"""What the Trainer logs of each step: reports, and the norms of `GradientNormCallback`."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from modaldummy import DummyLossWrapper, diagnose, gradient_norms
from modaldummy.integrations import gradient_norm_callback
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    SCALE,
    WIDTHS,
    Recorder,
    arguments,
    labels_of,
    mixed,
    plain,
    rows_of,
    samples,
    scanner,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = {"gradient_accumulation_steps": 4}


class OwnTrainer(Trainer):
    """Does without the mixin: sends its loss through the wrapper and logs the norms itself."""

    wrapper: DummyLossWrapper
    norms: GradientNormCallback

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return self.wrapper.total(loss, inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.norms.metrics_of(self.state), *args, **kwargs)


def own(args: Any, kind: Any = OwnTrainer) -> Any:
    """A Trainer without the mixin whose callback was given the wrapper."""
    trainer = plain(scanner(), args, kind)
    trainer.wrapper = wrapper_of(trainer.model)
    trainer.norms = GradientNormCallback(trainer.wrapper)
    trainer.add_callback(trainer.norms)
    return trainer


def active_in(row: dict[str, float]) -> set[str]:
    return {name for name in WIDTHS if row[f"modaldummy/active/{name}"]}


def test_labels_and_reports_are_of_all_accumulated_batches(tmp_path: Path) -> None:
    model = scanner()
    trainer = mixed(model, arguments(tmp_path, **FOUR), callbacks=[GradientNormCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert [active_in(row) for row in rows] == [{"T1"}, {"T1", "dMRI"}, {"T1", "rsfMRI"}]
    for row in rows:
        assert labels_of(row) == active_in(row) | {"inactive"}
        assert {"grad_norm/T1", "grad_norm/rsfMRI", "grad_norm/dMRI", "grad_ratio"} <= row.keys()
        towers = [model.towers[name] for name in WIDTHS.keys() - active_in(row)]
        elements = sum(p.numel() for tower in towers for p in tower.parameters())
        assert row["modaldummy/num_elements"] == elements
        norm = math.hypot(*(v for key, v in row.items() if key.startswith("grad/[inactive]")))
        assert norm == pytest.approx(SCALE * elements**0.5, rel=1e-6)
    last = trainer.state.log_history[-1]
    assert "train_loss" in last
    assert not any(key.startswith(("modaldummy/", "grad")) for key in last)


def test_an_incomplete_step_counts_in_the_next(tmp_path: Path) -> None:
    """At the end of an iterable dataset the Trainer keeps the gradients for the next step."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples(scanner(), [["T1"], ["T1"], ["rsfMRI"]]))

    args = arguments(
        tmp_path, gradient_accumulation_steps=2, max_steps=2, train_sampling_strategy="random"
    )
    trainer = mixed(scanner(), args, train_dataset=Stream(), callbacks=[GradientNormCallback()])
    trainer.train()
    first, second = rows_of(trainer)
    assert labels_of(first) - {"inactive"} == active_in(first) == {"T1"}
    assert labels_of(second) - {"inactive"} == active_in(second) == {"T1", "rsfMRI"}


def test_norms_are_those_before_clipping(tmp_path: Path) -> None:
    maximum = 1e-3
    clipped, unclipped = Recorder(), Recorder()
    args = arguments(tmp_path, learning_rate=0.0, max_grad_norm=maximum)
    trainer = mixed(scanner(), args, callbacks=[GradientNormCallback(), clipped])
    trainer.train()
    plain(scanner(), arguments(tmp_path, learning_rate=0.0), callbacks=[unclipped]).train()
    for row, step, after in zip(rows_of(trainer), unclipped.steps, clipped.steps, strict=True):
        gradient, seen = step["towers.T1.weight"], after["towers.T1.weight"]
        assert seen is not None
        assert seen.norm() <= maximum
        if gradient is not None:
            norm = row["grad/[T1]/towers.T1.weight"]
            assert norm == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert row["grad_norm"] > maximum  # the Trainer's own


STRATEGIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every third": ({"logging_steps": 3}, [3, 6, 9]),
    "and the first": ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6, 9]),
    "the first alone": ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    "a share of all": ({"logging_steps": 0.5}, [5, 10]),
    "none": ({"logging_strategy": "no"}, []),
    "each epoch": ({"logging_strategy": "epoch"}, [10]),
}


@pytest.mark.parametrize(("args", "steps"), STRATEGIES.values(), ids=STRATEGIES.keys())
def test_only_steps_that_are_logged_are_measured(
    args: dict[str, Any], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a log for each epoch, each step may be the last one and is measured."""
    measured: list[Any] = []

    def counted(*given: Any, **named: Any) -> dict[str, float]:
        measured.append(given)
        return gradient_norms(*given, **named)

    monkeypatch.setattr(gradient_norm_callback, "gradient_norms", counted)
    callback = GradientNormCallback(label=False, prefix="norms")
    trainer = mixed(scanner(), arguments(tmp_path, **args), callbacks=[callback])
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == steps
    assert len(measured) == (10 if args.get("logging_strategy") == "epoch" else len(steps))
    keys = {f"norms/{n}/towers.{n}.{kind}" for n in WIDTHS for kind in ("weight", "bias")}
    assert all({key for key in row if key.startswith("norms/")} == keys for row in rows)


class LogAt(TrainerCallback):
    """Makes the Trainer log one more step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, *given: Any, **_: Any) -> None:
        _, state, control = given
        control.should_log = control.should_log or state.global_step == self.step


def test_a_step_that_was_not_measured_has_no_norms(tmp_path: Path) -> None:
    """Those of an earlier step would be wrong. The report belongs to the step itself."""
    callbacks = [GradientNormCallback(), LogAt(6)]
    trainer = mixed(scanner(), arguments(tmp_path, logging_steps=5), callbacks=callbacks)
    trainer.train()
    rows = {row["step"]: row for row in rows_of(trainer)}
    assert list(rows) == [5, 6, 10]
    assert "grad_norm/T1" in rows[5]
    assert not any(key.startswith(("grad/", "grad_norm/")) for key in rows[6])
    assert [active_in(rows[step]) for step in (5, 6)] == [{"T1"}, {"dMRI"}]


@pytest.mark.parametrize("maximum", [0.0, 1e-3])
def test_without_the_mixin_norms_are_those_after_clipping(maximum: float, tmp_path: Path) -> None:
    trainer = own(arguments(tmp_path, max_grad_norm=maximum, **FOUR))
    trainer.train()
    rows = rows_of(trainer)
    labels = [labels_of(row) - {"inactive"} for row in rows]
    assert labels == [{"T1"}, {"T1", "dMRI"}, {"T1", "rsfMRI"}]
    assert all((row["grad_norm/T1"] < 1e-3) == bool(maximum) for row in rows)


def test_a_callback_with_another_wrapper_does_not_use_that_of_the_mixin(tmp_path: Path) -> None:
    """No loss goes through the other one here."""
    model = scanner()
    callback = GradientNormCallback(wrapper_of(model))
    with pytest.raises(RuntimeError, match="No loss has gone through the wrapper"):
        mixed(model, arguments(tmp_path), callbacks=[callback]).train()


def test_a_callback_without_a_wrapper_needs_the_mixin(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"GradientNormCallback\(wrapper\)"):
        plain(scanner(), arguments(tmp_path), callbacks=[GradientNormCallback()]).train()


@pytest.mark.parametrize(("scale", "codes"), [(SCALE, set()), (None, {"MD212"})])
def test_diagnose_reads_the_history(scale: float | None, codes: set[str], tmp_path: Path) -> None:
    """It finds nothing in a healthy run, and missing gradients with a scale of None."""
    model = scanner()
    args = arguments(
        tmp_path,
        num_train_epochs=12,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    trainer = mixed(
        model,
        args,
        hold=True,
        wrapper=wrapper_of(model, scale),
        train_dataset=[sample | {"labels": 0.7} for sample in samples(model)],
        callbacks=[GradientNormCallback()],
    )
    trainer.train()
    assert len(rows_of(trainer)) >= 60
    found = diagnose(trainer.state.log_history)
    assert codes <= {finding.code for finding in found}
    if not codes:
        assert [str(finding) for finding in found if finding.severity != "info"] == []
