"""With a wrapper, Lightning's Trainer trains as without one, and nobody misses a gradient."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from modaldummy import DummyLossWrapper, hold_inactive
from modaldummy.integrations.lightning import DummyLossCallback
from tests.asserts import assert_same_bits
from tests.holding import NAMES, Towers
from tests.integrations.lightning_modules import (
    QUIET,
    Batch,
    Gradients,
    Kept,
    Module,
    batches,
    fit,
    trainer,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI never


def assert_same_parameters(one: LightningModule, other: LightningModule) -> None:
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert_same_bits(parameter, others[name], name)


def expected_gradients(bare: Gradients, scale: float) -> Gradients:
    """What the wrapper makes of the gradients without it."""
    full = {f"model.towers.{name}.{kind}": s for name in NAMES for kind, s in SHAPES.items()}
    return {
        name: torch.full(full[name], scale) if gradient is None else gradient
        for name, gradient in bare.items()
    }


SHAPES = {"weight": (4, 3), "bias": (4,)}


def fp16() -> MixedPrecision:
    """`precision="16-mixed"`, which the Trainer itself does not offer on a CPU."""
    # The default factor of 65,536 is infinite in float16, in which the loss of `Towers` is.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_training_that_is_held_is_that_without_the_wrapper(precision: str) -> None:
    """Bit for bit, with AdamW, weight decay and all; inactive gradients are exactly `scale`."""
    modules = []
    for wrapped in (True, False):
        module = Module(wrapped)
        options: dict[str, Any] = (
            {"plugins": fp16()} if precision == "fp16" else {"precision": precision}
        )
        fit(module, TURNS, *[DummyLossCallback(hold=True)] * wrapped, **options)
        modules.append(module)
    ours, bare = modules
    assert len(ours.stepped) == len(bare.stepped) == len(TURNS)
    for actual, without in zip(ours.stepped, bare.stepped, strict=True):
        expected = expected_gradients(without, 1e-7)
        assert None not in expected.values()
        for name, gradient in actual.items():
            assert_same_bits(gradient, expected[name], name)
    assert_same_parameters(ours, bare)


def test_it_trains_without_a_callback() -> None:
    module = Module()
    fit(module, TURNS)
    assert module.wrapper.last is not None
    assert module.wrapper.last.active == ("T1",)
    assert all(g is not None for step in module.stepped for g in step.values())


def test_accumulated_dummies_are_those_of_one_step() -> None:
    """Lightning divides the total, so that a parameter inactive in all batches gets `scale`."""
    module, bare = Module(), Module(wrapped=False)
    for one in (module, bare):
        fit(one, [["T1"], ["T1"], ["T1"], ["rsfMRI"]], accumulate_grad_batches=2, max_steps=1)
    for name, gradient in expected_gradients(bare.backwarded[1], 1e-7).items():
        assert_same_bits(module.backwarded[1][name], gradient, name)


def test_a_hold_moves_what_any_accumulated_batch_has_taught() -> None:
    module = Module()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, [["T1"], ["rsfMRI"]], DummyLossCallback(hold=True), accumulate_grad_batches=2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "dMRI" not in name}


def test_without_a_hold_adamw_moves_what_no_batch_has_taught() -> None:
    """Otherwise the tests of `hold` would pass without it."""
    module = Module()
    start = module.model.towers["dMRI"].weight.detach().clone()
    fit(module, TURNS, DummyLossCallback())
    assert not torch.equal(module.model.towers["dMRI"].weight, start)


def test_a_hold_ends_with_the_training() -> None:
    module, callback = Module(), DummyLossCallback(hold=True)
    made = fit(module, TURNS, callback)
    assert module.wrapper._observers == []
    (optimizer,) = made.optimizers
    before = module.model.towers["dMRI"].weight.detach().clone()
    batch = {"modality": ["T1"]}
    module.wrapper.total(module.model.loss(["T1"]), batch).backward()
    optimizer.step()
    assert not torch.equal(module.model.towers["dMRI"].weight, before)


def test_a_hold_of_ones_own_works_too() -> None:
    """In `configure_optimizers`, as where there is no callback."""

    class Held(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            hold_inactive(self.wrapper, optimizer)
            return optimizer

    ours, bare = Held(), Module(wrapped=False)
    fit(ours, TURNS)
    fit(bare, TURNS)
    assert_same_parameters(ours, bare)


class Manual(Module):
    """Two optimizers, each with a backward pass of its own; one has no parameter of the map."""

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
    """Keeps what validation says."""

    def __init__(self, wrapped: bool = True) -> None:
        super().__init__(wrapped)
        self.losses: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.model.loss(batch["modality"])
        self.losses.append(self.wrapper.total(loss, batch) if self.wrapped else loss)


def test_validation_is_untouched() -> None:
    """The loss is the real one, the report stays that of training, and labels do too."""
    callback = DummyLossCallback(hold=True)
    ours, bare = Validated(), Validated(wrapped=False)
    for module, callbacks in ((ours, [callback]), (bare, [])):
        made = trainer(*callbacks, val_check_interval=1, num_sanity_val_steps=1)
        made.fit(module, batches(*TURNS), batches(["dMRI"]))
    assert len(ours.losses) == 1 + len(TURNS)
    for actual, expected in zip(ours.losses, bare.losses, strict=True):
        assert_same_bits(actual, expected, "loss")
    assert ours.wrapper.last is not None
    assert ours.wrapper.last.active == ("T1",)
    assert_same_parameters(ours, bare)


# Resuming takes none of what `ModelCheckpoint` keeps for itself.
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """From a checkpoint at the end of an epoch, into modules that are new, held again."""
    whole = Module()
    fit(whole, TURNS, DummyLossCallback(hold=True), max_epochs=2)
    saving = ModelCheckpoint(tmp_path, filename="end")
    fit(Module(), TURNS, DummyLossCallback(hold=True), saving, enable_checkpointing=True)
    resumed = Module()
    second = trainer(DummyLossCallback(hold=True), max_epochs=2)
    second.fit(resumed, batches(*TURNS), ckpt_path=tmp_path / "end.ckpt")
    assert len(resumed.stepped) == len(TURNS)
    assert_same_parameters(resumed, whole)
    names = {id(p): name for name, p in resumed.named_parameters()}
    states = second.optimizers[0].state
    assert {names[id(p)] for p, state in states.items() if state} == {
        name for name in names.values() if "dMRI" not in name
    }


class Silent(Module):
    """Logs nothing: `self.log` of Lightning 2.6 cannot be traced by torch 2.13."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model.loss(batch["modality"])
        return self.wrapper.total(loss, batch) if self.wrapped else loss


