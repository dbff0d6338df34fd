"""Gradient norms of the steps that Hugging Face's Trainer logs."""

from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._monitor import gradient_norms


class GradientNormCallback(TrainerCallback):
    """Measures ``gradient_norms`` at each step that the Trainer logs.

    ``DummyLossMixin`` adds the norms to what the Trainer logs. The labels cover all batches that
    are accumulated for the step. The norms are those before clipping, like the Trainer's own
    ``grad_norm``. In a Trainer without the mixin they are those after clipping, and its ``log``
    has to add ``metrics_of(self.state)``.

    Args:
        wrapper: The wrapper that the loss goes through; by default that of the ``DummyLossMixin``.
        label: As for ``gradient_norms``.
        prefix: As for ``gradient_norms``.

    Attributes:
        metrics: The norms that were measured last.

    Raises:
        TypeError: ``wrapper`` is not a ``DummyLossWrapper``.
        RuntimeError: From a step: there is no wrapper, or no loss has gone through it.

    Note:
        With ``logging_strategy="epoch"`` the callback measures each step, because it cannot know
        which one is the last.
    """

    def __init__(
        self, wrapper: DummyLossWrapper | None = None, *, label: bool = True, prefix: str = "grad"
    ) -> None:
        if wrapper is not None:
            check_wrapper(wrapper)
        self.metrics: dict[str, float] = {}
        self._wrapper = wrapper
        self._options: dict[str, Any] = {"label": label, "prefix": prefix}
        # Of all batches since the last step of the optimizer. They are collected after backward,
        # where no code is compiled.
        self._reports: list[StepReport] = []
        self._measured_at: int | None = None  # `state.global_step` when `metrics` were measured

    def measure(
        self,
        wrapper: DummyLossWrapper,
        reports: list[StepReport],
        args: TrainingArguments,
        state: TrainerState,
        scaler: Any = None,
    ) -> None:
        """Measure the gradients, if the Trainer will log the step that it makes next.

        A callback that was given another wrapper measures nothing.

        Args:
            wrapper: The wrapper that the losses went through.
            reports: The reports of all losses that contribute to the gradients.
            args: The arguments of the Trainer.
            state: The state of the Trainer.
            scaler: The ``GradScaler``, if it has not unscaled the gradients yet.
        """
        is_own = self._wrapper is None or self._wrapper is wrapper
        if is_own and _is_logged(args, state):
            self.metrics = gradient_norms(
                wrapper, active=reports or None, scaler=scaler, **self._options
            )
            self._measured_at = state.global_step

    def metrics_of(self, state: TrainerState) -> dict[str, float]:
        """The norms of the step that the Trainer has just made.

        Args:
            state: The state of the Trainer.

        Returns:
            ``metrics``, or an empty dict if they belong to an earlier step.
        """
        return self.metrics if self._measured_at == state.global_step - 1 else {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the previous training."""
        self._measured_at = None
        self.metrics, self._reports = {}, []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Keep the report of a batch that is accumulated with later ones."""
        if self._wrapper is not None and self._wrapper.last is not None:
            self._reports.append(self._wrapper.last)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Measure, unless a mixin did so before clipping.

        Raises:
            RuntimeError: There is no wrapper, or no loss has gone through it.
        """
        self.on_substep_end()
        if self._measured_at == state.global_step or not _is_logged(args, state):
            return
        if self._wrapper is None:
            raise RuntimeError(
                "`GradientNormCallback` has no wrapper. Pass one, `GradientNormCallback(wrapper)`, "
                "or train with a `DummyLossMixin`."
            )
        # The Trainer has unscaled the gradients by now.
        self.measure(self._wrapper, self._reports, args, state)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Forget the reports, because the gradients are cleared now."""
        self._reports = []


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer will or may log the step that it makes next."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return bool(step % state.logging_steps == 0)
    return bool(args.logging_strategy == IntervalStrategy.EPOCH)
