"""For Hugging Face's Trainer: the dummy term in `compute_loss`, gradient norms in `log`."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from modaldummy._arguments import called_model
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.batch import EXPLICIT_KEYS
from modaldummy._core.loss_function import check_loss
from modaldummy._core.parameter_map import Step
from modaldummy._engines import ddp_conflict, ddps_around, is_zero_engine
from modaldummy._errors import BatchMetadataError, describe, packages_needed
from modaldummy._findings import Finding, log_findings
from modaldummy._hold import HoldHandle, hold_inactive
from modaldummy._numbers import check_bool
from modaldummy._preflight import findings_of_total, preflight
from modaldummy._ranks import attach_to_outputs, check_ranks
from modaldummy._ranks.attach import is_attached
from modaldummy._ranks.conflicts import find_conflicts
from modaldummy._shadow import ShadowHandle, shadow_inactive
from modaldummy._shadow.handle import batches_of
from modaldummy._shadow.shadow import Shadow
from modaldummy.integrations.accumulated_report import WeightedReport, accumulated_report
from modaldummy.integrations.shadow_examples import find_examples

with packages_needed("transformers accelerate"):
    from accelerate.data_loader import DataLoaderDispatcher
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType, send_to_device
    from transformers import Trainer

    from modaldummy.integrations.gradient_norm_callback import GradientNormCallback

__all__ = ["DummyLossMixin", "GradientNormCallback"]

WrapperOrFactory: TypeAlias = DummyLossWrapper | Callable[[nn.Module], DummyLossWrapper]

if TYPE_CHECKING:
    _TrainerMethods = Trainer
else:
    _TrainerMethods = object
_logger = logging.getLogger(__name__)
_METADATA_DROPPED = (
    "The Trainer's default collators drop strings. Pass a `data_collator` that keeps the names of "
    "modalities, or write integer indexes into the map into a column 'modality'. With "
    "`remove_unused_columns=True` the Trainer also drops each column that is neither an argument "
    "of the model's `forward` nor in `metadata_columns`."
)
_ADDED_TWICE = (
    "The loss went through the wrapper, and the mixin adds the dummy term as well, so that the "
    "dummy term would be added twice. Use `super().compute_loss(...)` or "
    "`self.wrapper.total(...)`, not both."
)
_NO_EXAMPLES = (
    "The engine needs a shadow, which records the model on batches that together contain every "
    "modality. Pass such batches, as your collator makes them: `shadow_examples=[...]`. If all "
    "ranks always have the same modalities, pass `shadow=False`."
)
# What mixins have made; hooks of the models keep them alive.
_SHADOWS: weakref.WeakSet[Shadow] = weakref.WeakSet()
_DDP_LOOKS = (
    "parameters of the map attached to DDP's outputs, because DDP looks for unused parameters. "
    "Such a DDP also runs without a dummy term; with one, `ddp_find_unused_parameters=False` is "
    "cheaper"
)
_ZERO1 = (
    "ZeRO-1 supports ranks with different modalities only if forward uses all parameters of the "
    "towers that it runs"
)
_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_BATCHES_DISPATCHED = (
    "The first rank sends batches of an iterable dataset to all ranks, but only with the keys of "
    "its first batch. A modality that this batch does not contain is lost on all ranks. Give all "
    "batches the same keys, or pass `accelerator_config={'dispatch_batches': False}` and let each "
    "rank load its own samples."
)


class DummyLossMixin(_TrainerMethods):
    """Adds the dummy term of a ``DummyLossWrapper`` to the training loss of a Trainer.

    Put the mixin before the Trainer::

        class MyTrainer(DummyLossMixin, Trainer): ...
        trainer = MyTrainer(model, args, wrapper=wrapper, callbacks=[GradientNormCallback()], ...)

    Before forward, the mixin reads the modalities from the Trainer's inputs, in any form of
    ``active_modalities``. Evaluation and prediction see the real loss. An inactive parameter gets
    ``scale`` per element and step, also if a step accumulates several batches. The log of training
    contains the wrapper's report. When training starts, the mixin logs with ``logging`` what it has
    set up and the findings of ``preflight``, also those about the first loss.

    Under FSDP and DeepSpeed's ZeRO it calls ``shadow_inactive``, so that ranks may have different
    modalities.

    Args:
        *args: Arguments of the Trainer.
        wrapper: The wrapper, or a function that makes one from a model. ``model_init`` needs the
            function.
        hold: Whether ``hold_inactive`` holds the optimizer, or the engine of DeepSpeed's ZeRO.
        shadow: Whether to do so; else ``check_ranks`` refuses ranks with different modalities.
        shadow_examples: Batches, as the collator makes them, that together contain every modality,
            the same on all ranks. By default they are made of the smallest among the first training
            samples; an iterable dataset is not searched.
        metadata_columns: Columns of the dataset that the Trainer keeps for the wrapper. The model
            gets those that its ``forward`` names.
        **kwargs: Arguments of the Trainer.

    Attributes:
        wrapper: The wrapper in use.
        shadow: The handle of the shadow, None without one.

    Raises:
        TypeError: The mixin comes after the Trainer, or ``wrapper`` neither is nor makes a wrapper.
        ValueError: The wrapper belongs to another model. From the first step: no training sample
            was found that contains a modality.
        RecordError: From a step: what the shadow has recorded does not fit the model.
        BatchMetadataError: From a step: the inputs do not say which modalities they contain.
        UnsupportedEngineError: From a step: the engine does not support what the wrapper does.
        RankDisagreementError: From a step: ranks have different modalities, and FSDP or DeepSpeed
            does not support that.
        RuntimeError: From a step: the loss did not go through the wrapper, or it did so twice.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(DummyLossMixin):
            raise TypeError(
                f"`{cls.__name__}` has the Trainer before the mixin, so that the mixin has no "
                f"effect. Write `class {cls.__name__}(DummyLossMixin, Trainer)`."
            )

    def __init__(
        self,
        *args: Any,
        wrapper: WrapperOrFactory,
        hold: bool = False,
        shadow: bool = True,
        shadow_examples: Iterable[Mapping[str, Any]] | None = None,
        metadata_columns: str | Sequence[str] = EXPLICIT_KEYS,
        **kwargs: Any,
    ) -> None:
        is_name = isinstance(metadata_columns, str)
        self._metadata_columns = [metadata_columns] if is_name else list(metadata_columns)
        super().__init__(*args, **kwargs)
        model: Any = self.model
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        accepted = inspect.signature(bare.forward).parameters
        self._withheld = {name for name in self._metadata_columns if name not in accepted}
        self._given = wrapper
        self._hold = hold
        self._shadows = check_bool("shadow", shadow)
        self._shadow_examples: list[Any] | None = None
        if shadow_examples is not None:
            self._shadow_examples = batches_of(shadow_examples, "`shadow_examples`")
        self.shadow: ShadowHandle | None = None
        self._is_recording = False  # whether the shadow records a call of `compute_loss`
        self._hold_handle: HoldHandle | None = None
        self._is_first_loss = True
        self._prepared: tuple[Any, ...] = ()  # the model and the optimizer that `_prepare` got
        # Of all losses that went through backward since the gradients were cleared.
        self._reports: list[WeightedReport] = []
        self._reports_of: tuple[Any, int] = (None, 0)  # the training and step that they belong to
        self._added: StepReport | None = None  # what `compute_loss` has added in this batch
        self._use_wrapper()

    @property
    def held(self) -> tuple[str, ...]:
        """Full names of the parameters that the last step held; empty without a hold."""
        return () if self._hold_handle is None else self._hold_handle.held

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do what the Trainer does, then measure gradient norms."""
        self._prepare(model)
        self._added = None
        reports: list[StepReport] = []  # of the losses that backward goes through

        def observe(step: Step, total: Tensor) -> None:
            report: Any = self.wrapper.last
            if total.requires_grad:
                total.register_hook(lambda _: reports.append(report))

        unsubscribe = self.wrapper.subscribe(observe)
        try:
            with self._first_loss_checked(model):
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            unsubscribe()
        self._collect(reports, num_items_in_batch)
        if self.accelerator.sync_gradients:
            # Before the Trainer clips the gradients.
            reports = [batch.report for batch in self._reports]
            for callback in self._norm_callbacks():
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
        """Do what the Trainer does, and add the dummy term in gradient mode."""
        is_training = torch.is_grad_enabled() and not self._is_recording
        active = self._read(model, inputs) if is_training else None
        result: Any = super().compute_loss(
            model,
            self._for_model(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if active is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        check_loss(loss, "The loss that `compute_loss` of the Trainer returns")
        # If nobody divides the losses later, the accumulated batches share one dummy term.
        share = 1.0 if self._is_divided_later(num_items_in_batch) else 1 / self._num_accumulated()
        total = self.wrapper.add(loss, active, share)
        self._added = self.wrapper.last
        return (total, *outputs) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Do what the Trainer does; while it generates, the shadow is paused."""
        if self.is_in_train and self.accelerator.distributed_type in _SHARDING:
            self._prepare(self.model_wrapped)  # if evaluation comes before the first step
        generates = self.shadow is not None and getattr(self.args, "predict_with_generate", False)
        with self.shadow.paused() if self.shadow and generates else nullcontext():
            return super().prediction_step(model, self._for_model(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Do what the Trainer does; add the report and the gradient norms to a log of training."""
        if "loss" in logs and self._reports:
            logs |= accumulated_report(self.wrapper, self._reports)
            for callback in self._norm_callbacks():
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
        """The active modalities; under an engine that needs it, ranks have to agree on them."""
        try:
            if self.accelerator.distributed_type in _SHARDING and self.shadow is None:
                check_ranks(self.wrapper, inputs, model=model)
            return self.wrapper.reader.read(inputs)
        except BatchMetadataError as error:
            error.add_note(_METADATA_DROPPED)
            raise

    def _collect(
        self, reports: Sequence[StepReport], num_items_in_batch: Tensor | int | None
    ) -> None:
        """Keep the reports of a batch until the gradients are cleared.

        Raises:
            RuntimeError: The loss did not go through the wrapper, or it did so twice.
        """
        if self._added in reports and len(reports) > 1:
            raise RuntimeError(_ADDED_TWICE)
        if not reports:
            raise RuntimeError(
                f"The loss of `{type(self).__name__}` did not go through the wrapper. Let its "
                "`compute_loss` return what `super().compute_loss(...)` returns, or pass a loss of "
                "its own to `self.wrapper.total(loss, inputs)`."
            )
        state, step = self._reports_of
        # Each training has its own state. That of the next training may be equal, but not the same.
        if state is not self.state or step != self.state.global_step:
            self._reports_of, self._reports = (self.state, self.state.global_step), []
        share = 1 / self._num_accumulated() if self._is_divided_later(num_items_in_batch) else 1.0
        self._reports += [WeightedReport(report, share) for report in reports]

    def _is_divided_later(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer divides the loss by the number of accumulated batches.

        It does not if the loss is divided by the number of items in all of them already. These are
        the conditions of `Trainer.training_step`.
        """
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        return self.compute_loss_func is None and not (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )

    def _num_accumulated(self) -> int:
        """How many batches this step accumulates; 1 outside of `train`, which sets the number."""
        return getattr(self, "current_gradient_accumulation_steps", 1)

    def _norm_callbacks(self) -> list[GradientNormCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, GradientNormCallback)]

    def _use_wrapper(self) -> None:
        """Set `wrapper` to one of the model as it is now."""
        model: Any = self.model
        wrapper = self._given
        if callable(wrapper) and not isinstance(wrapper, DummyLossWrapper):
            wrapper = wrapper(model)
        if not isinstance(wrapper, DummyLossWrapper):
            raise TypeError(
                "`wrapper` must be a DummyLossWrapper, or a function that makes one from the "
                f"model, got {describe(wrapper)}."
            )
        called_model(wrapper, model)
        self.wrapper = wrapper
        self._wrapped_model = model

    def _prepare(self, model: nn.Module) -> None:
        """Set up what training needs, once for each pair of a model and an optimizer; log it."""
        if self.model is not self._wrapped_model:  # `train` has called `model_init`
            self._use_wrapper()
        if self._prepared == (model, self.optimizer):
            return
        done = [*self._attach(model), *self._shadow_if_needed(model)]
        optimizer: Any = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if self._hold:
            is_zero = is_zero_engine(model)
            self._hold_handle = hold_inactive(self.wrapper, model if is_zero else optimizer)
            done.append(f"a hold of {'the engine' if is_zero else 'the optimizer'}")
        if done and self.is_world_process_zero():
            _logger.info("The mixin has set up %s", "; ".join(done))
        findings = preflight(
            self.wrapper,
            optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
            model,
            scaler=self.accelerator.scaler,
            max_norm=self.args.max_grad_norm or None,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )
        self._log(findings)
        self._is_first_loss = True
        loader = self.callback_handler.train_dataloader
        if self.args.world_size > 1 and isinstance(loader, DataLoaderDispatcher):
            _logger.warning(_BATCHES_DISPATCHED)
        self._prepared = (model, self.optimizer)

    @contextmanager
    def _first_loss_checked(self, model: nn.Module) -> Iterator[None]:
        """Log the findings about the first loss that goes to backward."""
        if not self._is_first_loss:
            yield
            return
        backward = self.accelerator.backward

        def check(loss: Tensor, **kwargs: Any) -> None:
            self.accelerator.backward = backward
            self._is_first_loss = False
            self._log(findings_of_total(self.wrapper, model, loss))
            backward(loss, **kwargs)

        self.accelerator.backward = check
        try:
            yield
        finally:
            self.accelerator.backward = backward

    def _log(self, findings: Iterable[Finding]) -> None:
        if self.is_world_process_zero():
            log_findings(findings, _logger)

    def _shadow_if_needed(self, model: nn.Module) -> Iterator[str]:
        """Shadow inactive modalities under an engine that needs it; yields what was done."""
        modules = set(model.modules())
        for made in list(_SHADOWS):  # for the engine of an earlier training
            if made.model is model or not modules.isdisjoint(made.model.modules()):
                made.remove()
                _SHADOWS.discard(made)
        self.shadow = None
        wrapper, engine = self.wrapper, self.accelerator.distributed_type
        if not self._shadows or engine not in _SHARDING or wrapper.interceptor is not None:
            return
        found = find_conflicts(wrapper, model)
        if not (found or is_zero_engine(model)):
            return
        reason = found[0].conflict.message.removesuffix(".") if found else _ZERO1
        given = self._shadow_examples
        self._record(model, self._find_examples() if given is None else given)
        source = "the training set" if given is None else "`shadow_examples`"
        yield (
            f"a shadow of inactive modalities, recorded on batches of {source}, because of "
            f"{type(model).__name__}: {reason}"
        )

    def _record(self, model: nn.Module, examples: Iterable[Any]) -> None:
        """Record the model on batches, called as training calls it.

        ZeRO-3 prefetches what the pass before has used.
        """
        inner: Any = self.model  # an engine may be in another mode than the module inside
        was_training = inner.training
        model.train()
        self.shadow = shadow_inactive(self.wrapper, model)
        made: Any = self.wrapper.interceptor
        _SHADOWS.add(made)
        self._is_recording = True
        try:
            with self.shadow.record(), self.compute_loss_context_manager():
                for example in examples:
                    batch = dict(example)
                    _, num_items = self.get_batch_samples(iter([batch]), 1, self.args.device)
                    inputs = self._prepare_inputs(batch)
                    self.compute_loss(model, inputs, num_items_in_batch=num_items)
        except Exception as error:
            self.shadow.remove()
            error.add_note(f"This was raised while the shadow recorded a batch. {_NO_EXAMPLES}")
            raise
        finally:
            self._is_recording = False
            model.train(was_training)

    def _find_examples(self) -> list[Any]:
        """Batches of the training set that contain every modality, the same on all ranks.

        Raises:
            ValueError: The training set cannot be searched, or lacks a modality.
        """
        loader: Any = self.callback_handler.train_dataloader
        dataset: Any = getattr(loader, "dataset", None)
        is_by_index = dataset is not None and not isinstance(dataset, IterableDataset)
        if not is_by_index or getattr(loader, "batch_sampler", None) is None:
            raise ValueError(f"The training set cannot be searched for examples. {_NO_EXAMPLES}")
        found: list[Any] = [None]
        failure: Exception | None = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                examples = find_examples(
                    dataset,
                    loader.collate_fn,
                    self.wrapper.reader.read,
                    self.wrapper.modalities,
                    min(2, self.args.per_device_train_batch_size),
                )
                found = [send_to_device(examples, "cpu")]
            except Exception as error:  # other ranks wait for the answer
                failure, found = error, [f"{type(error).__name__}: {error}"]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        if isinstance(found[0], str):
            raise ValueError(f"{found[0]} {_NO_EXAMPLES}") from failure
        batches: list[Any] = found[0]
        return batches

    def _attach(self, model: nn.Module) -> Iterator[str]:
        """Attach the parameters of the map to DDP that looks for unused ones; yields what was done.

        Raises:
            UnsupportedEngineError: DDP silently leaves gradients unreduced.
        """
        wrapper = self.wrapper
        for ddp in ddps_around(model.modules(), wrapper.parameters.all()):
            attached = is_attached(wrapper, ddp.module)
            if ddp_conflict(ddp, wrapper.scale, dummy_inside=attached) is not None:
                attach_to_outputs(wrapper, ddp)
                yield _DDP_LOOKS
