"""Holds parameters while an optimizer steps: hides their gradients from it.

A `WrapperHold` says which parameters one wrapper wants to be held. The `Holder` of an optimizer
carries out all its holds.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from modaldummy._group import num_ranks, tensor_device
from modaldummy._hold.dummy_gradients import HeldGradientCheck, may_be_dummy_gradient
from modaldummy._hold.trained_keys import TrainedKeys, check_not_capturing
from modaldummy._optimizers import parameters_of
from modaldummy._ownership import shared_with_trunk
from modaldummy._ranks.agreement import check_same_map, keys_in_order


class WrapperHold:
    """The hold of one wrapper on one optimizer, behind a `HoldHandle`.

    Args:
        wrapper: Its losses say which keys are active.
        holder: The holder of the optimizer.
        group: Ranks that must agree; None for all.

    Attributes:
        wrapper: As given.
        held: Full names of the parameters that the last step held.
        ended: Whether `end` was called.
        trained_keys: What backward passes on this rank have trained.
    """

    def __init__(
        self, wrapper: DummyLossWrapper, holder: "Holder", group: "dist.ProcessGroup | None"
    ) -> None:
        self.wrapper = wrapper
        self.held: tuple[str, ...] = ()
        self.ended = False
        self._holder = holder
        self._group = group
        self._parameters = wrapper.parameters
        self._shared_with_trunk = shared_with_trunk(self._parameters)
        self._gradient_check = HeldGradientCheck()
        # Gradients that exist already may be those of any key.
        all_trained = holder.has_gradients()
        self.trained_keys = TrainedKeys(self._parameters.paths, holder.is_cleared, all_trained)
        self._unsubscribe = wrapper.subscribe(self._observe)

    def end(self) -> None:
        """Hold nothing from the next step on."""
        self.ended = True
        self._unsubscribe()
        self._holder.restore_gradients()

    def agree(self, device: torch.device) -> dict[ModalityKey, bool]:
        """Each key of the map to whether any rank has trained it.

        Empty if no rank ran a backward pass, because another loss may have trained anything then.

        Args:
            device: Device of the parameters.
        """
        trained = self.trained_keys.trained
        # A training loop may have put gradients aside and brought them back.
        if trained is not None and (put_aside := self.trained_keys.before_cleared - trained):
            unused = set(map(id, self._holder.parameters())) - self.used_by(trained)
            trained |= {key for key in put_aside if self._has_training_gradient(key, unused)}
        keys = keys_in_order(self._parameters.paths)
        # 0 without a backward pass, 1 for an untrained key, 2 for a trained one.
        states = [0 if trained is None else 1 + (key in trained) for key in keys]
        if num_ranks(self._group) > 1:
            check_same_map(self.wrapper, self._group, "`optimizer.step()` with a hold")
            tensor = torch.tensor(states, device=tensor_device(self._group, device))
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
            states = tensor.tolist()
        state_of = dict(zip(keys, states, strict=True))
        return {key: state_of[key] == 2 for key in self._parameters.paths if state_of[key]}

    def used_by(self, keys: Iterable[ModalityKey]) -> set[int]:
        """`id` of each parameter of the map that one of the keys owns or that the trunk shares."""
        return self._parameters.of_keys(keys).keys() | self._shared_with_trunk

    def parameters_to_hold(
        self, is_trained: Mapping[ModalityKey, bool], candidates: Collection[int]
    ) -> dict[int, OwnedParameter]:
        """Parameters to hold in this step, by `id`; also sets `held`.

        Args:
            is_trained: What `agree` returned for this step.
            candidates: `id` of each parameter of the optimizer that may be held.

        Raises:
            UnsupportedEngineError: The optimizer has no parameter of the map any more.
        """
        to_hold: dict[int, OwnedParameter] = {}
        untrained = [] if self.ended else [key for key in is_trained if not is_trained[key]]
        for key in untrained:
            owned = self._parameters.of_keys([key])
            held = {i: owned[i] for i in owned if i in candidates}
            self._gradient_check.check(key, held.values())
            to_hold |= {i: held[i] for i in held if i not in to_hold}
        present = map(id, self._holder.parameters())
        if untrained and not to_hold and self._parameters.all().keys().isdisjoint(present):
            raise UnsupportedEngineError(
                "The optimizer has no parameter of the modalities any more, so that none can be "
                "held: its parameters were replaced after `hold_inactive`, as DeepSpeed's ZeRO "
                "does. Call `remove()` on the handle, and use scale=0.0."
            )
        self.held = tuple(parameter.name for parameter in to_hold.values())
        return to_hold

    def _observe(self, step: Step, loss: Tensor) -> None:
        self._holder.loss_computed = True
        if not torch.compiler.is_compiling():
            self._holder.restore_gradients()
        self.trained_keys.observe_loss(step.active_keys, loss)

    def _has_training_gradient(self, key: ModalityKey, unused: Collection[int]) -> bool:
        """Whether parameters of `key` have gradients that are not dummy gradients.

        A gradient of one element could be either. If there are no others, it counts as training.

        Args:
            key: The key.
            unused: `id` of each parameter of this optimizer that no trained key uses. Others keep
                old gradients when this optimizer clears its own.
        """
        owned = self._parameters.of_keys([key])
        parameters = [owned[i].parameter for i in owned if i in unused]
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
        optimizer: A weak reference to the optimizer.
        holds: One for each wrapper; a hold that has ended is dropped after the next step.
        loss_computed: Whether a held wrapper has computed a loss since gradients were last hidden.

    Raises:
        TypeError: The optimizer has no step hooks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer, self._end_holds)
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
        optimizer = self.optimizer()
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
        agreed = {hold: hold.agree(next(self.parameters()).device) for hold in self.holds}
        candidates: set[int] = set()
        if not all(all(is_trained.values()) for is_trained in agreed.values()):
            # No hold may hold a parameter that another wrapper has trained.
            used = [hold.used_by(k for k in keys if keys[k]) for hold, keys in agreed.items()]
            candidates = set(map(id, self.parameters())).difference(*used)
        to_hold: dict[int, OwnedParameter] = {}
        for hold, is_trained in agreed.items():
            to_hold |= hold.parameters_to_hold(is_trained, candidates)
        self._hidden = [
            _HiddenGradient(owned, owned.parameter.grad, version_of(owned.parameter))
            for owned in to_hold.values()
        ]
        for hidden in self._hidden:
            hidden.owned.parameter.grad = None
        self._others_had_gradients = self.has_gradients()
        self.loss_computed = False

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
_HOLDERS: weakref.WeakSet[Holder] = weakref.WeakSet()


def holder_of(optimizer: Optimizer) -> Holder:
    """The one holder of an optimizer, made at the first call."""
    for holder in _HOLDERS:
        if holder.optimizer() is optimizer:
            return holder
    holder = Holder(optimizer)
    _HOLDERS.add(holder)
    return holder


def is_held(wrapper: DummyLossWrapper, optimizer: Optimizer) -> bool:
    """Whether the optimizer holds the parameters of the wrapper's inactive modalities."""
    holders = [holder for holder in _HOLDERS if holder.optimizer() is optimizer]
    return any(
        hold.wrapper is wrapper and not hold.ended for holder in holders for hold in holder.holds
    )
