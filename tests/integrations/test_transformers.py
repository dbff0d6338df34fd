"""Under `DummyLossMixin` the Trainer does what it does without it, plus the dummy gradients."""

import gc
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback
from tests.integrations.trainers import (
    BATCHES,
    EVALUATING,
    MODELS,
    SCALE,
    MixedTrainer,
    Recorder,
    Scanner,
    arguments,
    mixed,
    owner_of,
    plain,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = {"gradient_accumulation_steps": 4}

# --- training ------------------------------------------------------------------------------------


class Averaging(Trainer):
    """Says that its losses are means over a batch, although the model accepts `num_items`."""

    loss_is_scaled_for_ga = False


class MixedAveraging(DummyLossMixin, Averaging): ...


def summed_error(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Any:
    return (outputs["logits"] - labels).square().sum() / num_items_in_batch


# Model, arguments of the run, options of both Trainers, and the Trainers.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[Any, Any]]] = {
    "a mean over each batch": ("scanner", {}, {}, (MixedTrainer, Trainer)),
    "accumulation": ("scanner", FOUR, {}, (MixedTrainer, Trainer)),
    "num_items, accumulation": ("reader", FOUR, {}, (MixedTrainer, Trainer)),
    "compute_loss_func": (
        "scanner",
        FOUR,
        {"compute_loss_func": summed_error},
        (MixedTrainer, Trainer),
    ),
    "label smoothing": (
        "reader",
        FOUR | {"label_smoothing_factor": 0.1},
        {},
        (MixedTrainer, Trainer),
    ),
    "loss_is_scaled_for_ga": ("reader", FOUR, {}, (MixedAveraging, Averaging)),
}


@pytest.mark.parametrize(("name", "args", "options", "kinds"), CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_trainer_plus_the_dummy(
    name: str, args: dict[str, Any], options: dict[str, Any], kinds: Any, tmp_path: Path
) -> None:
    """Active ones bit for bit, inactive ones `scale`, at each step, also if a step is short."""
    ours, bare = Recorder(), Recorder()
    run = arguments(tmp_path, **args, learning_rate=0.0)  # all steps start from the same values
    mixed(MODELS[name](), run, kinds[0], callbacks=[ours], **options).train()
    plain(MODELS[name](), run, kinds[1], callbacks=[bare], **options).train()
    accumulated = args.get("gradient_accumulation_steps", 1)
    steps = [BATCHES[at : at + accumulated] for at in range(0, len(BATCHES), accumulated)]
    for found, expected, step in zip(ours.steps, bare.steps, steps, strict=True):
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            real, owner = expected[key], owner_of(key)
            share = sum(owner is not None and owner not in names for names in step) / len(step)
            assert gradient is not None, key
            if real is None:
                assert share == 1, key
                dummy = torch.full_like(gradient, SCALE)
                torch.testing.assert_close(gradient, dummy, rtol=1e-6, atol=0)
            elif share == 0:
                assert torch.equal(gradient, real), key
            else:
                # The dummy changes the last bits of a real gradient.
                rounding = 1e-6 * float(real.abs().max())
                torch.testing.assert_close(gradient, real + SCALE * share, rtol=0, atol=rounding)


def test_a_held_run_ends_like_one_without_the_mixin(tmp_path: Path) -> None:
    """Parameters and optimizer state, bit for bit; dMRI is inactive at first."""
    args = arguments(tmp_path, optim="adamw_torch", max_grad_norm=1e9, weight_decay=0.1)
    model, other = MODELS["reader"](), MODELS["reader"]()
    trainer, reference = mixed(model, args, hold=True), plain(other, args)
    trainer.train()
    reference.train()
    expected = values_of(other)
    for key, value in values_of(model).items():
        assert torch.equal(value, expected[key]), key
    states = [t.optimizer.state_dict()["state"] for t in (trainer, reference)]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_report_of_a_step_adds_up_to_its_loss(name: str, tmp_path: Path) -> None:
    """A scale that is far too large reaches the bound, and not more."""
    run = arguments(tmp_path, **FOUR, learning_rate=0.0)
    model = MODELS[name]()
    trainer = mixed(model, run, wrapper=wrapper_of(model, scale=10.0))
    reference = plain(MODELS[name](), run)
    trainer.train()
    reference.train()
    largest = 0.0
    for row, expected in zip(rows_of(trainer), rows_of(reference), strict=True):
        real, dummy = row["modaldummy/real"], row["modaldummy/dummy"]
        assert real == pytest.approx(expected["loss"], rel=1e-6)
        assert row["loss"] == pytest.approx(real + dummy, rel=1e-6)
        assert row["modaldummy/fraction"] <= 1e-4
        largest = max(largest, abs(row["loss"] - expected["loss"]) / expected["loss"])
    assert 5e-5 < largest <= 1.01e-4  # the Trainer rounds the sum of losses to float32


def test_compute_loss_can_be_called_outside_of_train(tmp_path: Path) -> None:
    """It returns the total, and the outputs if they are asked for."""
    model: Any = scanner()
    trainer = mixed(model, arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert trainer.wrapper.last.inactive == ("rsfMRI", "dMRI")
    assert torch.equal(model.towers["dMRI"].bias.grad, torch.full((3,), SCALE))
    assert loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-4)
    assert outputs["logits"].shape == (2,)


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_and_prediction_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Bit for bit, with a scale that would show."""
    model = scanner()
    data = samples(model)
    options = {"eval_dataset": data, "wrapper": wrapper_of(model, scale=10.0)}
    trainer = mixed(model, arguments(tmp_path), **options)
    reference = plain(scanner(), arguments(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == reference.evaluate()["eval_loss"]
    found, expected = trainer.predict(data), reference.predict(data)
    assert np.array_equal(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]
    assert trainer.wrapper.last is None


def test_evaluation_within_training_changes_nothing(tmp_path: Path) -> None:
    """Losses, reports, the hold and parameters stay, although evaluation uses other modalities."""
    runs = []
    for options in ({}, EVALUATING):
        model = scanner()
        trainer = mixed(
            model,
            arguments(tmp_path, gradient_accumulation_steps=2, optim="adamw_torch", **options),
            hold=True,
            train_dataset=samples(model, [["T1"], ["T1"], ["T1"], ["rsfMRI"]]),
            eval_dataset=samples(model, [["dMRI"], ["rsfMRI"]]),
        )
        trainer.train()
        runs.append((rows_of(trainer), values_of(model), trainer.state.log_history))
    (rows, values, _), (others, expected, history) = runs
    assert rows == others
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name
    evaluated = [row for row in history if "eval_loss" in row]
    assert len(evaluated) == 2
    assert not any(key.startswith("modaldummy/") for row in evaluated for key in row)


# --- several trainings ---------------------------------------------------------------------------

# Twenty batches, two a step: rsfMRI is active only after the checkpoint, dMRI never.
CUT = [["T1"]] * 10 + [["rsfMRI"], ["T1"]] * 5


class Dropping(Scanner):
    """Draws random numbers, so that a resumed run needs the state of the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.towers["T1"] = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))


