"""Gradients and losses under the real Trainer are those of the plain Trainer, plus the dummy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from modaldummy.integrations.transformers import DummyLossMixin
from tests.integrations.trainers import (
    BATCHES,
    MODELS,
    SCALE,
    Batches,
    Recorder,
    arguments,
    mixed,
    owner_of,
    plain,
    rows_of,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Gradients = Mapping[str, Tensor | None]


class Averaging(Trainer):
    """Says that losses are means over a batch, whatever the model takes."""

    loss_is_scaled_for_ga = False


class MixedAveraging(DummyLossMixin, Averaging): ...


def summed_error(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Any:
    return (outputs["logits"] - labels).square().sum() / num_items_in_batch


def summed_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Any:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


# Model, arguments of the run, and options of both Trainers.
FOUR = {"gradient_accumulation_steps": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a mean over each batch": ("scanner", {}, {}),
    "accumulation": ("scanner", FOUR, {}),
    "num_items": ("reader", {}, {}),
    "num_items, accumulation": ("reader", FOUR, {}),
    "num_items of this device": ("reader", FOUR | {"average_tokens_across_devices": False}, {}),
    "compute_loss_func": ("scanner", FOUR, {"compute_loss_func": summed_error}),
    "compute_loss_func, num_items": ("reader", FOUR, {"compute_loss_func": summed_entropy}),
    "label smoothing": ("reader", FOUR | {"label_smoothing_factor": 0.1}, {}),
}


def compare(
    own: Sequence[Gradients], others: Sequence[Gradients], accumulated: int, batches: Batches
) -> None:
    """Each step has the gradients of the plain Trainer, and `SCALE` for each batch without."""
    steps = [batches[at : at + accumulated] for at in range(0, len(batches), accumulated)]
    assert len(own) == len(others) == len(steps)
    for found, expected, step in zip(own, others, steps, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            real, owner = expected[name], owner_of(name)
            absent = sum(owner is not None and owner not in names for names in step) / len(step)
            assert gradient is not None, name
            if real is None:
                assert absent == 1, name
                dummy = torch.full_like(gradient, SCALE)
                torch.testing.assert_close(gradient, dummy, rtol=1e-6, atol=0)
            elif absent == 0:
                assert torch.equal(gradient, real), name
            else:
                # Beside real gradients the dummy is a matter of their last bits.
                rounding = 1e-6 * float(real.abs().max())
                torch.testing.assert_close(gradient, real + SCALE * absent, rtol=0, atol=rounding)


@pytest.mark.parametrize(("name", "args", "options"), CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_trainer_plus_the_dummy(
    name: str, args: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Active ones bit for bit, inactive ones `scale`, at each step, also where a step is short."""
    own, others = Recorder(), Recorder()
    args = args | {"learning_rate": 0.0}  # so that all steps start from the same
    model = MODELS[name]()
    mixed(model, arguments(tmp_path, **args), callbacks=[own], **options).train()
    model = MODELS[name]()
    plain(model, arguments(tmp_path, **args), callbacks=[others], **options).train()
    compare(own.steps, others.steps, args.get("gradient_accumulation_steps", 1), BATCHES)


def test_a_trainer_that_says_how_its_loss_is_scaled_is_believed(tmp_path: Path) -> None:
    own, others = Recorder(), Recorder()
    args = arguments(tmp_path, learning_rate=0.0, **FOUR)
    mixed(MODELS["reader"](), args, MixedAveraging, callbacks=[own]).train()
    plain(MODELS["reader"](), args, Averaging, callbacks=[others]).train()
    compare(own.steps, others.steps, 4, BATCHES)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("scanner", "adafactor"), ("reader", "adamw_torch")]
)
def test_a_held_run_ends_where_the_plain_one_does(
    name: str, optimizer: str, tmp_path: Path
) -> None:
    """Parameters and optimizer state, bit for bit: what no batch contains stays unchanged."""
    args = arguments(tmp_path, optim=optimizer, max_grad_norm=1e9, weight_decay=0.1)
    model, other = MODELS[name](), MODELS[name]()
    trainer, reference = mixed(model, args, hold=True), plain(other, args)
    trainer.train()
    reference.train()
    expected = values_of(other)
    for key, value in values_of(model).items():
        assert torch.equal(value, expected[key]), key
    states = [t.optimizer.state_dict()["state"] for t in (trainer, reference)]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case", ["accumulation", "num_items, accumulation", "compute_loss_func", "label smoothing"]
)
def test_losses_are_within_the_bound(case: str, tmp_path: Path) -> None:
    """A scale that is far too large reaches the bound, and the report adds up to the loss."""
    name, args, options = CASES[case]
    args = args | {"learning_rate": 0.0}
    model = MODELS[name]()
    wrapper = wrapper_of(model, scale=10.0)
    trainer = mixed(model, arguments(tmp_path, **args), wrapper=wrapper, **options)
    reference = plain(MODELS[name](), arguments(tmp_path, **args), **options)
    trainer.train()
    reference.train()
    largest = 0.0
    for row, expected in zip(rows_of(trainer), rows_of(reference), strict=True):
        real, dummy = row["modaldummy/real"], row["modaldummy/dummy"]
        assert real == pytest.approx(expected["loss"], rel=1e-6)
        assert row["loss"] == pytest.approx(real + dummy, rel=1e-6)
        assert row["modaldummy/fraction"] <= 1e-4
        largest = max(largest, abs(row["loss"] - expected["loss"]) / expected["loss"])
    assert 5e-5 < largest <= 1.01e-4  # of the sum, losses are rounded to float32


def test_scales_of_zero_and_none_connect(tmp_path: Path) -> None:
    """An exact zero, or no gradient at all, however many batches share the dummy."""
    for scale in (0.0, None):
        model, own = MODELS["reader"](), Recorder()
        wrapper = wrapper_of(model, scale)
        mixed(model, arguments(tmp_path, **FOUR), wrapper=wrapper, callbacks=[own]).train()
        idle = [g for name, g in own.steps[0].items() if owner_of(name) in ("rsfMRI", "dMRI")]
        assert len(idle) == 4
        if scale is None:
            assert idle == [None] * 4
        else:
            assert not any(gradient.any() for gradient in idle if gradient is not None)
            assert None not in idle


def test_a_loss_outside_of_train_goes_through_the_wrapper(tmp_path: Path) -> None:
    """As in a loop of one's own, which has the Trainer compute the loss."""
    model = MODELS["reader"]()
    trainer = mixed(model, arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, batch, num_items_in_batch=12).backward()
    assert trainer.wrapper.last.inactive == ("rsfMRI", "dMRI")
    torch.testing.assert_close(
        model.towers["dMRI"].bias.grad, torch.full((16,), SCALE), rtol=1e-6, atol=0
    )


def test_the_outputs_come_with_the_total(tmp_path: Path) -> None:
    model = scanner()
    trainer = mixed(model, arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert model.towers["dMRI"].bias.grad is not None
    assert loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-4)
    assert outputs["logits"].shape == (2,)
