"""Gradient norms of the steps that Hugging Face's Trainer logs."""

from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._monitor.norms import gradient_norms


class GradientNormCallback(TrainerCallback):
    """Measures ``gradient_norms`` at each step that the Trainer logs.

    ``DummyLossMixin.log`` adds them to what is logged. The labels are those of all batches that
    were accumulated for a step. Under the mixin the norms are those before clipping, like the
    Trainer's own ``grad_norm``; in another Trainer, whose ``log`` has to add ``metrics`` itself,
    after it.

    Args:
        wrapper: What the loss goes through; by default that of the ``DummyLossMixin``.
        label: As for ``gradient_norms``.
        prefix: As for ``gradient_norms``.

    Attributes:
        metrics: What was measured last.

    Raises:
        TypeError: ``wrapper`` is of another kind.
        RuntimeError: From a step: there is no wrapper, or no loss has gone through it.

    Note:
        With ``logging_strategy="epoch"`` each step is measured: no callback knows which is the
        last. A step that another callback has the Trainer log in between has no norms.
    """

    def __init__(
        self, wrapper: DummyLossWrapper | None = None, *, label: bool = True, prefix: str = "grad"
    ) -> None:
        if wrapper is not None:
            check_wrapper(wrapper)
        self.metrics: dict[str, float] = {}
        self._wrapper, self._label, self._prefix = wrapper, label, prefix
        # Of all batches since the optimizer stepped. Noted after backward, so that nothing of it is
        # in code that may be compiled.
        self._reports: list[StepReport] = []
        self._measured = -2  # how many steps were made before the one that `metrics` are of

    def is_for(self, wrapper: DummyLossWrapper) -> bool:
        """Whether it was not given another wrapper.

        Args:
            wrapper: That of a ``DummyLossMixin``.

        Returns:
            False for one that measures what another wrapper did.
        """
        return self._wrapper is None or self._wrapper is wrapper

    def measure(
        self,
        wrapper: DummyLossWrapper,
        reports: list[StepReport],
        args: TrainingArguments,
        state: TrainerState,
        scaler: Any = None,
    ) -> None:
        """Measure if the step that is about to be made will be logged.

        Args:
            wrapper: What the losses went through.
            reports: Of each loss that the gradients are of.
            args: Those of the Trainer.
            state: That of the Trainer.
            scaler: The ``GradScaler`` if it has not unscaled the gradients yet.
        """
        if _is_logged(args, state):
            self.metrics = gradient_norms(
                wrapper,
                label=self._label,
                prefix=self._prefix,
                active=reports or None,
                scaler=scaler,
            )
            self._measured = state.global_step

    def metrics_of(self, state: TrainerState) -> dict[str, float]:
        """``metrics`` if they are of the step that was just made, else nothing.

        Args:
            state: That of the Trainer.

        Returns:
            What to add to the row of that step.
        """
        return self.metrics if self._measured == state.global_step - 1 else {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget an earlier training."""
        self._measured = -2
        self.metrics, self._reports = {}, []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Note what a batch held before which others are accumulated."""
        if self._wrapper is not None and self._wrapper.last is not None:
            self._reports.append(self._wrapper.last)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Measure what no mixin has measured before clipping.

        Raises:
            RuntimeError: There is no wrapper, or no loss has gone through it.
        """
        self.on_substep_end()
        if self._measured == state.global_step or not _is_logged(args, state):
            return
        if self._wrapper is None:
            raise RuntimeError(
                "`GradientNormCallback` has no wrapper; pass it one, "
                "`GradientNormCallback(wrapper)`, or train with a `DummyLossMixin`."
            )
        # The Trainer has unscaled the gradients.
        self.measure(self._wrapper, self._reports, args, state)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Forget what the step held, whose gradients are cleared now."""
        self._reports = []


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer will log the step that is being made, or may."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return bool(step % state.logging_steps == 0)
    return bool(args.logging_strategy == IntervalStrategy.EPOCH)