def ten_steps(seed: int, folder: Path, checkpoint: Path | None = None) -> Any:
    """A Trainer after ten steps, or after five from the checkpoint on."""
    torch.manual_seed(seed)
    model = Dropping()
    args = arguments(
        folder,
        optim="adamw_torch",
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
    )
    options = {"train_dataset": samples(model, CUT), "callbacks": [GradientNormCallback()]}
    trainer = mixed(model, args, hold=True, **options)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.state.global_step == 10
    return trainer


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Parameters, optimizer state and logs, bit for bit; checkpoints have nothing of ours."""
    whole = ten_steps(0, tmp_path)
    cut = ten_steps(1, tmp_path / "later", tmp_path / "checkpoint-5")
    expected = values_of(whole.model)
    for name, value in values_of(cut.model).items():
        assert torch.equal(value, expected[name]), name
    states = [t.optimizer.state_dict()["state"] for t in (cut, whole)]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert rows_of(cut) == rows_of(whole)
    assert "grad_norm/dMRI" in rows_of(cut)[-1]
    files = (tmp_path / "checkpoint-10").iterdir()
    ours = [f.name for f in files if b"modaldummy" in f.read_bytes()]
    assert ours == ["trainer_state.json"]  # the log


def test_each_model_of_model_init_gets_a_wrapper(tmp_path: Path) -> None:
    """As a search for hyperparameters needs it."""
    made: list[Scanner] = []

    def make() -> Scanner:
        made.append(scanner(seed=len(made)))
        return made[-1]

    args = arguments(tmp_path, optim="adamw_torch")
    options = {"model_init": make, "train_dataset": samples(scanner()), "wrapper": wrapper_of}
    trainer = mixed(None, args, hold=True, callbacks=[GradientNormCallback()], **options)
    for number in range(3):
        assert trainer.wrapper.parameters.model is made[number]
        trainer.train()
    again = mixed(scanner(seed=3), args, hold=True)
    again.train()
    assert [row["loss"] for row in rows_of(again)] == [row["loss"] for row in rows_of(trainer)]


def test_a_second_training_uses_the_same_wrapper_and_hold(tmp_path: Path) -> None:
    """It logs reports and norms of its own, and the Trainer can be freed after it."""
    model = scanner()
    wrapper = wrapper_of(model)
    args = arguments(tmp_path, max_steps=1, optim="adamw_torch")
    callbacks = [GradientNormCallback()]
    trainer = mixed(model, args, hold=True, wrapper=wrapper, callbacks=callbacks)
    norms = set()
    for _ in range(2):
        trainer.train()
        (row,) = rows_of(trainer)
        assert row["modaldummy/real"] == pytest.approx(row["loss"], rel=1e-4)
        norms.add(row["grad_norm/T1"])
        assert len(wrapper._observers) == 1  # of the hold
    assert len(norms) == 2
    freed = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert freed() is None


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
def test_the_mixin_comes_before_the_trainer(base: type[Trainer]) -> None:
    expected = r"has no effect\. Write `class Wrong\(DummyLossMixin, Trainer\)`"
    with pytest.raises(TypeError, match=expected):
        type("Wrong", (base, DummyLossMixin), {})


@pytest.mark.parametrize("wrapper", [None, {"T1": "towers.T1"}, lambda model: model])
def test_a_wrapper_or_a_function_that_makes_one_is_needed(wrapper: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be a DummyLossWrapper, or a function .* got"):
        mixed(scanner(), arguments(tmp_path), wrapper=wrapper)


def test_a_wrapper_of_another_model_is_refused(tmp_path: Path) -> None:
    """Also one whose model `model_init` has replaced."""
    model = scanner()
    with pytest.raises(ValueError, match="shares no parameter"):
        mixed(scanner(), arguments(tmp_path), wrapper=wrapper_of(model))
    made = [model, scanner(seed=1)]
    options = {"model_init": lambda: made.pop(0), "wrapper": lambda _: wrapper_of(model)}
    trainer = mixed(None, arguments(tmp_path), train_dataset=samples(model), **options)
    with pytest.raises(ValueError, match="shares no parameter"):
        trainer.train()


class Bypassing(MixedTrainer):
    """Computes the loss itself."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs)["loss"]


