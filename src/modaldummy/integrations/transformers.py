"""For Hugging Face's Trainer: the dummy term in `compute_loss`, gradient norms in `log`."""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from modaldummy._arguments import called_model
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.batch import EXPLICIT_KEYS
from modaldummy._core.loss_function import check_loss
from modaldummy._engines import check_ddp_reduces, ddp_marks_twice, ddps_around
from modaldummy._errors import BatchMetadataError, describe
from modaldummy._findings import log_findings
from modaldummy._hold.hold import hold_inactive
from modaldummy._preflight.preflight import preflight
from modaldummy._ranks.attach import attach_to_outputs, is_attached
from modaldummy._ranks.check import check_ranks
from modaldummy.integrations._batches import summed
from modaldummy.integrations._trainer_norms import GradientNormCallback

__all__ = ["DummyLossMixin", "GradientNormCallback"]

WrapperOrFactory: TypeAlias = DummyLossWrapper | Callable[[nn.Module], DummyLossWrapper]

if TYPE_CHECKING:
    _TrainerMethods = Trainer
else:
    _TrainerMethods = object
_logger = logging.getLogger(__name__)
_LOST = (
    "The Trainer's default collators drop strings: pass a `data_collator` that keeps the names of "
    "modalities, or write integer indexes into the map into a column 'modality'. With "
    "`remove_unused_columns=True` a column is dropped as well that is neither an argument of the "
    "model's `forward` nor in `metadata_columns`."
)
_TWICE = (
    "The loss has been through the wrapper besides what the mixin adds, so that the dummy would be "
    "added twice; use `super().compute_loss(...)` or `self.wrapper.total(...)`, not both."
)
_DISPATCHED = (
    "The first rank deals out batches of an iterable dataset by the keys of the first of them: a "
    "modality that this one lacks is lost on all ranks. Give all batches the same keys, or pass "
    "`accelerator_config={'dispatch_batches': False}` and give each rank samples of its own."
)


