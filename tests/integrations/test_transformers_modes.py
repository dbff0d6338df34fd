"""`DummyLossMixin` under the Trainer's modes, and the findings that it logs."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from modaldummy import DummyLossWrapper, shadow_inactive
from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback
from tests.integrations.test_gradient_norm_callback import OwnTrainer, own
from tests.integrations.trainers import (
    MAP,
    SCALE,
    WIDTHS,
    MixedTrainer,
    Recorder,
    arguments,
    mixed,
    owner_of,
    plain,
    reader,
    rows_of,
    samples,
    scanner,
    values_of,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = {"gradient_accumulation_steps": 4, "max_steps": 1}


def compare(
    make: Any, args: Any, kinds: Any = (MixedTrainer, Trainer), **options: Any
) -> tuple[Any, Recorder]:
    """One step has the gradients of the plain Trainer, and `SCALE` where that has none."""
    seen, others = Recorder(), Recorder()
    callbacks = [seen, GradientNormCallback()]
    trainer = mixed(make(), args, kinds[0], callbacks=callbacks, **options)
    trainer.train()
    options.pop("hold", None)
    plain(make(), args, kinds[1], callbacks=[others], **options).train()
    (found,), (expected,) = seen.steps, others.steps
    num_dummies = 0
    for name, gradient in found.items():
        real = expected[name]
        if gradient is None:
            assert real is None
        elif real is None:
            num_dummies += 1
            dummy = torch.full_like(gradient, SCALE)
            torch.testing.assert_close(gradient, dummy, rtol=1e-6, atol=0)
        else:
            assert torch.equal(gradient, real), name
    assert num_dummies == 4
    return trainer, seen


def dummy_norm(model: Any) -> Any:
    elements = sum(p.numel() for p in model.towers["dMRI"].parameters())
    return pytest.approx(SCALE * elements**0.5, rel=1e-3)


def test_bfloat16(tmp_path: Path) -> None:
    """Under autocast parameters and gradients stay in float32."""
    trainer, _ = compare(reader, arguments(tmp_path, bf16=True, **FOUR), hold=True)
    assert trainer.accelerator.mixed_precision == "bf16"
    (row,) = rows_of(trainer)
    assert row["modaldummy/fraction"] <= 1e-4
    assert row["grad_norm/dMRI"] == dummy_norm(trainer.model)


class Half(Trainer):
    """With autocast to float16 and a GradScaler, which accelerate leaves out on a CPU."""

    factor = 2.0**16

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        assert self.accelerator.mixed_precision == "fp16"
        assert self.accelerator.scaler is None
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.factor)


class MixedHalf(DummyLossMixin, Half): ...


class OwnHalf(OwnTrainer, Half): ...


@pytest.mark.parametrize("maximum", [0.0, 1e6])
def test_float16(maximum: float, tmp_path: Path) -> None:
    """Norms are those of unscaled gradients, with the mixin and without."""
    args = arguments(tmp_path, fp16=True, max_grad_norm=maximum, **FOUR)
    trainer, seen = compare(scanner, args, (MixedHalf, Half))
    (row,) = rows_of(trainer)
    assert row["grad_norm/dMRI"] == dummy_norm(trainer.model)
    gradients = [g for key, g in seen.steps[0].items() if owner_of(key) == "T1"]
    norm = math.hypot(*(g.norm().item() for g in gradients if g is not None))
    assert row["grad_norm/T1"] == pytest.approx(norm, rel=1e-6)
    trainer = own(args, OwnHalf)
    trainer.train()
    (row,) = rows_of(trainer)
    assert row["grad_norm/dMRI"] == dummy_norm(trainer.model)


class Large(Half):
    factor = 2.0**40


class MixedLarge(DummyLossMixin, Large): ...


class Skipped(TrainerCallback):
    """Counts the steps that the scaler skips."""

    number = 0

    def on_optimizer_step(self, *_: Any, **given: Any) -> None:
        self.number += given["optimizer"].step_was_skipped


def test_a_step_that_the_scaler_skips_trains_nothing(tmp_path: Path) -> None:
    """T1 is active only at skipped steps, so that the hold leaves it unchanged."""
    model, skipped = scanner(), Skipped()
    before = values_of(model)
    data = samples(model, [["T1"]] * 3 + [["dMRI"]] * 40)
    # The first steps overflow, and each of them halves the factor.
    args = arguments(tmp_path, fp16=True, optim="adamw_torch", logging_steps=20)
    mixed(model, args, MixedLarge, hold=True, train_dataset=data, callbacks=[skipped]).train()
    assert 3 < skipped.number < 40
    for name, value in values_of(model).items():
        unchanged = torch.equal(value, before[name])
        assert unchanged == (owner_of(name) in ("T1", "rsfMRI")), name


# PEFT asks by a name that transformers has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(tmp_path: Path) -> None:
    """LoRA on the trunk and T1, and a trainable copy of dMRI. The map is that of the bare model."""
    config = LoraConfig(
        target_modules=["q_proj", "T1"], modules_to_save=["dMRI"], r=1, init_lora_weights=False
    )
    bare: list[Any] = []

    def adapted() -> Any:
        bare.append(reader())
        torch.manual_seed(1)
        return get_peft_model(bare[-1], config)

    data = samples(reader(), [["rsfMRI"]] * 4)  # which is frozen
    # The mixin passes the adapted model, and the wrapper is made with the bare one.
    seen, others = Recorder(), Recorder()
    args = arguments(tmp_path, **FOUR)
    trainer = mixed(
        adapted(), args, wrapper=lambda _: wrapper_of(bare[0]), callbacks=[seen], train_dataset=data
    )
    trainer.train()
    plain(adapted(), args, callbacks=[others], train_dataset=data).train()
    for name, parameter in trainer.model.named_parameters():
        gradient, real = seen.steps[0][name], others.steps[0][name]
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None:
            expected = torch.full_like(gradient, SCALE) if real is None else real
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    reentrant = {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    args = arguments(tmp_path, activation_checkpointing=True, **reentrant, **FOUR)
    trainer, _ = compare(reader, args)
    assert trainer.model.is_activation_checkpointing


@pytest.mark.long
def test_compilation(tmp_path: Path) -> None:
    args = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, _ = compare(reader, arguments(tmp_path, **args, **FOUR), hold=True)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize(
    ("hold", "is_first", "codes"),
    [(False, True, ["MD141 warning"]), (True, True, []), (False, False, [])],
)
def test_the_first_process_logs_findings_once(
    hold: bool,
    is_first: bool,
    codes: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the first training starts."""
    trainer = mixed(scanner(), arguments(tmp_path, optim="adamw_torch"), hold=hold)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: is_first)
    name = "modaldummy.integrations.transformers"
    with caplog.at_level(logging.INFO, name):
        trainer.train()
        trainer.train()
    found = [record.getMessage() for record in caplog.records if record.name == name]
    assert [message[:13] for message in found if message.startswith("MD")] == codes
    assert ("The mixin has set up a hold of the optimizer" in found) == (hold and is_first)


