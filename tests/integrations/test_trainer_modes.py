"""Under the Trainer's modes: low precision, adapters, checkpointing, compilation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback
from tests.integrations.trainers import (
    MODELS,
    SCALE,
    OwnTrainer,
    Recorder,
    arguments,
    mixed,
    own,
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

LONG = pytest.mark.long
FOUR = {"gradient_accumulation_steps": 4}


def check_same(seen: Recorder, others: Recorder) -> None:
    """Of one step: real gradients bit for bit, and `SCALE` where the plain Trainer has none."""
    (found,), (expected,) = seen.steps, others.steps
    idle = 0
    for name, gradient in found.items():
        real = expected[name]
        if gradient is None:
            assert real is None
            continue
        if real is None:
            idle += 1
            torch.testing.assert_close(
                gradient, torch.full_like(gradient, SCALE), rtol=1e-6, atol=0
            )
        else:
            assert torch.equal(gradient, real), name
    assert idle == 4


@pytest.mark.parametrize("name", [pytest.param("scanner", marks=LONG), "reader"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Under autocast, with accumulation: parameters and their gradients are in float32."""
    seen, others = Recorder(), Recorder()
    args = {"bf16": True, "max_steps": 1} | FOUR
    model = MODELS[name]()
    trainer = mixed(
        model, arguments(tmp_path, **args), callbacks=[seen, GradientNormCallback()], hold=True
    )
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    plain(MODELS[name](), arguments(tmp_path, **args), callbacks=[others]).train()
    check_same(seen, others)
    (row,) = rows_of(trainer)
    assert row["modaldummy/fraction"] <= 1e-4
    elements = sum(p.numel() for p in model.towers["dMRI"].parameters())
    assert row["grad_norm/dMRI"] == pytest.approx(SCALE * elements**0.5, rel=1e-6)


def test_weights_of_bfloat16(tmp_path: Path) -> None:
    """No inactive element is rounded to zero, not even a quarter at a time."""
    model, seen = reader().bfloat16(), Recorder()
    data = [
        {key: value.bfloat16() if value.is_floating_point() else value for key, value in s.items()}
        for s in samples(model)
    ]
    args = arguments(tmp_path, max_steps=1, **FOUR)
    mixed(model, args, train_dataset=data, callbacks=[seen]).train()
    for key, gradient in seen.steps[0].items():
        if owner_of(key) in ("rsfMRI", "dMRI"):
            assert gradient is not None
            assert gradient.dtype == torch.bfloat16
            assert gradient.float() == pytest.approx(SCALE, rel=2**-6)


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


@pytest.mark.parametrize(
    ("name", "maximum"), [("scanner", 0.0), pytest.param("reader", 1e6, marks=LONG)]
)
def test_float16(name: str, maximum: float, tmp_path: Path) -> None:
    """Gradients are as without the mixin, and norms without the factor of the scaler."""
    seen, others = Recorder(), Recorder()
    args = {"fp16": True, "max_steps": 1, "max_grad_norm": maximum} | FOUR
    model = MODELS[name]()
    callbacks = [seen, GradientNormCallback()]
    trainer = mixed(model, arguments(tmp_path, **args), MixedHalf, callbacks=callbacks)
    trainer.train()
    plain(MODELS[name](), arguments(tmp_path, **args), Half, callbacks=[others]).train()
    check_same(seen, others)
    (row,) = rows_of(trainer)
    elements = sum(p.numel() for p in model.towers["dMRI"].parameters())
    assert row["grad_norm/dMRI"] == pytest.approx(SCALE * elements**0.5, rel=1e-3)
    gradients = [g for key, g in seen.steps[0].items() if owner_of(key) == "T1"]
    norm = math.hypot(*(g.norm().item() for g in gradients if g is not None))
    assert row["grad_norm/T1"] == pytest.approx(norm, rel=1e-6)


class OwnHalf(OwnTrainer, Half): ...


