"""What a Trainer with the mixin logs of steps that are made of several batches."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from modaldummy import DummyLossWrapper
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    MAP,
    SCALE,
    Scanner,
    arguments,
    labels_of,
    mixed,
    rows_of,
    samples,
    scanner,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_training_has_reports_of_its_own(tmp_path: Path) -> None:
    """Also where it begins with the step at which the last one ended or broke off."""
    trainer = mixed(scanner(), arguments(tmp_path, max_steps=1, learning_rate=0.0))
    for _ in range(2):
        trainer.train()
        (row,) = rows_of(trainer)
        assert row["modaldummy/real"] == pytest.approx(row["loss"], rel=1e-4)


class Fusing(Scanner):
    """With a layer for T1 and dMRI together."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = nn.Linear(1, 1, bias=False)

    def loss(self, error: Tensor, present: Collection[str]) -> Tensor:
        together = {"T1", "dMRI"} <= set(present)
        fused: Tensor = self.fusion(error[None])[0] if together else error
        return fused


def test_what_no_batch_had_together_is_inactive(tmp_path: Path) -> None:
    model = Fusing()
    wrapper = DummyLossWrapper(model, MAP | {("T1", "dMRI"): "fusion"})
    data = samples(model, [["T1"], ["dMRI"], ["T1", "dMRI"], ["T1"]])
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    options = {"wrapper": wrapper, "train_dataset": data, "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, args, **options)
    trainer.train()
    apart, together = rows_of(trainer)
    assert apart["grad/[inactive]/fusion.weight"] == pytest.approx(SCALE)
    assert apart["modaldummy/num_params"] == 3  # those of rsfMRI too
    assert "grad/[T1-dMRI]/fusion.weight" in together
    assert together["modaldummy/num_params"] == 2


def test_a_step_that_stayed_incomplete_counts_in_the_next(tmp_path: Path) -> None:
    """The Trainer leaves its gradients there."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples(scanner(), [["T1"], ["T1"], ["rsfMRI"]]))

    args = arguments(
        tmp_path, gradient_accumulation_steps=2, max_steps=2, train_sampling_strategy="random"
    )
    trainer = mixed(scanner(), args, train_dataset=Stream(), callbacks=[GradientNormCallback()])
    trainer.train()
    first, second = rows_of(trainer)
    assert labels_of(first) == {"T1", "inactive"}
    assert labels_of(second) == {"T1", "rsfMRI", "inactive"}
    assert second["modaldummy/active/rsfMRI"] == 1
