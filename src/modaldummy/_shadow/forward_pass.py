"""One forward pass, in which towers that this rank does not run are shadowed."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from modaldummy._engines import (
    apply_function,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)
from modaldummy._errors import RecordError, describe
from modaldummy._shadow.calls import Point, TowerCall, is_floating
from modaldummy._shadow.functions import DummyGradients, Tie
from modaldummy._shadow.record import Record
from modaldummy._shadow.recorder import loss_places, without_trace


class ForwardPass:
    """Follows a forward pass, and shadows towers at their stations.

    Args:
        model: The model that training calls.
        record: The record that the pass has to fit.
        scale: The scale of the wrapper.

    Attributes:
        record: As given.
        dummies: Add dummy gradients to the parameters that this pass shadows.
        has_grad: Whether gradients were enabled when the pass began.
        shadowed: The towers that were shadowed.
    """

    def __init__(self, model: nn.Module, record: Record, scale: float | None) -> None:
        self.record = record
        self.dummies = DummyGradients(scale)
        self.has_grad = torch.is_grad_enabled()
        self.shadowed: list[nn.Module] = []
        self._model = model
        # How often each module was called, and how often such a call has ended.
        self._num_calls: Counter[tuple[nn.Module, bool]] = Counter()
        # How often each tower has run, for real or as a shadow.
        self._num_runs: Counter[nn.Module] = Counter()
        # Calls of shadowed towers, and their outputs that have no tie yet.
        self._untied: list[tuple[TowerCall, list[Tensor]]] = []
        # While a shadow runs, modules of its tower call the hooks too.
        self._is_shadowing = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A tower or a module of the trunk is called.

        Returns:
            New arguments, positional and by keyword, or None if they stay.

        Raises:
            RecordError: A tower is called more often than in the record.
        """
        if self._is_shadowing:
            return None
        if module in self.record.calls:
            self._enter_tower(module)
            return None
        point = self._reach(module)
        if not torch.is_grad_enabled() or not any(point in c.ties for c, _ in self._untied):
            return None
        found, structure = tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in found]
        floating = [place for place, leaf in enumerate(leaves) if is_floating(leaf)]
        floating.sort(key=lambda place: not leaves[place].requires_grad)
        for call in [call for call, _ in self._untied if point in call.ties] if floating else ():
            recorded = [place for place in floating if found[place][0] in call.ties[point]]
            # An input that comes from a tower alone is not there without it. Another one takes its
            # place, so that backward runs the module as on other ranks.
            self._tie(leaves, (recorded or floating)[:1], [call])
        return tree_unflatten(leaves, structure)

    def leave(self, module: nn.Module) -> None:
        """A call of a module has ended."""
        if not self._is_shadowing:
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
        leaves, structure = tree_flatten(output)
        places = [place for place in loss_places(output) if is_floating(leaves[place])]
        self._tie(leaves, places, [call for call, _ in self._untied])
        return tree_unflatten(leaves, structure)

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
        self._is_shadowing = True
        try:
            with without_trace(call.tower), torch.set_grad_enabled(has_grad), saving:
                output = (
                    _run(call.tower, *args, **kwargs)
                    if call.checkpoint is None
                    else checkpoint(
                        _run, call.tower, *args, use_reentrant=call.checkpoint, **kwargs
                    )
                )
        finally:
            self._is_shadowing = False
            for hook in hooks:
                hook.remove()
        self.shadowed.append(call.tower)
        self.dummies.modules.update(call.tower.modules())
        leaves, _ = tree_flatten(output)
        if outputs := [leaves[i] for i in call.outputs if leaves[i].requires_grad]:
            self._untied.append((call, outputs))

    def _tie(self, leaves: list[Any], places: Iterable[int], calls: list[TowerCall]) -> None:
        """Tie the leaves at `places` to the outputs of these calls."""
        outputs = [output for call, own in self._untied if call in calls for output in own]
        self._untied = [(call, own) for call, own in self._untied if call not in calls]
        for place in places:
            leaves[place] = apply_function(Tie, leaves[place], self.dummies, *outputs)


def _run(tower: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a tower eagerly, so that it has the hooks that give dummy gradients."""
    with torch.compiler.set_stance("force_eager"):
        return tower(*args, **kwargs)


def _same(tensor: Tensor) -> Tensor:
    return tensor
