"""Evaluation and prediction are those of the Trainer, and leave training alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integrations.trainers import (
    EVALUATING,
    arguments,
    mixed,
    plain,
    reader,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make", [scanner, reader])
def test_evaluation_and_prediction_are_those_of_the_trainer(make: Any, tmp_path: Path) -> None:
    """Bit for bit, with a scale that would show, and nothing is told to the wrapper."""
    model = make()
    data = samples(model)
    options = {"eval_dataset": data, "wrapper": wrapper_of(model, scale=10.0)}
    trainer = mixed(model, arguments(tmp_path), **options)
    reference = plain(make(), arguments(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == reference.evaluate()["eval_loss"]
    found, expected = trainer.predict(data), reference.predict(data)
    assert np.array_equal(found.predictions, expected.predictions)
    assert np.array_equal(found.label_ids, expected.label_ids)
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]
    assert trainer.wrapper.last is None


def test_evaluation_within_training_disturbs_nothing(tmp_path: Path) -> None:
    """Neither losses, report, labels and the hold, nor, with other modalities, what is active."""
    runs = []
    for options in ({}, EVALUATING):
        model = scanner()
        # Evaluation uses modalities that training does not.
        data = samples(model, [["dMRI"], ["rsfMRI"]])
        trainer = mixed(
            model,
            arguments(tmp_path, gradient_accumulation_steps=2, optim="adamw_torch", **options),
            hold=True,
            train_dataset=samples(model, [["T1"], ["T1"], ["T1"], ["rsfMRI"]]),
            eval_dataset=data,
        )
        trainer.train()
        runs.append((rows_of(trainer), values_of(model), trainer))
    (rows, values, _), (others, expected, trainer) = runs
    assert [row for row in trainer.state.log_history if "eval_loss" in row]
    assert rows == others
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(expected["towers.dMRI.weight"], values_of(scanner())["towers.dMRI.weight"])


def test_what_evaluation_logs_carries_no_report(tmp_path: Path) -> None:
    model = scanner()
    options = {"eval_dataset": samples(model)}
    trainer = mixed(model, arguments(tmp_path, **EVALUATING), **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(rows) == 10
    assert not any(key.startswith("modaldummy/") for row in rows for key in row)
