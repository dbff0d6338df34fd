"""Records a model, agrees with other ranks on the record, and follows its forward passes."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.graph import reached_nodes
from modaldummy._core.parameter import ParameterSlot, slot_of
from modaldummy._core.parameter_map import ModalityKey, Step
from modaldummy._engines import (
    direct_parameters,
    forward_hooks,
    is_deepspeed_engine,
    is_in_backward,
    wrapped_modules,
)
from modaldummy._errors import RecordError, UnsupportedEngineError, describe, first_few
from modaldummy._group import num_ranks
from modaldummy._shadow.forward_pass import ForwardPass, recomputed
from modaldummy._shadow.functions import DummyGradients
from modaldummy._shadow.record import (
    Pass,
    Record,
    check_order_of_gradients,
    check_parameters_without_tower,
    passes_of_all_ranks,
    towers_of,
)
from modaldummy._shadow.recorder import Recorder


class Shadow:
    """Shadows the towers of a model in its forward passes.

    Args:
        wrapper: The wrapper, whose map names the towers.
        model: The model that training calls.
        group: The ranks that must have the same record; None for all.

    Attributes:
        model: As given.
        is_paused: Whether forward passes are left alone.
        shadowed: Keys of the map whose towers the last forward pass shadowed.
    """

    def __init__(
        self, wrapper: DummyLossWrapper, model: nn.Module, group: "dist.ProcessGroup | None"
    ) -> None:
        self.model = model
        # Some code calls the module inside of an engine, such as the evaluation of a Trainer.
        self._root: nn.Module = model.module if is_deepspeed_engine(type(model)) else model  # type: ignore[assignment]
        self.is_paused = False
        self.shadowed: tuple[ModalityKey, ...] = ()
        self._wrapper = wrapper
        self._group = group
        self._towers: dict[nn.Module, set[ModalityKey]] = {}
        self._passes: Sequence[Pass] = ()
        self._record: Record | None = None
        # Where the record is from: whether each parameter was trained, and all modules.
        self._trained: dict[ParameterSlot, bool] = {}
        self._modules: set[nn.Module] = set()
        self._was_training = True
        self._in_towers: set[nn.Module] = set()
        self._pass: ForwardPass | None = None
        # Of forward passes that have shadowed a tower and whose graph is alive.
        self._shadowing: weakref.WeakSet[DummyGradients] = weakref.WeakSet()
        self._num_passes = 0
        self._is_recording = False
        self._handles: list[Any] = []
        hooks = [hook for module in model.modules() for hook in forward_hooks(module)]
        if any(isinstance(hook, Hook) and hook.is_live for hook in hooks):
            raise ValueError("`model` has a shadow already. Call `remove()` on its handle.")
        wrapper.intercept(self)
        self._own_handles = [
            # Before the hooks of engines, which gather parameters.
            self._root.register_forward_pre_hook(Hook(self._begin), prepend=True),
            # Before those that reshard, as a tower that runs in forward does.
            self._root.register_forward_hook(Hook(self._end), prepend=True, always_call=True),
        ]

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward passes in the `with` block.

        Raises:
            RecordError: It runs inside another record, or after `remove`.
        """
        if self._is_recording or not self._own_handles:
            where = "runs inside another record" if self._is_recording else "was removed"
            raise RecordError(f"The shadow {where}, so that it cannot record.")
        self._forget()
        self._towers = towers_of(self._wrapper.parameters, self.model)
        self._in_towers = {module for tower in self._towers for module in tower.modules()}
        recorder = Recorder(self._root, self._towers)
        self._is_recording = True
        try:
            with recorder.recording():
                yield
        finally:
            self._is_recording = False
        self._passes = recorder.passes
        self._modules = set(self.model.modules())
        self._trained = _trained(self._modules)
        self._was_training = self._root.training
        if num_ranks(self._group) == 1:
            self._agree()

    def remove(self) -> None:
        """Leave the model and the wrapper as they were."""
        self._pass = None
        self._forget()
        for handle in self._own_handles:
            handle.remove()
        self._own_handles = []
        self._wrapper.intercept(None)

    def covers(self, slot: ParameterSlot) -> bool:
        """Whether a parameter is in a tower that this object shadows."""
        return slot[0] in self._in_towers

    def claim(self, step: Step, loss: Tensor, scale: float | None) -> tuple[Step, Tensor]:
        """Take over the dummy gradients of parameters in towers.

        They come from the forward passes that the graph of the loss reaches, the last one first. A
        parameter that no shadow has used gets none: the engine may have only a part of it here. A
        total that is computed while recording gives none.
        """
        if (self._record is None and not self._is_recording) or self.is_paused:
            return step, loss
        self.shadowed = tuple(key for key in self.shadowed if key not in step.active_keys)
        covered = {slot for slot in map(slot_of, step.inactive_entries) if self.covers(slot)}
        remaining = set(covered)
        alive = set(self._shadowing)
        if self._pass is not None:  # forward computes the total itself
            alive.add(self._pass.dummies)
        if alive and covered:
            nodes = reached_nodes([loss.grad_fn])
            found = {getattr(node, "dummies", None) for node in nodes}
            for dummies in sorted(alive, key=lambda each: each.number, reverse=True):
                if dummies in found:
                    loss = dummies.claim(loss, remaining, scale)
        return step.without(covered), loss

    def _agree(self) -> Record:
        """Make one record of those of all ranks."""
        devices = {str(parameter.device) for parameter in self.model.parameters()}
        if len(devices) > 1:
            raise UnsupportedEngineError(
                f"The parameters of the model are on several devices: {first_few(sorted(devices))}."
                " A shadow supports one device for each process."
            )
        passes = passes_of_all_ranks(self._passes, self._wrapper, self.model, self._group)
        if not passes:
            raise RecordError(
                "The shadow has no record. Record a forward pass first: pass `examples=` to "
                "`shadow_inactive`, or call the model in `with handle.record():`."
            )
        record = Record(passes, self._towers, self._wrapper.parameters)
        self._in_towers = record.modules()  # the next check asks what is covered
        check_parameters_without_tower(self._wrapper, self.model)
        check_order_of_gradients(record, self.model)
        self._record = record
        return record

    def _check_unchanged(self, record: Record) -> None:
        """Refuse a forward pass of a model that is not the recorded one any more.

        Raises:
            RecordError: It has other parameters, or trains others, or is in another mode.
        """
        present = set(self.model.modules())
        if missing := record.watched - present:
            raise RecordError(
                f"{describe(next(iter(missing)))}, which was called in the record, is not in the "
                "model any more. Record again."
            )
        now = _trained(present)
        if changed := [slot for slot, flag in now.items() if self._trained.get(slot) is not flag]:
            module, name = changed[0]
            raise RecordError(
                f"`{name}` of {describe(module)} is new, or its `requires_grad` has changed since "
                "the record. Record again."
            )
        if torch.is_grad_enabled() and self._root.training is not self._was_training:
            raise RecordError(
                f"The record is of {'training' if self._was_training else 'evaluation'} mode. Call "
                "`model.train()` and record again, so that dropout and checkpoints are those of "
                "training."
            )

    def _set_hooks(self, record: Record) -> Record:
        """Watch the towers and stations; after the hooks of engines made since the record.

        The record gets the modules that engines have put around those that it has.
        """
        outer: dict[nn.Module, nn.Module] = {}
        for module in self.model.modules():
            outer.setdefault(module, module)
            for _, wrapped in wrapped_modules(module):
                if module not in self._modules:
                    outer[wrapped] = outer[module]
        order = [call.outside(outer) for call in record.order]
        towers = {outer[tower]: keys for tower, keys in self._towers.items()}
        record = Record([order], towers, self._wrapper.parameters)
        before = {point.module for point in record.points if not point.after}
        ending = {point.module for point in record.points if point.after} - {self._root}
        self._handles = [
            module.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True)
            for module in before | record.calls.keys()
        ]
        self._handles += [
            module.register_forward_hook(Hook(self._leave), prepend=True)
            for module in ending | record.calls.keys()
        ]
        self._record, self._in_towers = record, record.modules()
        return record

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._passes, self._record, self._in_towers = (), None, set()

    def _begin(self, *_: Any) -> None:
        self._pass, self.shadowed = None, ()
        if self.is_paused or self._is_recording:
            return
        record = self._record or self._agree()
        self._check_unchanged(record)
        if not self._handles:
            record = self._set_hooks(record)
        self._num_passes += 1
        self._pass = ForwardPass(self._root, record, self._num_passes)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._pass is not None:
            return self._pass.enter(module, args, kwargs)
        if self._record is None or not is_in_backward():
            return None
        return recomputed(self._record, module, args, kwargs)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if self._pass is not None:
            self._pass.leave(module)

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        current, self._pass = self._pass, None
        if current is None or output is None:  # after an error in forward there is no output
            return None
        output = current.end(output)
        keys = {key for tower in current.shadowed for key in current.record.keys[tower]}
        self.shadowed = tuple(key for key in self._wrapper.parameters.paths if key in keys)
        if current.shadowed and current.has_grad:
            self._shadowing.add(current.dummies)
        return output


def _trained(modules: Iterable[nn.Module]) -> dict[ParameterSlot, bool]:
    """Which parameters modules have, and whether they are trained."""
    return {
        (module, name): parameter.requires_grad
        for module in modules
        for name, parameter in direct_parameters(module).items()
        if parameter is not None
    }


class Hook:
    """A hook of a module; in a copy or a pickle of the module it does nothing.

    A graph that `torch.compile` makes of the module ends at the hook, so that it runs each time.
    """

    def __init__(self, function: Any) -> None:
        self.is_live = function is not _do_nothing
        self._function = torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> Any:
        return Hook, (_do_nothing,)


def _do_nothing(*_: Any) -> None:
    pass
