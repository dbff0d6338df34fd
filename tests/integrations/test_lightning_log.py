"""What `DummyLossCallback` gives to Lightning's loggers, and the findings that it logs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import modaldummy.integrations.lightning as integration
from modaldummy import DummyLossWrapper, diagnose, gradient_norms
from modaldummy._hold import is_held
from modaldummy.integrations.lightning import DummyLossCallback
from tests.holding import NAMES
from tests.integrations.lightning_modules import (
    QUIET,
    TURNS,
    Batch,
    Gradients,
    Kept,
    Module,
    fit,
    trainer,
)
from tests.integrations.test_lightning import fp16
from tests.zero_engine import Zero12, ZeroEngine

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

DUMMY = 1e-7 * 16**0.5  # the norm of a tower's dummy gradient


def owners(row: Mapping[str, float]) -> dict[str, set[str]]:
    """Label to the towers that stand under it."""
    found: dict[str, set[str]] = {}
    for key in row:
        if key.startswith("grad/["):
            label, _, name = key.removeprefix("grad/[").partition("]/")
            found.setdefault(label, set()).add(name.split(".")[2])
    return found


def norm(found: Gradients, name: str) -> float:
    own = [g for n, g in found.items() if f"towers.{name}." in n and g is not None]
    return float(torch.cat([g.flatten() for g in own]).norm())


def test_each_row_has_the_labels_of_its_own_step() -> None:
    """It stands under the same step number as Lightning's own row."""
    logger = Kept()
    fit(Module(), TURNS, DummyLossCallback(), logger=logger)
    assert list(logger.ours()) == list(logger.lightnings()) == [0, 1, 2, 3]
    for row, active in zip(logger.ours().values(), TURNS, strict=True):
        expected = {name: {name} for name in active} | {"inactive": set(NAMES) - set(active)}
        assert owners(row) == expected
        assert {name for name in NAMES if row[f"modaldummy/active/{name}"]} == set(active)


def test_only_steps_that_the_trainer_logs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, float]:
        measured.append(args)
        return gradient_norms(*args, **kwargs)

    monkeypatch.setattr(integration, "gradient_norms", counted)
    logger, callback = Kept(), DummyLossCallback(label=False, prefix="norms")
    fit(Module(), TURNS, callback, logger=logger, log_every_n_steps=2)
    assert list(logger.ours()) == list(logger.lightnings()) == [1, 3]
    assert logger.ours()[1].keys() == logger.ours()[3].keys() == callback.metrics.keys()
    assert "norms/dMRI/model.towers.dMRI.weight" in callback.metrics
    assert len(measured) == 2
    fit(Module(), TURNS, DummyLossCallback())  # without a logger
    assert len(measured) == 2


def test_norms_are_those_before_clipping() -> None:
    logger, module = Kept(), Module()
    fit(module, TURNS, DummyLossCallback(), logger=logger, gradient_clip_val=1e-3)
    for step, row in logger.ours().items():
        for name in NAMES:
            assert row[f"grad_norm/{name}"] == pytest.approx(
                norm(module.gradients_by_batch[step], name)
            )
        clipped = torch.cat([g.flatten() for g in module.stepped[step].values() if g is not None])
        assert clipped.norm() <= 1.001e-3
    assert logger.ours()[0]["grad_norm/dMRI"] == pytest.approx(DUMMY)


@pytest.mark.parametrize("fused", [False, True])
def test_norms_are_those_of_unscaled_gradients(fused: bool) -> None:
    """Also if the optimizer, and not Lightning, divides by the scaler's factor."""

    class Fused(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=fused)

    logger = Kept()
    fit(Fused(), TURNS, DummyLossCallback(), logger=logger, plugins=fp16())
    assert [row["grad_norm/dMRI"] for row in logger.ours().values()] == [pytest.approx(DUMMY)] * 4


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
    """It has the labels of both losses, and for each gradient the norm measured last."""
    logger = Kept()
    # The second loss gives T1 no gradient, so that its norms are those of the first one.
    fit(Manual(scale=None), TURNS[:2], DummyLossCallback(), logger=logger)
    assert owners(logger.ours()[0]) == {"T1": {"T1"}, "rsfMRI": {"rsfMRI"}}
    logger = Kept()
    fit(Manual(), TURNS[:2], DummyLossCallback(), logger=logger)
    assert [step for step, row in logger.rows if "modaldummy/real" in row] == [0, 1]
    row = logger.ours()[0]
    assert owners(row)["T1"] == {"T1"}
    assert owners(row)["rsfMRI"] == {"rsfMRI"}
    assert row["grad_norm/T1"] == pytest.approx(DUMMY)  # inactive in the second loss


