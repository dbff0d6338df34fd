"""What `DummyLossCallback` logs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

import modaldummy.integrations.lightning as integration
from modaldummy import DummyLossWrapper, diagnose, gradient_norms
from modaldummy.integrations.lightning import DummyLossCallback
from tests.holding import NAMES
from tests.integrations.lightning_modules import QUIET, Batch, Gradients, Kept, Module, fit

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

TURNS = [["T1"], ["rsfMRI"], ["T1", "rsfMRI"], ["T1"]]  # dMRI never
DUMMY = 1e-7 * 16**0.5  # the norm of a tower's dummy gradient


def owners(row: Mapping[str, float]) -> dict[str, set[str]]:
    """Towers by the label that they stand under."""
    found: dict[str, set[str]] = {}
    for key in row:
        if key.startswith("grad/["):
            label, _, name = key.removeprefix("grad/[").partition("]/")
            found.setdefault(label, set()).add(name.split(".")[2])
    return found


def norm(found: Gradients, name: str) -> float:
    own = [g for n, g in found.items() if f"towers.{name}." in n and g is not None]
    return float(torch.cat([g.flatten() for g in own]).norm())


def test_each_step_is_logged_with_the_modalities_of_its_own() -> None:
    """Under the step of Lightning's own row; a label that is gone is not logged again."""
    logger = Kept()
    fit(Module(), TURNS, DummyLossCallback(), logger=logger)
    assert list(logger.ours()) == list(logger.lightnings()) == [0, 1, 2, 3]
    for row, active in zip(logger.ours().values(), TURNS, strict=True):
        expected = {name: {name} for name in active} | {"inactive": set(NAMES) - set(active)}
        assert owners(row) == expected
        assert {name for name in NAMES if row[f"modaldummy/active/{name}"]} == set(active)


def test_lightning_repeats_what_self_log_was_given() -> None:
    """Which is why the callback does not use it; with this test gone, it could."""

    class Once(Module):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if self.trainer.global_step == 0:
                self.log("once", 1.0)

    logger = Kept()
    fit(Once(), TURNS, logger=logger)
    assert [row["once"] for row in logger.lightnings().values()] == [1.0] * len(TURNS)


def test_only_steps_that_the_trainer_logs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, callback, measured = Kept(), DummyLossCallback(), []

    def counted(*args: Any, **kwargs: Any) -> dict[str, float]:
        measured.append(args)
        return gradient_norms(*args, **kwargs)

    monkeypatch.setattr(integration, "gradient_norms", counted)
    fit(Module(), TURNS, callback, logger=logger, log_every_n_steps=2)
    assert list(logger.ours()) == list(logger.lightnings()) == [1, 3]
    assert len(measured) == 2
    assert logger.ours()[3].items() >= callback.metrics.items()
    fit(Module(), TURNS, DummyLossCallback())  # no logger
    assert len(measured) == 2


def test_norms_are_those_before_clipping() -> None:
    logger, module = Kept(), Module()
    fit(module, TURNS, DummyLossCallback(), logger=logger, gradient_clip_val=1e-3)
    for step, row in logger.ours().items():
        assert step is not None
        for name in NAMES:
            assert row[f"grad_norm/{name}"] == pytest.approx(norm(module.backwarded[step], name))
        clipped = torch.cat([g.flatten() for g in module.stepped[step].values() if g is not None])
        assert clipped.norm() <= 1.001e-3
    assert logger.ours()[0]["grad_norm/dMRI"] == pytest.approx(DUMMY)


def test_labels_are_those_of_all_accumulated_batches() -> None:
    logger = Kept()
    turns = [["T1"], ["rsfMRI"], ["dMRI"], ["dMRI"], ["T1"]]  # the last step has one batch
    fit(Module(), turns, DummyLossCallback(), logger=logger, accumulate_grad_batches=2)
    rows = list(logger.ours().values())
    assert list(logger.ours()) == list(logger.lightnings()) == [0, 1, 2]
    assert [set(owners(row)) - {"inactive"} for row in rows] == [{"T1", "rsfMRI"}, {"dMRI"}, {"T1"}]
    assert [row["modaldummy/active/T1"] for row in rows] == [1, 0, 1]
    assert [row["modaldummy/num_params"] for row in rows] == [2, 4, 4]
    assert rows[0]["grad_norm/dMRI"] == pytest.approx(DUMMY)
    assert rows[2]["grad_norm/dMRI"] == pytest.approx(DUMMY / 2)  # half of a step


@pytest.mark.parametrize("fused", [False, True])
def test_norms_are_unscaled(fused: bool) -> None:
    """Also where the optimizer, not Lightning, divides by the scaler's factor."""

    class Fused(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=fused)

    logger = Kept()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    fit(Fused(), TURNS, DummyLossCallback(), logger=logger, plugins=plugin)
    assert [row["grad_norm/dMRI"] for row in logger.ours().values()] == [pytest.approx(DUMMY)] * 4


