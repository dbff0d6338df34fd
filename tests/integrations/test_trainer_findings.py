"""Findings: what is logged where training starts, and what the doctor makes of the history."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modaldummy import diagnose
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    Scanner,
    arguments,
    mixed,
    reader,
    rows_of,
    samples,
    scanner,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = pytest.mark.long


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = "modaldummy.integrations.transformers"
    return [record.getMessage() for record in caplog.records if record.name == name]


@pytest.mark.parametrize("hold", [False, True])
def test_findings_are_logged_once_where_training_starts(
    hold: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = mixed(scanner(), arguments(tmp_path, optim="adamw_torch"), hold=hold)
    assert messages(caplog) == []
    trainer.train()
    trainer.train()
    found = messages(caplog)
    assert [message[:13] for message in found] == ([] if hold else ["MD141 warning"])


def test_a_process_that_is_not_the_first_logs_no_findings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = mixed(scanner(), arguments(tmp_path, optim="adamw_torch"))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert messages(caplog) == []


def targeted(model: nn.Module) -> list[dict[str, Any]]:
    """Samples whose labels can be learned, the same for all."""
    same = {"labels": torch.tensor(0.7)}
    if not isinstance(model, Scanner):
        same = {"labels": torch.arange(6), "input_ids": torch.arange(6)}
    return [sample | same for sample in samples(model)]


@pytest.mark.parametrize(
    ("make", "accumulated"),
    [(scanner, 1), pytest.param(scanner, 3, marks=LONG), pytest.param(reader, 3, marks=LONG)],
)
def test_the_doctor_finds_no_fault_with_a_healthy_history(
    make: Any, accumulated: int, tmp_path: Path
) -> None:
    """With clipping and, of what the Trainer normalises and what it does not, accumulation."""
    model = make()
    args = arguments(
        tmp_path,
        num_train_epochs=6 * accumulated,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=0.5,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    options = {"train_dataset": targeted(model), "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, args, hold=True, **options)
    trainer.train()
    assert len(rows_of(trainer)) >= 60
    found = diagnose(trainer.state.log_history)
    assert [str(finding) for finding in found if finding.severity != "info"] == []


def test_the_doctor_notices_missing_gradients(tmp_path: Path) -> None:
    """So that the test above can fail: with a scale of None inactive modalities get no gradient."""
    model = scanner()
    wrapper = wrapper_of(model, scale=None)
    options = {"wrapper": wrapper, "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, arguments(tmp_path, num_train_epochs=3), **options)
    trainer.train()
    assert "MD212" in {finding.code for finding in diagnose(trainer.state.log_history)}
