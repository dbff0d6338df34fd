"""For Lightning: findings before training, gradient norms for the loggers, and the hold."""

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._arguments import called_model, check_wrapper, wrappers_in
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._engines import (
    check_ddps,
    ddps_around,
    is_zero_engine,
    lightning_logged_step,
    lightning_logs_this_step,
    unscales_in_step,
)
from modaldummy._errors import packages_needed
from modaldummy._findings import Finding, by_severity, log_findings
from modaldummy._hold import hold_inactive
from modaldummy._monitor import gradient_norms
from modaldummy._optimizers import parameter_ids_of, parameters_of
from modaldummy._preflight import findings_of_total, preflight
from modaldummy.integrations.accumulated_report import WeightedReport, accumulated_report

with packages_needed("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["DummyLossCallback"]

_logger = logging.getLogger(__name__)


class DummyLossCallback(Callback):
    """Logs what a ``DummyLossWrapper`` does in Lightning's Trainer; can hold the optimizers.

    Pass it with the other callbacks::

        trainer = Trainer(callbacks=[DummyLossCallback(hold=True)], ...)

    The dummy term needs no callback: ``training_step`` returns ``self.wrapper.total(loss, batch)``.
    When training starts, the main process logs the findings of ``preflight`` with ``logging``, and
    with automatic optimization also those about the first loss. At
    each step that the Trainer logs, its loggers get the wrapper's report and ``gradient_norms``.
    The norms are those of unscaled gradients before clipping. If a step accumulates several
    batches, labels, flags and counts cover all of them; losses and dummy terms are means.

    Args:
        wrapper: The wrapper that the loss goes through. By default the callback looks for it among
            the attributes of the LightningModule and of the modules in it. A loss function that
            the wrapper has wrapped counts as well.
        hold: Whether ``hold_inactive`` holds the optimizers during training, or the engine of
            DeepSpeed's ZeRO.
        label: As for ``gradient_norms``.
        prefix: As for ``gradient_norms``.

    Attributes:
        findings: The findings of ``preflight``.
        metrics: The report and the norms that were measured last.

    Raises:
        TypeError: ``wrapper`` is not a ``DummyLossWrapper``.
        ValueError: When training starts: the module has no wrapper, or several; the wrapper belongs
            to another model; or, with ``hold``, no optimizer has a parameter of the map.
        UnsupportedEngineError: When training starts: DDP has a static graph and the scale is None;
            or, with ``hold``, an optimizer cannot be held.
        RuntimeError: After the first step: the loss did not go through the wrapper.
    """

    def __init__(
        self,
        wrapper: DummyLossWrapper | None = None,
        *,
        hold: bool = False,
        label: bool = True,
        prefix: str = "grad",
    ) -> None:
        if wrapper is not None:
            check_wrapper(wrapper)
        self.findings: list[Finding] = []
        self.metrics: dict[str, float] = {}
        self._given, self._hold = wrapper, hold
        self._options: dict[str, Any] = {"label": label, "prefix": prefix}
        self._holds = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the wrapper, hold the optimizers, and log the findings of ``preflight``."""
        wrapper = self._given or _wrapper_in(pl_module)
        called_model(wrapper, pl_module)
        model = trainer.strategy.model or pl_module
        owned = wrapper.parameters.all().keys()
        # Lightning calls `training_step` inside of DDP's forward.
        check_ddps(ddps_around(model.modules(), owned), wrapper.scale, dummy_inside=True)
        optimizers = [o for o in trainer.optimizers if not owned.isdisjoint(parameter_ids_of(o))]
        self._wrapper, self._model = wrapper, model
        self._is_first_total = pl_module.automatic_optimization
        # Of all losses since the last step of each optimizer that has a parameter of the map, by
        # its `id`. They are collected after backward, where no code is compiled.
        self._reports: dict[int, list[StepReport]] = {id(o): [] for o in optimizers}
        self._last = wrapper.last  # the newest report, collected or from before
        self._wrapper_used = False  # whether this training has collected a report
        self._wrapper_bypassed = False  # whether an optimizer stepped without any report
        self._measured: dict[str, float] = {}  # in this batch, for the loggers
        if self._hold:
            # If no optimizer has a parameter of the map, `hold_inactive` raises and says so.
            targets = optimizers or trainer.optimizers[:1]
            for target in [model] if is_zero_engine(model) else targets:
                self._holds.enter_context(hold_inactive(wrapper, target))
        self.findings = _findings(trainer, wrapper, model)
        if trainer.is_global_zero:
            log_findings(self.findings, _logger)

    def on_before_backward(self, trainer: Trainer, _: LightningModule, loss: Tensor) -> None:
        """Log the findings about the first loss."""
        if self._is_first_total:
            self._is_first_total = False
            found = findings_of_total(self._wrapper, self._model, loss)
            self.findings = by_severity([*self.findings, *found])
            if trainer.is_global_zero:
                log_findings(found, _logger)

    def on_after_backward(self, *_: Any) -> None:
        """Collect the report of the loss."""
        last = self._wrapper.last
        if last is not None and last is not self._last:
            self._last, self._wrapper_used = last, True
            for reports in self._reports.values():
                reports.append(last)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients if the Trainer logs this step."""
        reports = self._reports.get(id(optimizer))
        if reports is None:
            return
        if not reports:  # such as after a `training_step` that returned None
            self._wrapper_bypassed |= any(p.grad is not None for p in parameters_of(optimizer))
            return
        self._reports[id(optimizer)] = []
        if not lightning_logs_this_step(trainer):
            return
        batches = [WeightedReport(report, 1 / len(reports)) for report in reports]
        # Other optimizers have unscaled gradients by now.
        scaler = _scaler_of(trainer) if unscales_in_step(optimizer) else None
        norms = gradient_norms(self._wrapper, active=reports, scaler=scaler, **self._options)
        # Several optimizers may step in one batch, each with its own gradients. Later metrics then
        # replace earlier ones of the same name.
        self._measured |= accumulated_report(self._wrapper, batches) | norms
        self.metrics = self._measured

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Give the metrics of this batch to the loggers.

        Raises:
            RuntimeError: An optimizer has stepped, and no loss has gone through the wrapper yet.
        """
        if self._wrapper_bypassed and not self._wrapper_used:
            raise RuntimeError(
                f"The loss of `{type(pl_module).__name__}` did not go through the wrapper. Return "
                "`self.wrapper.total(loss, batch)` from `training_step`."
            )
        if self._measured:
            self._measured = {}
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics, step=lightning_logged_step(trainer))

    def on_train_end(self, *_: Any) -> None:
        """Release the optimizers."""
        self._holds.close()

    def on_exception(self, *_: Any) -> None:
        """Release the optimizers."""
        self._holds.close()


def _wrapper_in(module: LightningModule) -> DummyLossWrapper:
    """The only wrapper that a module, or a module in it, has as an attribute.

    A loss function that a wrapper has wrapped counts as that wrapper.

    Raises:
        ValueError: There is none, or there are several.
    """
    wrappers = wrappers_in(module)
    if len(wrappers) != 1:
        raise ValueError(
            f"`{type(module).__name__}` must have one DummyLossWrapper among its attributes, got "
            f"{len(wrappers) or 'none'}. Pass the wrapper, `DummyLossCallback(wrapper)`."
        )
    return wrappers[0]


def _findings(trainer: Trainer, wrapper: DummyLossWrapper, model: nn.Module) -> list[Finding]:
    """The findings of `preflight` for a Trainer that has set everything up."""
    scaler = _scaler_of(trainer)
    clips_norm = trainer.gradient_clip_algorithm in (None, "norm")
    optimizers = [each for each in trainer.optimizers if isinstance(each, Optimizer)]
    findings = preflight(
        wrapper,
        optimizers or None,  # that of DeepSpeed is none of torch
        model,
        scaler=scaler if isinstance(scaler, torch.amp.GradScaler) else None,
        max_norm=(trainer.gradient_clip_val or None) if clips_norm else None,
        accumulation_steps=trainer.accumulate_grad_batches,
    )
    # MD101 is about dummy terms outside of DDP's forward. Lightning calls `training_step` inside.
    return [finding for finding in findings if finding.code != "MD101"]


def _scaler_of(trainer: Trainer) -> Any:
    """What scales the loss, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)