class WithAuxiliary(MixedTrainer):
    """Adds a term to the loss that the mixin returns."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + model.auxiliary.square().sum()


def test_the_loss_that_goes_to_backward_is_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = scanner()
    model.auxiliary = torch.nn.Parameter(torch.ones(2))
    mixed(model, arguments(tmp_path), WithAuxiliary).train()
    assert not [message for message in caplog.messages if message.startswith("MD1")]


def test_examples_must_be_a_list_of_batches(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`shadow_examples` must be a list of batches, got"):
        mixed(scanner(), arguments(tmp_path), shadow_examples={"T1": torch.ones(2, 4)})
    with pytest.raises(TypeError, match="shadow"):
        mixed(scanner(), arguments(tmp_path), shadow="no")


def test_the_shadow_is_paused_while_a_prediction_generates(tmp_path: Path) -> None:
    model = scanner()
    args = arguments(tmp_path)
    trainer = mixed(model, args)
    data = {name: torch.ones(2, width) for name, width in WIDTHS.items()}
    trainer.shadow = shadow_inactive(trainer.wrapper, model, examples=[data])
    shadowed: list[Any] = []
    model.register_forward_hook(lambda *_: shadowed.append(trainer.shadow.shadowed))
    for generates in (False, True):
        args.predict_with_generate = generates  # type: ignore[attr-defined]
        trainer.prediction_step(model, {"T1": data["T1"]}, prediction_loss_only=False)
    assert shadowed == [("rsfMRI", "dMRI"), ()]


def test_a_tower_that_the_map_forgot_is_named_after_the_first_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = scanner()
    wrapper = DummyLossWrapper(model, {name: MAP[name] for name in ("T1", "rsfMRI")})
    batches = [
        {name: torch.ones(WIDTHS[name]) for name in ("T1",)} | {"labels": torch.ones(())}
    ] * 8
    trainer = mixed(model, arguments(tmp_path), wrapper=wrapper, train_dataset=batches)
    with caplog.at_level(logging.INFO, "modaldummy.integrations.transformers"):
        trainer.train()
    found = [message for message in caplog.messages if message.startswith("MD111")]
    assert len(found) == 1
    assert "towers.dMRI.weight" in found[0]