def test_keys_can_be_the_same_at_each_step() -> None:
    logger = Kept()
    fit(Module(), TURNS, DummyLossCallback(label=False, prefix="train/grad"), logger=logger)
    first, *others = [row.keys() for row in logger.ours().values()]
    assert all(keys == first for keys in others)
    assert "train/grad/dMRI/model.towers.dMRI.weight" in first


def test_a_csv_of_lightning_is_one_that_diagnose_reads(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Module(), TURNS * 16, DummyLossCallback(hold=True), logger=logger)
    found = [finding.code for finding in diagnose(tmp_path / "metrics.csv")]
    assert found == ["MD225"]  # no batch contains dMRI


class Manual(Module):
    """Two optimizers that step one after the other, each after a loss of its own."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = [self.model.towers["T1"].weight, *self.model.trunk.parameters()]
        rest = [p for p in self.model.parameters() if all(p is not other for other in first)]
        return torch.optim.SGD(first, lr=0.1), torch.optim.SGD(rest, lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        both: Any = self.optimizers()
        for optimizer, names in zip(both, (["T1"], ["rsfMRI"]), strict=True):
            self.zero_grad()
            self.manual_backward(self.wrapper.total(self.model.loss(names), names))
            optimizer.step()


def test_optimizers_that_step_in_one_batch_make_one_row() -> None:
    """With what is known last of each gradient, and all that was active."""
    logger = Kept()
    fit(Manual(), TURNS[:2], DummyLossCallback(), logger=logger)
    assert [step for step, row in logger.rows if "modaldummy/real" in row] == [0, 1]
    row = logger.ours()[0]
    assert owners(row)["T1"] == {"T1"}
    assert owners(row)["rsfMRI"] == {"rsfMRI"}
    assert row["grad_norm/T1"] == pytest.approx(DUMMY)  # inactive in the second loss


def test_findings_are_logged_where_training_starts(caplog: pytest.LogCaptureFixture) -> None:
    callback = DummyLossCallback()
    with caplog.at_level(logging.INFO, "modaldummy.integrations.lightning"):
        fit(Module(), TURNS, callback)
    assert [finding.code for finding in callback.findings] == ["MD141"]
    (record,) = [r for r in caplog.records if r.name == "modaldummy.integrations.lightning"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "MD141 warning: AdamW moves the parameters of inactive modalities by up to"
    )


def test_findings_are_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the other ranks, which have them all the same."""
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    callback = DummyLossCallback()
    fit(Module(), TURNS, callback)
    assert [finding.code for finding in callback.findings] == ["MD141"]
    assert "MD141" not in caplog.text


def test_a_hold_is_known_to_the_findings() -> None:
    callback = DummyLossCallback(hold=True)
    fit(Module(), TURNS, callback)
    assert callback.findings == []


def test_preflight_is_given_what_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor only where the scaler is Lightning's, a norm only where clipping is by norm."""
    seen: dict[str, Any] = {}

    def kept(wrapper: DummyLossWrapper, optimizer: Any, model: Any, **given: Any) -> list[Any]:
        seen.update(given, optimizer=optimizer, model=model)
        return []

    module = Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    monkeypatch.setattr(integration, "preflight", kept)
    made = fit(
        module,
        TURNS,
        DummyLossCallback(),
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
    )
    assert seen.pop("optimizer") == made.optimizers
    assert seen.pop("model") is module
    assert seen == {"scaler": scaler, "max_norm": 0.5, "accumulation_steps": 2}
    fit(
        module,
        TURNS,
        DummyLossCallback(),
        gradient_clip_val=0.5,
        gradient_clip_algorithm="value",
    )
    assert seen["max_norm"] is None
    assert seen["scaler"] is None


def test_one_callback_serves_one_training_after_the_other() -> None:
    module, callback = Module(), DummyLossCallback(hold=True)
    for turns in (TURNS, [["dMRI"]]):
        logger = Kept()
        fit(module, turns, callback, logger=logger)
        assert len(logger.ours()) == len(turns)
    assert set(owners(logger.ours()[0])) == {"dMRI", "inactive"}
    assert module.wrapper._observers == []


def test_it_lets_go_where_training_fails() -> None:
    class Failing(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ArithmeticError

    module = Failing()
    with pytest.raises(ArithmeticError):
        fit(module, TURNS, DummyLossCallback(hold=True))
    assert module.wrapper._observers == []


def test_a_batch_that_is_left_out_is_not_measured() -> None:
    """Where `training_step` returns None, even at the first step."""

    class Choosy(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    logger = Kept()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(Choosy(), TURNS, DummyLossCallback(hold=True), logger=logger)
    assert list(logger.ours()) == [1, 3]


def test_a_step_of_another_loss_is_not_measured() -> None:
    """The report and the labels of the last step would be wrong there."""

    class Twofold(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            self.wrapped = batch_idx % 2 == 0
            return super().training_step(batch, batch_idx)

    logger = Kept()
    fit(Twofold(), TURNS, DummyLossCallback(), logger=logger)
    assert list(logger.ours()) == [0, 2]