@pytest.mark.parametrize("maximum", [0.0, 1e6])
def test_float16_without_the_mixin(maximum: float, tmp_path: Path) -> None:
    """The Trainer has unscaled the gradients when the callback measures them."""
    args = arguments(tmp_path, fp16=True, max_steps=1, max_grad_norm=maximum)
    trainer = own(scanner(), args, OwnHalf)
    trainer.train()
    (row,) = rows_of(trainer)
    elements = sum(p.numel() for p in trainer.model.towers["dMRI"].parameters())
    assert row["grad_norm/dMRI"] == pytest.approx(SCALE * elements**0.5, rel=1e-3)


class Large(Half):
    factor = 2.0**40


class MixedLarge(DummyLossMixin, Large): ...


class Steps(TrainerCallback):
    """Counts the steps that the scaler had skipped."""

    skipped = 0

    def on_optimizer_step(self, *_: Any, **given: Any) -> None:
        self.skipped += given["optimizer"].step_was_skipped


def test_the_hold_outlives_steps_that_a_scaler_skips(tmp_path: Path) -> None:
    """T1 is active at skipped steps and never again: they train nothing."""
    model, steps = scanner(), Steps()
    before = values_of(model)
    data = samples(model, [["T1"]] * 3 + [["dMRI"]] * 40)
    # Each skipped step halves the factor; the first batches overflow for sure.
    args = arguments(tmp_path, fp16=True, optim="adamw_torch", logging_steps=20)
    trainer = mixed(
        model,
        args,
        MixedLarge,
        hold=True,
        train_dataset=data,
        callbacks=[steps, GradientNormCallback()],
    )
    trainer.train()
    assert 3 < steps.skipped < 40
    after = values_of(model)
    for name, value in after.items():
        same = torch.equal(value, before[name])
        assert same == (owner_of(name) in ("T1", "rsfMRI")), name
    assert not [p for p in trainer.optimizer.optimizer.state if p is model.towers["T1"].weight]


# PEFT asks by a name that transformers has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("late", [False, pytest.param(True, marks=LONG)])
def test_adapters(late: bool, tmp_path: Path) -> None:
    """LoRA on one tower and the trunk, another saved whole; the wrapper made before or after."""
    config = LoraConfig(
        target_modules=["q_proj", "T1"], modules_to_save=["dMRI"], r=1, init_lora_weights=False
    )

    def adapted() -> tuple[Any, Any]:
        bare = reader()
        wrapper = None if late else wrapper_of(bare)
        torch.manual_seed(1)
        model: Any = get_peft_model(bare, config)
        return model, wrapper or wrapper_of(model)

    seen, others = Recorder(), Recorder()
    args = arguments(tmp_path, max_steps=1, **FOUR)
    batches = [["rsfMRI"]] * 4  # which is frozen
    (model, wrapper), (other, _) = adapted(), adapted()
    options = {"train_dataset": samples(reader(), batches)}
    trainer = mixed(model, args, wrapper=wrapper, callbacks=[seen], hold=True, **options)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    plain(other, args, callbacks=[others], **options).train()
    check_same(seen, others)
    named = {name for name, gradient in seen.steps[0].items() if gradient is not None}
    assert named == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [pytest.param(False, marks=LONG), True])
def test_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    seen, others = Recorder(), Recorder()
    args = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 1,
    }
    model = reader()
    mixed(model, arguments(tmp_path, **args, **FOUR), callbacks=[seen]).train()
    assert model.is_activation_checkpointing
    plain(reader(), arguments(tmp_path, **args, **FOUR), callbacks=[others]).train()
    check_same(seen, others)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_compilation(name: str, tmp_path: Path) -> None:
    seen, others = Recorder(), Recorder()
    args = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    model = MODELS[name]()
    trainer = mixed(model, arguments(tmp_path, **args, **FOUR), callbacks=[seen], hold=True)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    plain(MODELS[name](), arguments(tmp_path, **args, **FOUR), callbacks=[others]).train()
    check_same(seen, others)
