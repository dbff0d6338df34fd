"""Holds parameters while an optimizer steps: hides their gradients from it.

A `WrapperHold` says which parameters one wrapper wants to be held. The `Holder` of an optimizer
carries out all its holds.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._engines import is_deepspeed_engine, is_sharded, version_of
from modaldummy._errors import UnsupportedEngineError, first_few
from modaldummy._hold.trained_keys import check_not_capturing
from modaldummy._hold.wrapper_hold import WrapperHold, parameters_to_hold
from modaldummy._hold.zero_holder import ZeroHolder
from modaldummy._optimizers import parameters_of


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
        target: A weak reference to the optimizer.
        holds: One for each wrapper; a hold that has ended is dropped after the next step.
        loss_computed: Whether a held wrapper has computed a loss since gradients were last hidden.

    Raises:
        TypeError: The optimizer has no step hooks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.target = weakref.ref(optimizer, self._end_holds)
        self.holds: list[WrapperHold] = []
        self.loss_computed = False
        self._hidden: list[_HiddenGradient] = []
        self._others_had_gradients = False
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
        optimizer = self.target()
        if optimizer is not None:
            yield from parameters_of(optimizer)

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
        if self.loss_computed:
            self._depth = 0
        if self._depth == 0:
            check_not_capturing()
            self.restore_gradients()
            self._hide_gradients()
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
            self.restore_gradients()
            result = closure(*args, **kwargs)
            self._hide_gradients()
            return result

        return evaluate

    def _hide_gradients(self) -> None:
        to_hold = parameters_to_hold(self.holds, self.parameters())
        self._hidden = [
            _HiddenGradient(owned, owned.parameter.grad, version_of(owned.parameter))
            for owned in to_hold.values()
        ]
        for hidden in self._hidden:
            hidden.owned.parameter.grad = None
        self._others_had_gradients = self.has_gradients()
        self.loss_computed = False

    def before_loss(self) -> None:
        """Put hidden gradients back, for a step that raised."""
        self.loss_computed = True
        if not torch.compiler.is_compiling():
            self.restore_gradients()

    def restore_gradients(self) -> None:
        """Put hidden gradients back: after a step, in its closure, or later if the step raised."""
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
        self.restore_gradients()
        for hold in self.holds:
            hold.trained_keys.start_over()
        self.holds = [hold for hold in self.holds if not hold.ended]
        if self.loss_computed:
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


# Not an attribute of the optimizer, so that no copy and no checkpoint of it contains a holder. The
# step hooks of the optimizer keep its holder alive. A strong reference here would keep both alive
# for ever if the model refers to the optimizer, because the holder refers to the model.
_HOLDERS: weakref.WeakSet[Holder | ZeroHolder] = weakref.WeakSet()


def holder_of(target: Any) -> Holder | ZeroHolder:
    """The one holder of an optimizer or a DeepSpeed engine, made at the first call."""
    for holder in _HOLDERS:
        if holder.target() is target:
            return holder
    made = ZeroHolder(target) if is_deepspeed_engine(type(target)) else Holder(target)
    _HOLDERS.add(made)
    return made


def is_held(wrapper: DummyLossWrapper, target: Any) -> bool:
    """Whether an optimizer or engine holds the parameters of inactive modalities of the wrapper."""
    holders = [holder for holder in _HOLDERS if holder.target() is target]
    return any(
        hold.wrapper is wrapper and not hold.ended for holder in holders for hold in holder.holds
    )
