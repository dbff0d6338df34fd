"""Gradient norms and reports of the steps that Hugging Face's Trainer logs."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from modaldummy._arguments import check_wrapper
from modaldummy._kinds import reached
from modaldummy._monitor import gradient_norms
from modaldummy._report import StepReport
from modaldummy._wrapper import DummyLossWrapper


class GradientNormCallback(TrainerCallback):
    """Measures `gradient_norms` at each step that the Trainer logs.

    `DummyLossMixin.log` adds them to what is logged. The labels are those of all batches that were
    accumulated for a step. Under the mixin the norms are those before clipping, like the Trainer's
    own `grad_norm`; in another Trainer, whose `log` has to add `metrics` itself, after it.

    Args:
        wrapper: What the loss goes through; by default that of the `DummyLossMixin`.
        label: As for `gradient_norms`.
        prefix: As for `gradient_norms`.

    Attributes:
        metrics: What was measured last.

    Note:
        With `logging_strategy="epoch"` each step is measured: no callback knows which is the last.
        A step that another callback has the Trainer log in between has no norms.
    """

    def __init__(
        self, wrapper: DummyLossWrapper | None = None, *, label: bool = True, prefix: str = "grad"
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._label, self._prefix = label, prefix
        self._wrapper: DummyLossWrapper | None = None
        self._active: set[str] = set()
        self._measured = -2  # how many steps were made before the one that `metrics` are of
        if wrapper is not None:
            check_wrapper(wrapper)
            self.watch(wrapper)

    def watch(self, wrapper: DummyLossWrapper) -> None:
        """Measure the gradients of this wrapper from now on."""
        if wrapper is self._wrapper:
            return
        if self._wrapper is not None:
            self._wrapper._observers.remove(self._observe)
        self._wrapper = wrapper
        wrapper._observers.append(self._observe)

    def measure(self, args: TrainingArguments, state: TrainerState, scaler: Any = None) -> None:
        """Measure if the step that is about to be made will be logged and was not measured yet.

        Args:
            args: Those of the Trainer.
            state: That of the Trainer.
            scaler: The `GradScaler` if it has not unscaled the gradients yet.

        Raises:
            RuntimeError: There is no wrapper, or no loss has gone through it.
        """
        if self._measured == state.global_step or not _is_logged(args, state):
            return
        if self._wrapper is None:
            raise RuntimeError(
                "`GradientNormCallback` has no wrapper; pass it one, "
                "`GradientNormCallback(wrapper)`, or train with a `DummyLossMixin`."
            )
        active = sorted(self._active) if self._wrapper.last else None
        self.metrics = gradient_norms(
            self._wrapper, label=self._label, prefix=self._prefix, active=active, scaler=scaler
        )
        self._measured = state.global_step

    def metrics_of(self, state: TrainerState) -> dict[str, float]:
        """`metrics` if they are of the step that was just made, else nothing."""
        return self.metrics if self._measured == state.global_step - 1 else {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget an earlier training."""
        self._measured = -2
        self.metrics = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Forget what the last step held."""
        self._active.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Measure what no mixin has measured before clipping."""
        self.measure(args, state)  # the Trainer has unscaled the gradients

    def _observe(self, _: Any, __: Any) -> None:
        if self._wrapper is not None and self._wrapper.last is not None:
            self._active.update(self._wrapper.last.active)


def summed(
    wrapper: DummyLossWrapper, reports: Sequence[tuple[StepReport, float]]
) -> dict[str, float]:
    """`StepReport.as_dict` of all batches that were accumulated for a step.

    Losses and dummies are added up, so that they are those of the loss that is logged; active is
    what any batch held, and what is counted are the parameters that were inactive in all.

    Args:
        wrapper: Whose reports they are.
        reports: One for each batch, with its share of the loss of the step.
    """
    (last, _), rows = reports[-1], [(report.as_dict(), share) for report, share in reports]
    found = last.as_dict()
    for name in ("real", "dummy", "uncapped"):
        key = f"modaldummy/{name}"
        found[key] = sum(row[key] * share for row, share in rows)
    active = {name for report, _ in reports for name in report.active}
    idle = wrapper._map.inactive_parameters(active)
    found["modaldummy/fraction"] = max(
        (row["modaldummy/fraction"] for row, _ in rows), key=lambda f: (math.isnan(f), f)
    )
    found["modaldummy/num_params"] = float(len(idle))
    found["modaldummy/num_elements"] = float(sum(reached(one).numel() for one in idle))
    return found | {f"modaldummy/active/{name}": 1.0 for name in active}


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer will log the step that is being made, or may."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return bool(step % state.logging_steps == 0)
    return bool(args.logging_strategy == IntervalStrategy.EPOCH)