@pytest.mark.long
# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_module_that_is_compiled() -> None:
    """The hold sees what `training_step` did in compiled code, and so do labels."""
    ours, bare, logger = Silent(), Silent(wrapped=False), Kept()
    compiled: Any = torch.compile(ours, backend="eager")
    fit(compiled, TURNS, DummyLossCallback(hold=True), logger=logger, accumulate_grad_batches=2)
    fit(bare, TURNS, accumulate_grad_batches=2)
    assert torch.equal(ours.model.towers["dMRI"].weight, bare.model.towers["dMRI"].weight)
    assert [labels(row) for row in logger.ours().values()] == [{"T1", "rsfMRI", "inactive"}] * 2


def labels(row: Mapping[str, float]) -> set[str]:
    return {key.split("]")[0].removeprefix("grad/[") for key in row if key.startswith("grad/[")}


def test_a_wrapped_loss_function_will_do() -> None:
    """The callback finds the wrapper behind it."""

    class Criterion(Module):
        def __init__(self) -> None:
            super().__init__(wrapped=False)
            self.model = Towers()
            spec = {name: f"model.towers.{name}" for name in NAMES}
            self.criterion = DummyLossWrapper(self, spec)(torch.square)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            total: Tensor = self.criterion(
                self.model.loss(batch["modality"]), modalities=batch["modality"]
            )
            return total

    module = Criterion()
    fit(module, TURNS, DummyLossCallback(hold=True))
    assert all(g is not None for step in module.stepped for g in step.values())


def test_a_wrapper_of_a_module_inside_will_do() -> None:
    class Inside(Module):
        def __init__(self) -> None:
            super().__init__(wrapped=False)
            spec = {name: f"model.towers.{name}" for name in NAMES}
            self.model.towers.wrapper = DummyLossWrapper(self, spec)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            total: Tensor = self.model.towers.wrapper.total(
                self.model.loss(batch["modality"]), batch
            )
            return total

    module = Inside()
    fit(module, TURNS, DummyLossCallback(hold=True))
    assert all(g is not None for step in module.stepped for g in step.values())