def test_a_callback_can_serve_several_trainings() -> None:
    module, callback = Module(), DummyLossCallback(hold=True)
    for turns in (TURNS, [["dMRI"]]):
        logger = Kept()
        fit(module, turns, callback, logger=logger)
        assert len(logger.ours()) == len(turns)
    assert set(owners(logger.ours()[0])) == {"dMRI", "inactive"}


def test_a_batch_for_which_training_step_returns_none_is_not_measured() -> None:
    class Choosy(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    logger = Kept()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(Choosy(), TURNS, DummyLossCallback(hold=True), logger=logger)
    assert list(logger.ours()) == [1, 3]


def test_a_step_without_the_wrapper_is_not_measured() -> None:
    """The report and the labels of an earlier step would be wrong there."""

    class Twofold(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            self.wrapped = batch_idx % 2 == 0
            return super().training_step(batch, batch_idx)

    logger = Kept()
    fit(Twofold(), TURNS, DummyLossCallback(), logger=logger)
    assert list(logger.ours()) == [0, 2]


def test_diagnose_reads_the_file_of_lightnings_csv_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Module(), TURNS * 16, DummyLossCallback(hold=True), logger=logger)
    found = [finding.code for finding in diagnose(tmp_path / "metrics.csv")]
    assert found == ["MD225"]  # no batch contains dMRI


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_process_logs_findings(
    is_first: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes have them in `findings`."""
    monkeypatch.setattr(Trainer, "is_global_zero", is_first)
    callback = DummyLossCallback()
    with caplog.at_level(logging.INFO, "modaldummy.integrations.lightning"):
        fit(Module(), TURNS, callback)
    assert [finding.code for finding in callback.findings] == ["MD141"]
    records = [r for r in caplog.records if r.name == "modaldummy.integrations.lightning"]
    assert [(r.levelname, r.getMessage()[:13]) for r in records] == (
        [("WARNING", "MD141 warning")] if is_first else []
    )


def test_the_engine_of_deepspeed_is_held(process_group: None) -> None:
    """Its optimizer is none of torch. Lightning has no DeepSpeed on CPUs, so this stands in."""
    module = Module()
    groups = [
        list(part.parameters()) for part in (*module.model.towers.values(), module.model.trunk)
    ]
    engine = ZeroEngine(module, 1, Zero12(groups, torch.optim.AdamW, None))
    stand_in = trainer()
    stand_in.strategy.model = engine
    stand_in.strategy._optimizers = [engine.optimizer]
    callback = DummyLossCallback(hold=True)
    callback.on_train_start(stand_in, module)
    assert is_held(module.wrapper, engine)
    assert callback.findings == []
    callback.on_train_end()
    assert not is_held(module.wrapper, engine)


class Forgetful(Module):
    """Its map forgets a tower."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        spec = {name: f"model.towers.{name}" for name in ("T1", "rsfMRI")}
        self.wrapper = DummyLossWrapper(self, spec)
        self.automatic_optimization = automatic

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        total = super().training_step(batch, batch_idx)
        if total is not None and not self.automatic_optimization:
            self.manual_backward(total)
        return total


def test_a_tower_that_the_map_forgot_is_named_after_the_first_loss() -> None:
    """Not with manual optimization, whose losses may be of a part of the model."""
    callback = DummyLossCallback()
    fit(Forgetful(), TURNS, callback)
    (finding,) = [finding for finding in callback.findings if finding.code == "MD111"]
    assert finding.evidence["parameters"] == ["model.towers.dMRI.weight", "model.towers.dMRI.bias"]
    callback = DummyLossCallback()
    fit(Forgetful(automatic=False), TURNS, callback)
    assert "MD111" not in [finding.code for finding in callback.findings]


def test_preflight_gets_the_settings_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaler only if Lightning has one, and a maximum norm only if it clips by norm."""
    seen: dict[str, Any] = {}

    def kept(wrapper: DummyLossWrapper, optimizer: Any, model: Any, **given: Any) -> list[Any]:
        seen.update(given, optimizer=optimizer, model=model)
        return []

    monkeypatch.setattr(integration, "preflight", kept)
    module, plugin = Module(), fp16()
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    made = fit(module, TURNS, DummyLossCallback(), plugins=plugin, **options)
    assert seen.pop("optimizer") == made.optimizers
    assert seen.pop("model") is module
    assert seen == {"scaler": plugin.scaler, "max_norm": 0.5, "accumulation_steps": 2}
    fit(module, TURNS, DummyLossCallback(), gradient_clip_algorithm="value", **options)
    assert seen["max_norm"] is None
    assert seen["scaler"] is None
