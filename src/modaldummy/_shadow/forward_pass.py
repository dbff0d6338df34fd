"""One forward pass, in which towers that this rank does not run are shadowed."""

from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from modaldummy._engines import apply_function, without_dispatch_modes
from modaldummy._errors import RecordError, describe
from modaldummy._shadow.calls import Point, TowerCall, is_floating
from modaldummy._shadow.functions import DummyGradients, Tie
from modaldummy._shadow.record import Record
from modaldummy._shadow.recorder import losses_in, without_trace
from modaldummy._shadow.trees import leaves_of, replaced


class ForwardPass:
    """Follows a forward pass, and shadows towers at their stations.

    Args:
        model: The model that training calls.
        record: The record that the pass has to fit.
        number: Of the pass; later ones have larger numbers.

    Attributes:
        record: As given.
        dummies: Add dummy gradients to the parameters that this pass shadows.
        has_grad: Whether gradients were enabled when the pass began.
        shadowed: The towers that were shadowed.
    """

    def __init__(self, model: nn.Module, record: Record, number: int) -> None:
        self.record = record
        self.dummies = DummyGradients(number)
        self.has_grad = torch.is_grad_enabled()
        self.shadowed: list[nn.Module] = []
        self._model = model
        # How often each module was called, and how often such a call has ended.
        self._num_calls: Counter[tuple[nn.Module, bool]] = Counter()
        # How often each tower has run, for real or as a shadow.
        self._num_runs: Counter[nn.Module] = Counter()
        # Calls of shadowed towers, and their outputs that have no tie yet.
        self._untied: dict[TowerCall, list[Tensor]] = {}
        # While a tower runs, for real or as a shadow, modules inside it call the hooks too.
        self._is_in_tower = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A tower or a module of the trunk is called.

        Returns:
            New arguments, positional and by keyword, or None if they stay.

        Raises:
            RecordError: A tower is called more often than in the record.
        """
        if self._is_in_tower:
            return None
        if module in self.record.calls:
            self._enter_tower(module)
            return None
        point = self._reach(module)
        calls = [call for call in self._untied if point in call.ties]
        new: dict[int, Any] = {}
        for call in calls if torch.is_grad_enabled() else ():
            if (leaf := _leaf_to_tie(call.ties[point], args, kwargs)) is not None:
                new[id(leaf)] = self._tied(new.get(id(leaf), leaf), self._untied.pop(call))
        return replaced((args, kwargs), new) if new else None

    def leave(self, module: nn.Module) -> None:
        """A call of a tower or of another module has ended."""
        if module in self.record.calls:
            self._is_in_tower = False
        else:
            self._reach(module, after=True)

    def end(self, output: Any) -> Any:
        """The forward pass has ended.

        Returns:
            Its output, with ties that found no other place.

        Raises:
            RecordError: A tower has not run, and its station did not come.
        """
        self._reach(self._model, after=True)
        for tower, calls in self.record.calls.items():
            if (number := self._num_runs[tower]) < len(calls):
                raise RecordError(
                    f"{describe(tower)}, a tower, was called {number} times in this forward pass, "
                    f"and the call of {describe(calls[number].station.module)} that follows it in "
                    "the record did not come. If that module runs only with this tower, as a "
                    "projector does, add it to the key of the tower. If it runs once for each "
                    "modality, let it run in every forward pass. If the model has changed, record "
                    "again."
                )
        if not self._untied:
            return output
        outputs = [tensor for own in self._untied.values() for tensor in own]
        losses = filter(is_floating, losses_in(output))
        return replaced(output, {id(loss): self._tied(loss, outputs) for loss in losses})

    def _reach(self, module: nn.Module, *, after: bool = False) -> Point:
        """The point to which a call of a module, or its end, brings the pass."""
        point = Point(module, self._num_calls[module, after], after)
        self._num_calls[module, after] += 1
        self._catch_up(self.record.at.get(point, []))
        return point

    def _enter_tower(self, tower: nn.Module) -> None:
        number, calls = self._num_runs[tower], self.record.calls[tower]
        if number == len(calls):
            raise RecordError(
                f"{describe(tower)}, a tower, is called {number + 1} times in this forward pass "
                f"and {number} times in the record. Give each kind of call a key of the map, and "
                "record a batch that contains all modalities. Call towers in an order that does "
                "not depend on the batch."
            )
        self._catch_up(self.record.at[calls[number].station], calls[number])
        self._num_runs[tower] += 1
        self._is_in_tower = True

    def _catch_up(self, calls: Iterable[TowerCall], until: TowerCall | None = None) -> None:
        """Shadow those of `calls` before `until` that this rank has not made."""
        for call in calls:
            if call is until:
                return
            if self._num_runs[call.tower] <= call.number:
                self._num_runs[call.tower] += 1
                self._shadow(call)

    def _shadow(self, call: TowerCall) -> None:
        """Call a tower on its recorded arguments."""
        args, kwargs = call.copy_arguments(self._model)
        has_grad = self.has_grad and (call.has_grad or call.checkpoint is True)
        hooks = [
            module.register_forward_pre_hook(self.dummies.watch)
            for module in (call.tower.modules() if has_grad else ())
        ]
        # A checkpoint around the station must not count the tensors that are saved here.
        saving = saved_tensors_hooks(_same, _same)
        self._is_in_tower = True
        try:
            with (
                torch.set_grad_enabled(has_grad),
                torch.inference_mode() if call.is_inference else nullcontext(),
                # Selective checkpoints around the station count the operations of forward.
                without_dispatch_modes(),
                saving,
            ):
                output = (
                    _run(call, *args, **kwargs)
                    if call.checkpoint is None
                    else checkpoint(_run, call, *args, use_reentrant=call.checkpoint, **kwargs)
                )
        finally:
            self._is_in_tower = False
            for hook in hooks:
                hook.remove()
        self.shadowed.append(call.tower)
        leaves = [leaf for _, leaf in leaves_of(output)]
        if outputs := [leaves[i] for i in call.outputs if leaves[i].requires_grad]:
            self._untied[call] = outputs

    def _tied(self, tensor: Tensor, outputs: list[Tensor]) -> Any:
        return apply_function(Tie, tensor, self.dummies, *outputs)


def recomputed(record: Record, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Arguments for a call that a checkpoint makes again during backward.

    What forward has tied needs a gradient, or the checkpoint would save other tensors.
    """
    ties = [item for call in record.order for item in call.ties.items()]
    paths = [path for point, own in ties if point.module is module for path in own]
    leaf = _leaf_to_tie(paths, args, kwargs) if paths and torch.is_grad_enabled() else None
    if leaf is None or leaf.requires_grad:
        return None
    return replaced((args, kwargs), {id(leaf): leaf.detach().requires_grad_()})


def _leaf_to_tie(paths: Collection[Any], args: Any, kwargs: Any) -> Tensor | None:
    """The input of a module that is tied: one of the recorded paths, else one with a gradient.

    An input that comes from a tower alone is not there without it. Another one takes its place, so
    that backward runs the module as on other ranks.
    """
    floating = [(path, leaf) for path, leaf in leaves_of((args, kwargs)) if is_floating(leaf)]
    floating.sort(key=lambda item: (item[0] not in paths, not item[1].requires_grad))
    return floating[0][1] if floating else None


def _run(call: TowerCall, *args: Any, **kwargs: Any) -> Any:
    """Call a tower as in the record, without a trace; a checkpoint runs this twice.

    Eagerly, so that the tower has the hooks that give dummy gradients.
    """
    autocast = torch.autocast(
        call.device.type, dtype=call.autocast, enabled=call.autocast is not None
    )
    with autocast, torch.compiler.set_stance("force_eager"), without_trace(call.tower):
        return call.tower(*args, **kwargs)


def _same(tensor: Tensor) -> Tensor:
    return tensor
