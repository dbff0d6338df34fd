"""Takes gradients away from an optimizer while it steps, and gives them back."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._engines import is_sharded, version_of
from modaldummy._errors import UnsupportedEngineError
from modaldummy._hold.window import Mark, check_not_capturing

if TYPE_CHECKING:
    from modaldummy._hold.hold import HoldHandle


class _Taken(NamedTuple):
    """The gradient of a held parameter while the optimizer steps."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor | None
    version: int


class Holder:
    """All handles of one optimizer, which hold together: between its step hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.handles: list[HoldHandle] = []
        self._taken: list[_Taken] = []
        self._others_had_gradients: bool
        self._depth = 0  # of calls of `step`: one that a subclass overrides may call its parent's
        # A loss was computed since the outermost step began, by other means than its closure.
        self.loss_seen = Mark()
        try:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        except AttributeError as error:
            raise TypeError(
                f"`optimizer` ({type(optimizer).__name__}) has no step hooks, as if it were one "
                "around another optimizer; pass the inner one, often `optimizer.optimizer`."
            ) from error

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that the optimizer has now; none once it is gone."""
        optimizer = self._optimizer()
        for group in [] if optimizer is None else optimizer.param_groups:
            yield from group["params"]

    def identities(self) -> set[int]:
        """`id` of each parameter that the optimizer has."""
        return set(map(id, self.parameters()))

    def has_gradients(self) -> bool:
        """Whether any parameter of the optimizer shows a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters())

    def is_cleared(self) -> bool:
        """Whether there is no gradient, and nothing keeps any elsewhere."""
        # FSDP2 keeps gradients that are not reduced yet to itself.
        return not self.has_gradients() and not any(
            is_sharded(parameter) for parameter in self.parameters()
        )

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.loss_seen.raised:  # a step that has not ended has raised
            self._depth = 0
        if self._depth == 0:
            check_not_capturing()
            self._take()
            self.loss_seen.raised = False
            if len(args) > 1 and callable(args[1]):
                args = (args[0], self._with_hold(args[1]), *args[2:])
            if callable(closure := kwargs.get("closure")):
                kwargs = kwargs | {"closure": self._with_hold(closure)}
        self._depth += 1
        return args, kwargs

    def _with_hold(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that sees all gradients, and leaves behind those that are not held."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._give_back()
            before = self.loss_seen.raised
            result = closure(*args, **kwargs)
            self.loss_seen.raised = before
            self._take()
            return result

        return evaluate

    def _take(self) -> None:
        """Take the gradients of all parameters to be held away."""
        outcomes = [handle.outcome(next(self.parameters()).device) for handle in self.handles]
        some = any(inactive for _, inactive in outcomes)
        untaught = self.identities().difference(*(known for known, _ in outcomes)) if some else ()
        held: dict[int, OwnedParameter] = {}
        for handle, (_, inactive) in zip(self.handles, outcomes, strict=True):
            held |= handle.to_hold(inactive, untaught)
        self._taken = [_Taken(name, p, p.grad, version_of(p)) for name, p, _ in held.values()]
        for taken in self._taken:
            taken.parameter.grad = None
        self._others_had_gradients = self.has_gradients()

    def _give_back(self) -> None:
        # A step may clear all gradients, or put new ones in the place of those that were taken.
        if not self._others_had_gradients or self.has_gradients():
            for taken in self._taken:
                if taken.parameter.grad is None:
                    taken.parameter.grad = taken.gradient
        self._taken = []

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._depth == 0:  # the hooks were registered during this step
            return
        self._depth -= 1
        if self._depth:
            return
        moved = [name for name, p, _, version in self._taken if version_of(p) != version]
        self._give_back()
        for handle in self.handles:
            handle.close_window()
        self.handles = [handle for handle in self.handles if not handle.removed]
        if self.loss_seen.raised:
            raise UnsupportedEngineError(
                f"{type(optimizer).__name__} computes losses in `step()` by other means than its "
                "`closure` argument, so that nothing could be held; hold the optimizer that it "
                "steps in turn, such as `optimizer.base_optimizer`, or `remove()` the handle."
            )
        if moved:
            raise UnsupportedEngineError(
                f"{type(optimizer).__name__}, or a hook of its `step()`, has changed {moved[0]!r} "
                f"and {len(moved) - 1} more parameters that had no gradient, so that they cannot "
                "be held; leave such parameters alone there, or `remove()` the handle."
            )


def holder_of(optimizer: Optimizer) -> Holder:
    """The one `Holder` of an optimizer."""
    if optimizer not in _HOLDERS:
        _HOLDERS[optimizer] = Holder(optimizer)
    return _HOLDERS[optimizer]


def is_held(wrapper: DummyLossWrapper, optimizer: Optimizer) -> bool:
    """Whether a handle holds what the wrapper leaves inactive in the steps of an optimizer."""
    holder = _HOLDERS.get(optimizer)
    handles = [] if holder is None else holder.handles
    return any(handle.wrapper is wrapper and not handle.removed for handle in handles)


# Beside the optimizers, so that no copy of one and no checkpoint contains a holder.
_HOLDERS: weakref.WeakKeyDictionary[Optimizer, Holder] = weakref.WeakKeyDictionary()
