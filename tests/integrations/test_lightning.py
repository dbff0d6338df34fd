"""With a wrapper, Lightning's Trainer trains as without one, and no gradient is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from modaldummy.integrations.lightning import DummyLossCallback
from tests.asserts import assert_same_bits
from tests.holding import NAMES
from tests.integrations.lightning_modules import (
    QUIET,
    TURNS,
    Batch,
    Gradients,
    Kept,
    Module,
    batches,
    fit,
    trainer,
)
from tests.integrations.trainers import labels_of

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

SHAPES = {"weight": (4, 3), "bias": (4,)}


def assert_same_parameters(one: LightningModule, other: LightningModule) -> None:
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert_same_bits(parameter, others[name], name)


def assert_dummies_added(found: Gradients, bare: Gradients) -> None:
    """Real gradients bit for bit, and exactly the scale where there was none."""
    full = {f"model.towers.{name}.{kind}": s for name in NAMES for kind, s in SHAPES.items()}
    for name, gradient in bare.items():
        expected = torch.full(full[name], 1e-7) if gradient is None else gradient
        assert_same_bits(found[name], expected, name)


def fp16() -> MixedPrecision:
    """`precision="16-mixed"`, which the Trainer itself does not offer on a CPU."""
    # The default factor of 65,536 is infinite in float16, in which the loss of `Towers` is.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"plugins": fp16}],
    ids=["float32", "bfloat16", "float16"],
)
def test_held_training_is_that_without_the_wrapper(options: dict[str, Any]) -> None:
    """Bit for bit, with AdamW and weight decay."""
    ours, bare = Module(), Module(wrapped=False)
    callback = DummyLossCallback(hold=True)
    for module, callbacks in ((ours, [callback]), (bare, [])):
        made = {k: value() if callable(value) else value for k, value in options.items()}
        fit(module, TURNS, *callbacks, **made)
    assert len(ours.stepped) == len(TURNS)
    for found, expected in zip(ours.stepped, bare.stepped, strict=True):
        assert_dummies_added(found, expected)
    assert_same_parameters(ours, bare)
    assert callback.findings == []


def test_without_a_callback_accumulated_batches_share_one_dummy_term() -> None:
    """Lightning divides the total, so that a parameter inactive in all batches gets `scale`."""
    ours, bare = Module(), Module(wrapped=False)
    for module in (ours, bare):
        fit(module, [["T1"], ["T1"], ["T1"], ["rsfMRI"]], accumulate_grad_batches=2, max_steps=1)
    assert_dummies_added(ours.gradients_by_batch[1], bare.gradients_by_batch[1])


def test_the_optimizer_moves_what_any_accumulated_batch_trained() -> None:
    module = Module()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, [["T1"], ["rsfMRI"]], DummyLossCallback(hold=True), accumulate_grad_batches=2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "dMRI" not in name}


class Manual(Module):
    """Two optimizers, each with a backward pass; one has no parameter of the map."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        towers = torch.optim.AdamW(self.model.towers.parameters(), lr=0.1)
        return towers, torch.optim.AdamW(self.model.trunk.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        both: Any = self.optimizers()
        for optimizer in both:
            loss = self.model.loss(batch["modality"])
            total = self.wrapper.total(loss, batch) if self.wrapped else loss
            optimizer.zero_grad()
            self.manual_backward(total)
            optimizer.step()


def test_manual_optimization_with_two_optimizers() -> None:
    ours, bare = Manual(), Manual(wrapped=False)
    fit(ours, TURNS, DummyLossCallback(hold=True))
    fit(bare, TURNS)
    assert_same_parameters(ours, bare)
    assert all(g is not None for step in ours.stepped for g in step.values())


class Validated(Module):
    """Keeps the losses of validation."""

    def __init__(self, wrapped: bool = True) -> None:
        super().__init__(wrapped)
        self.losses: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.model.loss(batch["modality"])
        self.losses.append(self.wrapper.total(loss, batch) if self.wrapped else loss)


def test_validation_uses_the_real_loss_and_changes_nothing() -> None:
    ours, bare = Validated(), Validated(wrapped=False)
    for module, callbacks in ((ours, [DummyLossCallback(hold=True)]), (bare, [])):
        made = trainer(*callbacks, val_check_interval=1, num_sanity_val_steps=1)
        made.fit(module, batches(*TURNS), batches(["dMRI"]))
    assert len(ours.losses) == 1 + len(TURNS)
    for found, expected in zip(ours.losses, bare.losses, strict=True):
        assert_same_bits(found, expected, "loss")
    assert ours.wrapper.last is not None
    assert ours.wrapper.last.active == ("T1",)
    assert_same_parameters(ours, bare)


# Resuming does not use what `ModelCheckpoint` stores for itself.
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """From the end of an epoch, in a new module, with a new hold."""
    whole = Module()
    fit(whole, TURNS, DummyLossCallback(hold=True), max_epochs=2)
    saving = ModelCheckpoint(tmp_path, filename="end")
    fit(Module(), TURNS, DummyLossCallback(hold=True), saving, enable_checkpointing=True)
    resumed = Module()
    second = trainer(DummyLossCallback(hold=True), max_epochs=2)
    second.fit(resumed, batches(*TURNS), ckpt_path=tmp_path / "end.ckpt")
    assert len(resumed.stepped) == len(TURNS)
    assert_same_parameters(resumed, whole)


class Silent(Module):
    """Logs nothing, because torch 2.13 cannot trace `self.log` of Lightning 2.6."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model.loss(batch["modality"])
        return self.wrapper.total(loss, batch) if self.wrapped else loss


@pytest.mark.long
# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_module() -> None:
    """The hold and the labels know which modalities the compiled code had."""
    ours, bare, logger = Silent(), Silent(wrapped=False), Kept()
    compiled: Any = torch.compile(ours, backend="eager")
    fit(compiled, TURNS, DummyLossCallback(hold=True), logger=logger, accumulate_grad_batches=2)
    fit(bare, TURNS, accumulate_grad_batches=2)
    assert torch.equal(ours.model.towers["dMRI"].weight, bare.model.towers["dMRI"].weight)
    rows = logger.ours().values()
    assert [labels_of(dict(row)) for row in rows] == [{"T1", "rsfMRI", "inactive"}] * 2


# --- which wrapper -------------------------------------------------------------------------------


def test_a_wrapped_loss_function_counts_as_its_wrapper() -> None:
    class Criterion(Module):
        def __init__(self) -> None:
            super().__init__(wrapped=False)
            spec = {name: f"model.towers.{name}" for name in NAMES}
            self.criterion = DummyLossWrapper(self, spec)(torch.square)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = self.model.loss(batch["modality"])
            total: Tensor = self.criterion(loss, modalities=batch["modality"])
            return total

    module = Criterion()
    fit(module, TURNS, DummyLossCallback(hold=True))
    assert all(g is not None for step in module.stepped for g in step.values())


@pytest.mark.parametrize(
    ("number", "given"), [(0, "got none. Pass the wrapper"), (2, "got 2. Pass the wrapper")]
)
def test_a_module_without_one_clear_wrapper_is_refused(number: int, given: str) -> None:
    module = Module(wrapped=False)
    spec = {name: f"model.towers.{name}" for name in NAMES}
    for place in range(number):
        setattr(module, f"wrapper{place}", DummyLossWrapper(module, spec))
    expected = rf"`Module` must have one DummyLossWrapper among its attributes, {given}"
    with pytest.raises(ValueError, match=expected):
        fit(module, TURNS, DummyLossCallback())


def test_a_wrapper_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="shares no parameter with the model of the wrapper"):
        fit(Module(), TURNS, DummyLossCallback(Module().wrapper))


@pytest.mark.parametrize("used_before", [False, True])
def test_a_loss_that_does_not_go_through_the_wrapper_is_refused(used_before: bool) -> None:
    """Also if those of an earlier training did."""
    module = Module()
    if used_before:
        fit(module, TURNS, DummyLossCallback())
    module.wrapped = False
    with pytest.raises(RuntimeError, match="The loss of `Module` did not go through the wrapper"):
        fit(module, TURNS, DummyLossCallback())


# --- the hold ------------------------------------------------------------------------------------


class Failing(Module):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ArithmeticError


class Unsupported(Module):
    """The second optimizer cannot be held."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        towers = self.model.towers
        second: Any = torch.optim.LBFGS(towers["dMRI"].parameters())
        return torch.optim.AdamW(towers["T1"].parameters()), second


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Module, None), (Failing, ArithmeticError), (Unsupported, UnsupportedEngineError)],
)
def test_a_hold_ends_with_the_training(kind: type[Module], error: type[Exception] | None) -> None:
    """Also if training fails, or if another optimizer cannot be held."""
    module = kind()
    if error is None:
        fit(module, TURNS, DummyLossCallback(hold=True))
    else:
        with pytest.raises(error):
            fit(module, TURNS, DummyLossCallback(hold=True))
    assert not module.wrapper._observers


def test_a_hold_without_a_parameter_of_the_map_is_refused() -> None:
    class Trunk(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.trunk.parameters())

    with pytest.raises(ValueError, match="has no parameter of the modalities"):
        fit(Trunk(), TURNS, DummyLossCallback(hold=True))
