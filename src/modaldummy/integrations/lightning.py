"""For Lightning: findings before training, gradient norms for the loggers, a hold."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._arguments import called_model, check_wrapper
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._engines import check_ddp_reduces, ddps_around
from modaldummy._findings import Finding, log_findings
from modaldummy._hold.hold import HoldHandle, hold_inactive
from modaldummy._monitor.norms import gradient_norms
from modaldummy._preflight.preflight import preflight
from modaldummy.integrations._batches import summed

__all__ = ["DummyLossCallback"]

_logger = logging.getLogger(__name__)


class DummyLossCallback(Callback):
    """Watches a ``DummyLossWrapper`` in Lightning's Trainer, and can hold its optimizers.

    It is one of the callbacks::

        trainer = Trainer(callbacks=[DummyLossCallback(hold=True)], ...)

    The dummy term needs no callback: ``training_step`` returns ``self.wrapper.total(loss, batch)``.
    Where training starts, the main process logs what ``preflight`` finds, by ``logging``. At each
    step that the Trainer logs, its loggers get the wrapper's report and ``gradient_norms``, of
    gradients that are unscaled and not yet clipped. Labels are those of all accumulated batches; of
    the report, losses and dummies are means over them, and what is active or counted is that of
    all.

    Args:
        wrapper: What the loss goes through; by default the one that the LightningModule, or a
            module in it, has as an attribute, or that has wrapped such a loss function.
        hold: Whether the optimizers are held by ``hold_inactive`` while training lasts.
        label: As for ``gradient_norms``.
        prefix: As for ``gradient_norms``.

    Attributes:
        findings: What ``preflight`` found.
        metrics: What was measured last.

    Raises:
        TypeError: ``wrapper`` is of another kind.
        ValueError: Where training starts: the module has no wrapper, or several; or the wrapper is
            that of another model; or ``hold``, and no optimizer has a parameter of the map.
        UnsupportedEngineError: Where training starts: the graph of DDP is static and the scale
            None; or ``hold``, and an optimizer cannot be held.
        RuntimeError: After the first step: the loss did not go through the wrapper.

    Note:
        Where several optimizers step at different batches, norms of parameters of one that does not
        step are those so far, still scaled, under the labels of one that does.

        Metrics go to the loggers themselves: ``self.log`` repeats what was logged under a label, at
        each step, until the epoch ends. So ``trainer.logged_metrics`` does not have them.
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
        self._given, self._hold, self._label, self._prefix = wrapper, hold, label, prefix
        self._wrapper: DummyLossWrapper | None = None
        self._handles: list[HoldHandle] = []
        # Of all losses since an optimizer stepped, by the `id` of each that has a parameter of the
        # map. Noted after backward, so that nothing of it is in code that may be compiled.
        self._reports: dict[int, list[StepReport]] = {}
        self._last: StepReport | None = None  # that was noted, or was there before
        self._noted = False  # any, in this training
        self._missed = False  # an optimizer stepped on gradients of other losses alone
        self._measured = False  # in this batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the wrapper, hold the optimizers, and log what ``preflight`` finds."""
        wrapper = self._given or _wrapper_in(pl_module)
        called_model(wrapper, pl_module)
        model = trainer.strategy.model or pl_module
        owned = wrapper.parameters.all().keys()
        ddps = ddps_around(model.modules(), owned)
        for ddp in ddps:
            check_ddp_reduces(ddp, wrapper.scale)
        self._wrapper, self._last = wrapper, wrapper.last
        self._noted = self._missed = self._measured = False
        own = [o for o in trainer.optimizers if not owned.isdisjoint(map(id, _parameters(o)))]
        self._reports = {id(optimizer): [] for optimizer in own}
        for optimizer in (own or trainer.optimizers[:1]) if self._hold else ():
            self._handles.append(hold_inactive(wrapper, optimizer))
        self.findings = _findings(trainer, wrapper, model)
        if trainer.is_global_zero:
            log_findings(self.findings, _logger)

    def on_after_backward(self, *_: Any) -> None:
        """Note what the loss held."""
        last = None if self._wrapper is None else self._wrapper.last
        if last is not None and last is not self._last:
            self._last, self._noted = last, True
            for reports in self._reports.values():
                reports.append(last)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure gradients if the Trainer logs this step."""
        wrapper, reports = self._wrapper, self._reports.get(id(optimizer))
        if wrapper is None or reports is None:
            return
        if not reports:  # such as after a `training_step` that returned None
            self._missed |= any(p.grad is not None for p in _parameters(optimizer))
            return
        self._reports[id(optimizer)] = []
        if not (trainer.loggers and trainer._logger_connector.should_update_logs):
            return
        if not self._measured:
            self.metrics = {}
        self._measured = True
        # Several optimizers may step in a batch, each with gradients of its own: the last that is
        # known of each parameter is logged.
        self.metrics |= summed(wrapper, [(report, 1 / len(reports)) for report in reports])
        self.metrics |= gradient_norms(
            wrapper,
            label=self._label,
            prefix=self._prefix,
            active=reports,
            scaler=_scale_of(trainer, optimizer),
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Hand what was measured to the loggers.

        Raises:
            RuntimeError: An optimizer has stepped, and no loss has gone through the wrapper yet.
        """
        if self._missed and not self._noted:
            raise RuntimeError(
                f"The loss of `{type(pl_module).__name__}` did not go through the wrapper; have "
                "`training_step` return `self.wrapper.total(loss, batch)`."
            )
        if self._measured:
            self._measured = False
            # The number under which Lightning logs what `self.log` was given in this batch.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics, step=step)

    def on_train_end(self, *_: Any) -> None:
        """Let wrapper and optimizers go."""
        self._stop()

    def on_exception(self, *_: Any) -> None:
        """Let wrapper and optimizers go."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._wrapper = None


def _wrapper_in(module: LightningModule) -> DummyLossWrapper:
    """The one wrapper that a module, or one in it, has as an attribute or around a loss function.

    Raises:
        ValueError: There is none, or there are several.
    """
    values = [value for part in module.modules() for value in vars(part).values()]
    values += [getattr(value, "modaldummy_wrapper", None) for value in values]
    found = {id(value): value for value in values if isinstance(value, DummyLossWrapper)}
    if len(found) != 1:
        raise ValueError(
            f"`{type(module).__name__}` has {len(found) or 'no'} DummyLossWrapper"
            f"{'s' if found else ''} among its attributes; pass the one that is meant, "
            "`DummyLossCallback(wrapper)`."
        )
    return next(iter(found.values()))


def _findings(trainer: Trainer, wrapper: DummyLossWrapper, model: nn.Module) -> list[Finding]:
    """What `preflight` finds in a Trainer that has set everything up."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    by_norm = trainer.gradient_clip_algorithm in (None, "norm")
    found = preflight(
        wrapper,
        trainer.optimizers or None,
        model,
        scaler=scaler if isinstance(scaler, torch.amp.GradScaler) else None,
        max_norm=(trainer.gradient_clip_val or None) if by_norm else None,
        accumulation_steps=trainer.accumulate_grad_batches,
    )
    # DDP sees the dummy: Lightning has it call `training_step` in its own forward.
    return [finding for finding in found if finding.code != "MD101"]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _scale_of(trainer: Trainer, optimizer: Optimizer) -> float | None:
    """By what gradients are still multiplied: fused optimizers unscale them in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    return float(scaler.get_scale())