class DummyLossMixin(_TrainerMethods):
    """Sends the training loss of a Trainer through a ``DummyLossWrapper``.

    It comes before the Trainer::

        class MyTrainer(DummyLossMixin, Trainer): ...
        trainer = MyTrainer(model, args, wrapper=wrapper, callbacks=[GradientNormCallback()], ...)

    The modalities are read from the Trainer's inputs before forward, in any form of
    ``active_modalities``. What training logs carries the wrapper's report; losses of evaluation and
    prediction are the real ones. However many batches are accumulated, and whoever normalises the
    loss, an inactive parameter gets ``scale`` per element at a step. Where training starts,
    ``preflight`` is logged. The loss may be multiplied, smoothed or computed by
    ``compute_loss_func``, the model compiled, adapted by PEFT, checkpointed or under DDP, with
    ``ddp_find_unused_parameters`` or without.

    Args:
        *args: What the Trainer takes.
        wrapper: The wrapper, or, as ``model_init`` needs, a function that makes one from a model.
        hold: Whether the optimizer is held by ``hold_inactive``.
        metadata_columns: Which columns are kept for the wrapper, and kept from a model whose
            ``forward`` does not name them.
        **kwargs: What the Trainer takes.

    Attributes:
        wrapper: The wrapper that is in use.

    Raises:
        TypeError: The mixin comes after the Trainer; or ``wrapper`` neither is nor makes one.
        ValueError: The model of the wrapper is not that of the Trainer.
        BatchMetadataError: From a step: the inputs do not say which modalities they hold.
        UnsupportedEngineError: From a step: the engine cannot bear what the wrapper does.
        RankDisagreementError: From a step: ranks differ where FSDP or DeepSpeed cannot bear it.
        RuntimeError: From a step: the loss has not been through the wrapper, or has been twice.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(DummyLossMixin):
            raise TypeError(
                f"`{cls.__name__}` has the Trainer before the mixin, which then changes nothing; "
                f"write `class {cls.__name__}(DummyLossMixin, Trainer)`."
            )

    def __init__(
        self,
        *args: Any,
        wrapper: WrapperOrFactory,
        hold: bool = False,
        metadata_columns: str | Sequence[str] = EXPLICIT_KEYS,
        **kwargs: Any,
    ) -> None:
        one = isinstance(metadata_columns, str)
        self._metadata_columns = [metadata_columns] if one else list(metadata_columns)
        super().__init__(*args, **kwargs)
        model: Any = self.model
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        asked = inspect.signature(bare.forward).parameters
        self._withheld = {name for name in self._metadata_columns if name not in asked}
        self._make_wrapper = wrapper
        self._hold = hold
        self._started: tuple[Any, ...] = ()
        # What went through the wrapper since the gradients were cleared, in which training and
        # after how many steps, and its share of the loss.
        self._reports: list[tuple[StepReport, float]] = []
        self._training: tuple[Any, int] = (None, 0)
        self._added: StepReport | None = None  # by this class, in the step that is made
        self._use_wrapper()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As the Trainer's; gradient norms are measured after it."""
        self._start(model)
        self._added = None
        backwarded: list[StepReport] = []

        def observe(_: Any, loss: Tensor) -> None:
            report: Any = self.wrapper.last
            if loss.requires_grad:
                loss.register_hook(lambda _: backwarded.append(report))

        unsubscribe = self.wrapper.subscribe(observe)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            unsubscribe()
        if self._added in backwarded and len(backwarded) > 1:
            raise RuntimeError(_TWICE)
        if not backwarded:
            raise RuntimeError(
                f"The loss of `{type(self).__name__}` did not go through the wrapper; have its "
                "`compute_loss` return what `super().compute_loss(...)` returns, or what "
                "`self.wrapper.total(loss, inputs)` makes of a loss of its own."
            )
        training, step = self._training
        # Each training has a state of its own, which may be equal to that of the last.
        if training is not self.state or step != self.state.global_step:
            self._training, self._reports = (self.state, self.state.global_step), []
        share = self._divisor(not self._is_normalised(num_items_in_batch))
        self._reports += [(report, 1 / share) for report in backwarded]
        if self.accelerator.sync_gradients:
            reports = [report for report, _ in self._reports]
            for callback in self._callbacks():
                if callback.is_for(self.wrapper):
                    scaler = self.accelerator.scaler
                    callback.measure(self.wrapper, reports, self.args, self.state, scaler)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's, plus the dummy term where gradients are computed."""
        active = self._read(model, inputs) if torch.is_grad_enabled() else None
        result: Any = super().compute_loss(
            model,
            self._for_model(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if active is None:
            return result
        real, *outputs = result if return_outputs else (result,)
        check_loss(real, "The loss that `compute_loss` of the Trainer returns")
        # Batches that are not divided later have to share one dummy.
        weight = 1 / self._divisor(self._is_normalised(num_items_in_batch))
        total = self.wrapper.add(real, active, weight)
        self._added = self.wrapper.last
        return (total, *outputs) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's."""
        return super().prediction_step(model, self._for_model(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; what training logs gets the report and the gradient norms."""
        if "loss" in logs and self._reports:
            logs |= summed(self.wrapper, self._reports)
            for callback in self._callbacks():
                logs |= callback.metrics_of(self.state)
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += [name for name in self._metadata_columns if name not in columns]

    def _for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs without metadata that the model's `forward` does not name."""
        if not any(name in inputs for name in self._withheld):
            return inputs
        return {name: value for name, value in inputs.items() if name not in self._withheld}

    def _read(self, model: nn.Module, inputs: dict[str, Any]) -> set[str]:
        engine = self.accelerator.distributed_type
        try:
            if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                check_ranks(self.wrapper, inputs, model=model)
            return self.wrapper.reader.read(inputs)
        except BatchMetadataError as error:
            error.add_note(_LOST)
            raise

    def _is_normalised(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is a share of that of all accumulated batches: the Trainer's rule."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )

    def _divisor(self, divides: bool) -> int:
        # Outside of `train` the Trainer does not know any number.
        return getattr(self, "current_gradient_accumulation_steps", 1) if divides else 1

    def _callbacks(self) -> list[GradientNormCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, GradientNormCallback)]

    def _use_wrapper(self) -> None:
        """Have a wrapper of the model as it is now."""
        model: Any = self.model
        made = self._make_wrapper
        if callable(made) and not isinstance(made, DummyLossWrapper):
            made = made(model)
        if not isinstance(made, DummyLossWrapper):
            raise TypeError(
                "`wrapper` must be a DummyLossWrapper, or a function that makes one from the "
                f"model, got {describe(made)}."
            )
        called_model(made, model)
        self.wrapper = made
        self._made_for = model

    def _start(self, model: nn.Module) -> None:
        """Once for each model and optimizer that is trained: connect, hold, and log findings."""
        if self.model is not self._made_for:  # `train` has called `model_init`
            self._use_wrapper()
        if self._started == (model, self.optimizer):
            return
        self._connect(model)
        optimizer: Any = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if self._hold:
            hold_inactive(self.wrapper, optimizer)
        findings = preflight(
            self.wrapper,
            optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
            model,
            scaler=self.accelerator.scaler,
            max_norm=self.args.max_grad_norm or None,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )
        if self.is_world_process_zero():
            log_findings(findings, _logger)
        loader = self.callback_handler.train_dataloader
        if self.args.world_size > 1 and isinstance(loader, DataLoaderDispatcher):
            _logger.warning(_DISPATCHED)
        self._started = (model, self.optimizer)

    def _connect(self, model: nn.Module) -> None:
        """Make DDP bear the dummy, or refuse it."""
        owned = self.wrapper.parameters.all()
        for ddp in ddps_around(model.modules(), owned):
            check_ddp_reduces(ddp, self.wrapper.scale)
            if ddp_marks_twice(ddp) and not is_attached(self.wrapper, ddp.module):
                attach_to_outputs(self.wrapper, ddp)
