"""Gradient norms of the steps that Hugging Face's Trainer logs."""

from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from modaldummy._arguments import check_wrapper
from modaldummy._monitor import gradient_norms
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
    """

    def __init__(
        self, wrapper: DummyLossWrapper | None = None, *, label: bool = True, prefix: str = "grad"
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._label, self._prefix = label, prefix
        self._wrapper: DummyLossWrapper | None = None
        self._active: set[str] = set()
        self._measured = -1  # the step that `metrics` are of
        if wrapper is not None:
            check_wrapper(wrapper)
            self.watch(wrapper)

    def watch(self, wrapper: DummyLossWrapper) -> None:
        """Measure the gradients of this wrapper from now on."""
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

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget an earlier training."""
        self._measured = -1
        self.metrics = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Forget what the last step held."""
        self._active.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Measure what no mixin has measured before clipping."""
        clipped = args.max_grad_norm > 0  # before that the Trainer unscales the gradients
        scaler = None if clipped else getattr(kwargs.get("optimizer"), "scaler", None)
        self.measure(args, state, scaler)

    def _observe(self, _: Any, __: Any) -> None:
        if self._wrapper is not None and self._wrapper.last is not None:
            self._active.update(self._wrapper.last.active)


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer will log the step that is being made, or may."""
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return bool(args.logging_strategy == IntervalStrategy.EPOCH)