class Discarding(MixedTrainer):
    """Asks for the outputs and computes another loss from them."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return outputs["logits"].square().mean()


@pytest.mark.parametrize("kind", [Bypassing, Discarding])
def test_a_loss_that_does_not_go_through_the_wrapper_is_refused(kind: Any, tmp_path: Path) -> None:
    """At the first step, before the optimizer moves anything."""
    model = scanner()
    before = model.trunk.weight.clone()
    with pytest.raises(RuntimeError, match=f"`{kind.__name__}` did not go through the wrapper"):
        mixed(model, arguments(tmp_path), kind).train()
    assert torch.equal(model.trunk.weight, before)


class Adding(MixedTrainer):
    """Adds to the loss of the mixin."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        total: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return total + model.get_parameter("trunk.weight").square().sum()


class Own(MixedTrainer):
    """Sends a loss of its own through the wrapper."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper.total(model(**inputs)["logits"].square().mean(), inputs)


@pytest.mark.parametrize("kind", [Adding, Own])
def test_a_compute_loss_of_ones_own_can_use_the_wrapper(kind: Any, tmp_path: Path) -> None:
    seen = Recorder()
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=1)
    mixed(scanner(), args, kind, callbacks=[seen]).train()
    gradient = seen.steps[0]["towers.dMRI.weight"]
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((3, 6), SCALE), rtol=1e-6, atol=0)


class Twice(MixedTrainer):
    """Sends through the wrapper what has been through it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper.total(super().compute_loss(model, inputs, *args, **kwargs), inputs)


class Wrapping(Scanner):
    """Adds the dummy term itself, as a model does that is trained without the mixin."""

    def loss(self, error: Tensor, present: Collection[str]) -> Tensor:
        wrapper: Any = self.wrapper
        total: Tensor = wrapper.total(error, list(present))
        return total


@pytest.mark.parametrize(("make", "kind"), [(scanner, Twice), (Wrapping, MixedTrainer)])
def test_a_dummy_term_that_is_added_twice_is_refused(make: Any, kind: Any, tmp_path: Path) -> None:
    model = make()
    model.wrapper = wrapper_of(model)
    trainer = mixed(model, arguments(tmp_path), kind, wrapper=model.wrapper)
    with pytest.raises(RuntimeError, match="dummy term would be added twice"):
        trainer.train()


class Lossless(Scanner):
    accepts_loss_kwargs = False

    def forward(self, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"loss": None}


def test_a_model_without_a_loss_is_refused(tmp_path: Path) -> None:
    """The wrapper then has no subscriber left."""
    model = Lossless()
    trainer = mixed(model, arguments(tmp_path, remove_unused_columns=False))
    with pytest.raises(TypeError, match="The loss that `compute_loss` of the Trainer returns"):
        trainer.train()
    assert not trainer.wrapper._observers
