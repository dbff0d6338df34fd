"""Holds parameters while an optimizer steps: hides their gradients from it.

A `WrapperHold` decides which parameters one wrapper wants to be held. The `Holder` of an optimizer
carries out all its holds.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, Step
from modaldummy._engines import is_sharded, version_of
from modaldummy._errors import UnsupportedEngineError, first_few
from modaldummy._hold.dummy_gradients import HeldGradientCheck, may_be_dummy_gradient
from modaldummy._hold.trained_keys import Flag, TrainedKeys, check_not_capturing
from modaldummy._optimizers import parameters_of
from modaldummy._ownership import shared_with_trunk


class WrapperHold:
    """The hold of one wrapper on one optimizer, behind a `HoldHandle`.

    Args:
        wrapper: Its losses say which keys are active.
        holder: The holder of the optimizer.
        group: Ranks that must agree; None for all.

    Attributes:
        wrapper: As given.
        trained: Keys that the ranks agreed on as trained, in the last call of `agree`.
        untrained: Keys whose parameters are to be held; none once the hold has ended.
        held: Full names of the parameters that the last step held.
        ended: Whether `end` was called.
        trained_keys: The record of what backward passes have trained.
    """

    def __init__(
        self, wrapper: DummyLossWrapper, holder: "Holder", group: "dist.ProcessGroup | None"
    ) -> None:
        self.wrapper: DummyLossWrapper = wrapper
        self.trained: list[ModalityKey] = []
        self.untrained: list[ModalityKey] = []
        self.held: tuple[str, ...] = ()
        self.ended: bool = False
        self._holder = holder
        self._group = group
        self._parameters = wrapper.parameters
        self._shared_with_trunk = shared_with_trunk(self._parameters)
        self._gradient_check = HeldGradientCheck()
        keys = list(self._parameters.paths)
        # Gradients that exist already may be those of any key.
        trained = keys if holder.has_gradients() else ()
        self.trained_keys: TrainedKeys = TrainedKeys(keys, holder.is_cleared, trained)
        self._unsubscribe = wrapper.subscribe(self._observe)

    def end(self) -> None:
        """Hold nothing from the next step on."""
        self.ended = True
        self._unsubscribe()

    def agree(self, device: torch.device) -> None:
        """Agree with the other ranks on which keys are trained.

        Args:
            device: Device of the parameters.
        """
        self.trained, untrained = self.trained_keys.agree(
            self._has_training_gradient, self._group, device
        )
        self.untrained = [] if self.ended else untrained

    def used_by(self, keys: Collection[ModalityKey]) -> set[int]:
        """`id` of each parameter of the map that one of the keys owns or that the trunk shares."""
        return self._parameters.of_keys(keys).keys() | self._shared_with_trunk

    def parameters_to_hold(self, candidates: Collection[int]) -> dict[int, OwnedParameter]:
        """Parameters to hold in this step, by `id`; also sets `held`.

        Args:
            candidates: `id` of each parameter of the optimizer that may be held.

        Raises:
            UnsupportedEngineError: The optimizer has no parameter of the map any more.
        """
        owned = self._parameters.of_keys(self.untrained)
        to_hold = {i: owned[i] for i in owned if i in candidates}
        if self.untrained and not to_hold and not self._holder.has_any_of(self._parameters.all()):
            raise UnsupportedEngineError(
                "The optimizer has no parameter of the modalities any more, so that none can be "
                "held: its parameters were replaced after `hold_inactive`, as DeepSpeed's ZeRO "
                "does. Call `remove()` on the handle, and use scale=0.0."
            )
        self.held = tuple(parameter.name for parameter in to_hold.values())
        for key in self.untrained:
            if self._gradient_check.count_step(key):
                ids = self._parameters.of_keys([key])
                self._gradient_check.check(key, (to_hold[i] for i in ids if i in to_hold))
        return to_hold

    def _observe(self, step: Step, loss: Tensor) -> None:
        self._holder.loss_computed.is_set = True
        self.trained_keys.observe_loss(step.active_keys, loss)

    def _has_training_gradient(self, key: ModalityKey, trained: Collection[ModalityKey]) -> bool:
        """Whether parameters that only `key` uses have gradients that are not dummy gradients.

        A gradient of one element could be either. If there are no others, it counts as training.
        """
        only_this_key = self._parameters.of_keys([key]).keys() - self.used_by(trained)
        # Other parameters keep old gradients when this optimizer clears its own.
        parameters = [p for p in self._holder.parameters() if id(p) in only_this_key]
        gradients = [p.grad for p in parameters if p.grad is not None]
        telling = [gradient for gradient in gradients if gradient.numel() > 1]
        return bool(gradients) and not (telling and all(map(may_be_dummy_gradient, telling)))

    def __getstate__(self) -> dict[str, Any]:
        # The copy of a handle belongs to no optimizer.
        return {"held": self.held}


class _HiddenGradient(NamedTuple):
    """The gradient of a held parameter, whose `grad` is None while the optimizer steps.

    Attributes:
        owned: The parameter.
        gradient: Its gradient before the step.
        version: How often its value had been changed in place before the step.
    """

    owned: OwnedParameter
    gradient: Tensor | None
    version: int


class Holder:
    """Carries out all holds of one optimizer, by hooks before and after its step.

    Args:
        optimizer: The optimizer; the holder does not keep it alive.

    Attributes:
        holds: One for each wrapper; a hold that has ended is dropped after the next step.
        loss_computed: Set by each loss of a held wrapper. A step clears it when it begins, and its
            closure leaves it as it was.

    Raises:
        TypeError: The optimizer has no step hooks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer, self._end_holds)
        self.holds: list[WrapperHold] = []
        self.loss_computed: Flag = Flag()
        self._hidden: list[_HiddenGradient] = []
        self._others_had_gradients: bool
        # How many calls of `step` are running: the `step` of a subclass may call its parent's.
        self._depth = 0
        try:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        except AttributeError as error:
            raise TypeError(
                f"`optimizer` ({type(optimizer).__name__}) has no step hooks, like a wrapper "
                "around another optimizer. Pass the inner one, often `optimizer.optimizer`."
            ) from error

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that the optimizer has now; none once the optimizer is gone."""
        optimizer = self._optimizer()
        if optimizer is not None:
            yield from parameters_of(optimizer)

    def has_any_of(self, parameter_ids: Collection[int]) -> bool:
        """Whether the optimizer has a parameter whose `id` is in `parameter_ids`."""
        return any(id(parameter) in parameter_ids for parameter in self.parameters())

    def has_gradients(self) -> bool:
        """Whether any parameter of the optimizer has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters())

    def is_cleared(self) -> bool:
        """Whether all gradients of the optimizer were cleared."""
        # FSDP2 stores gradients elsewhere until it reduces them; None does not mean cleared then.
        return not self.has_gradients() and not any(map(is_sharded, self.parameters()))

    def _end_holds(self, _: object) -> None:
        """Let wrappers forget an optimizer that is gone."""
        for hold in self.holds:
            hold.end()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A loss was computed since the last step began. A step that still counts as running raised.
        if self.loss_computed.is_set:
            self._depth = 0
        if self._depth == 0:
            check_not_capturing()
            self._hide_gradients()
            self.loss_computed.is_set = False
            if len(args) > 1 and callable(args[1]):
                args = (args[0], self._with_gradients(args[1]), *args[2:])
            if callable(closure := kwargs.get("closure")):
                kwargs = kwargs | {"closure": self._with_gradients(closure)}
        self._depth += 1
        return args, kwargs

    def _with_gradients(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure; it sees all gradients, and those of held parameters are hidden after it."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._restore_gradients()
            was_set = self.loss_computed.is_set
            result = closure(*args, **kwargs)
            self.loss_computed.is_set = was_set
            self._hide_gradients()
            return result

        return evaluate

    def _hide_gradients(self) -> None:
        for hold in self.holds:
            hold.agree(next(self.parameters()).device)
        candidates: set[int] = set()
        if any(hold.untrained for hold in self.holds):
            # No hold may hold a parameter that another wrapper has trained.
            trained = [hold.used_by(hold.trained) for hold in self.holds]
            candidates = set(map(id, self.parameters())).difference(*trained)
        to_hold: dict[int, OwnedParameter] = {}
        for hold in self.holds:
            to_hold |= hold.parameters_to_hold(candidates)
        self._hidden = [
            _HiddenGradient(owned, owned.parameter.grad, version_of(owned.parameter))
            for owned in to_hold.values()
        ]
        for hidden in self._hidden:
            hidden.owned.parameter.grad = None
        self._others_had_gradients = self.has_gradients()

    def _restore_gradients(self) -> None:
        # If the step has cleared all gradients that it had, the hidden ones are cleared too.
        if not self._others_had_gradients or self.has_gradients():
            for hidden in self._hidden:
                if hidden.owned.parameter.grad is None:
                    hidden.owned.parameter.grad = hidden.gradient
        self._hidden = []

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._depth == 0:  # the hooks were registered during this step
            return
        self._depth -= 1
        if self._depth:
            return
        changed = [h.owned.name for h in self._hidden if version_of(h.owned.parameter) != h.version]
        self._restore_gradients()
        for hold in self.holds:
            hold.trained_keys.start_over()
        self.holds = [hold for hold in self.holds if not hold.ended]
        if self.loss_computed.is_set:
            raise UnsupportedEngineError(
                f"{type(optimizer).__name__} computes losses in `step()` other than by its "
                "`closure` argument, so that nothing could be held. Hold the optimizer that it "
                "steps, such as `optimizer.base_optimizer`, or `remove()` the handle."
            )
        if changed:
            raise UnsupportedEngineError(
                f"{type(optimizer).__name__}, or a hook of its `step()`, has changed held "
                "parameters, whose gradient is None during the step: "
                f"{first_few(map(repr, changed), 3)}. Skip parameters without a gradient there, or "
                "`remove()` the handle."
            )


def holder_of(optimizer: Optimizer) -> Holder:
    """The one holder of an optimizer, made at the first call."""
    holder = _existing_holder(optimizer)
    if holder is None:
        holder = Holder(optimizer)
        _HOLDERS[optimizer] = weakref.ref(holder)
    return holder


def is_held(wrapper: DummyLossWrapper, optimizer: Optimizer) -> bool:
    """Whether the optimizer holds the parameters of the wrapper's inactive modalities."""
    holder = _existing_holder(optimizer)
    holds = [] if holder is None else holder.holds
    return any(hold.wrapper is wrapper and not hold.ended for hold in holds)


def _existing_holder(optimizer: Optimizer) -> Holder | None:
    reference = _HOLDERS.get(optimizer)
    return None if reference is None else reference()


# Not an attribute of the optimizer, so that no copy and no checkpoint of it contains a holder. The
# step hooks of the optimizer keep its holder alive. A strong reference here would keep both alive
# for ever if the model refers to the optimizer, because the holder refers to the model.
_HOLDERS: weakref.WeakKeyDictionary[Optimizer, "weakref.ref[Holder]"] = weakref.WeakKeyDictionary()
