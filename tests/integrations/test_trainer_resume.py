"""A training that is cut in two, or repeated, is what it would be in one piece, or at first."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper
from modaldummy.integrations.transformers import GradientNormCallback
from tests.integrations.trainers import (
    Scanner,
    arguments,
    mixed,
    owner_of,
    reader,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Twenty batches, two a step: rsfMRI comes once the checkpoint is made, dMRI never.
CUT = [["T1"]] * 10 + [["rsfMRI"], ["T1"]] * 5


class Dropping(Scanner):
    """Draws random numbers, which a checkpoint has to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.towers["T1"] = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))


def dropping(seed: int = 0) -> Dropping:
    torch.manual_seed(seed)
    return Dropping()


def ten_steps(model: nn.Module, folder: Path, checkpoint: Path | None = None) -> Any:
    """A Trainer that has made ten steps, from the checkpoint on if there is one."""
    args = arguments(
        folder,
        optim="adamw_torch",
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
        logging_steps=1,
    )
    options = {"train_dataset": samples(model, CUT), "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, args, hold=True, **options)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.state.global_step == 10
    return trainer


@pytest.mark.parametrize("make", [dropping, pytest.param(reader, marks=pytest.mark.long)])
def test_a_resumed_run_is_that_of_one_piece(make: Any, tmp_path: Path) -> None:
    """Parameters, state of the optimizer, losses, reports and norms, bit for bit."""
    before = values_of(make())
    whole = ten_steps(make(), tmp_path)
    cut = ten_steps(make(seed=1), tmp_path / "later", tmp_path / "checkpoint-5")
    expected = values_of(whole.model)
    for name, value in values_of(cut.model).items():
        assert torch.equal(value, expected[name]), name
        # What never was active is as it was made, weight decay or not.
        assert torch.equal(value, before[name]) == (owner_of(name) == "dMRI"), name
    states = [t.optimizer.state_dict()["state"] for t in (cut, whole)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == len(before) - 2
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert rows_of(cut) == rows_of(whole)
    assert "grad_norm/dMRI" in rows_of(cut)[-1]


def test_a_checkpoint_holds_nothing_of_ours(tmp_path: Path) -> None:
    """So that it is fit for a Trainer without the mixin, and the other way round."""
    ten_steps(scanner(), tmp_path)
    folder = tmp_path / "checkpoint-10"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    assert saved.keys() == {"state", "param_groups"}
    assert b"modaldummy" not in b"".join(
        file.read_bytes() for file in folder.iterdir() if file.name != "trainer_state.json"
    )


def test_models_that_are_made_anew_are_wrapped_anew(tmp_path: Path) -> None:
    """As a search for hyperparameters does: each training has a model of its own."""
    made: list[Scanner] = []

    def make() -> Scanner:
        made.append(scanner(seed=len(made)))
        return made[-1]

    args = arguments(tmp_path, optim="adamw_torch")
    options = {"model_init": make, "train_dataset": samples(scanner()), "wrapper": wrapper_of}
    trainer = mixed(None, args, hold=True, callbacks=[GradientNormCallback()], **options)
    assert trainer.wrapper.parameters.model is made[0]
    rows = []
    for number, rate in enumerate((0.05, 0.01), start=1):
        trainer.args.learning_rate = rate
        trainer.train()
        assert trainer.model is made[number]
        assert trainer.wrapper.parameters.model is made[number]
        rows.append(rows_of(trainer))
        assert len(rows[-1]) == 10
        assert {row["learning_rate"] for row in rows[-1]} == {rate}
    args = arguments(tmp_path, optim="adamw_torch", learning_rate=0.01)
    again = mixed(scanner(seed=2), args, hold=True)
    again.train()
    assert [row["loss"] for row in rows_of(again)] == [row["loss"] for row in rows[1]]


def test_a_wrapper_of_another_model_is_refused(tmp_path: Path) -> None:
    stale = wrapper_of(scanner())
    options: dict[str, Any] = {"wrapper": stale, "train_dataset": samples(scanner())}
    with pytest.raises(ValueError, match="shares no parameter"):
        mixed(scanner(), arguments(tmp_path), **options)
    with pytest.raises(ValueError, match="shares no parameter"):
        mixed(None, arguments(tmp_path), model_init=lambda: scanner(), **options)


def test_a_wrapper_that_gets_stale_is_refused(tmp_path: Path) -> None:
    model = scanner()
    made = [model, scanner(seed=1)]
    options = {"model_init": lambda: made.pop(0), "wrapper": lambda _: wrapper_of(model)}
    data = samples(model)
    trainer = mixed(None, arguments(tmp_path), train_dataset=data, **options)
    with pytest.raises(ValueError, match="shares no parameter"):
        trainer.train()


def test_a_second_training_goes_on_with_the_same_wrapper(tmp_path: Path) -> None:
    """And the same hold, of which there is one."""
    model = scanner()
    wrapper = wrapper_of(model)
    args = arguments(tmp_path, optim="adamw_torch")
    options: dict[str, Any] = {"wrapper": lambda _: wrapper, "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, args, hold=True, **options)
    trainer.train()
    observers = len(wrapper._observers)
    trainer.train()
    assert trainer.wrapper is wrapper
    assert len(wrapper._observers) == observers == 1  # the hold, once


def test_a_trainer_can_go_while_its_wrapper_stays(tmp_path: Path) -> None:
    model = scanner()
    wrapper = wrapper_of(model)
    trainer = mixed(model, arguments(tmp_path), wrapper=wrapper, hold=True)
    trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    assert isinstance(wrapper, DummyLossWrapper)
    assert isinstance(wrapper.last.real if wrapper.last else None, Tensor)
