"""What one wrapper wants an optimizer to hold."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, Step
from modaldummy._errors import UnsupportedEngineError
from modaldummy._group import num_ranks, tensor_device
from modaldummy._hold.dummy_gradients import HeldGradientCheck, may_be_dummy_gradient
from modaldummy._hold.trained_keys import TrainedKeys
from modaldummy._ownership import shared_with_trunk
from modaldummy._ranks.agreement import check_same_map, keys_in_order


class AnyHolder(Protocol):
    """Carries out all holds of one optimizer or engine.

    Attributes:
        holds: One for each wrapper; one that has ended is dropped after the next step.
    """

    holds: "list[WrapperHold]"

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that may be held."""

    def has_gradients(self) -> bool:
        """Whether any of the parameters has a gradient."""

    def is_cleared(self) -> bool:
        """Whether all gradients were cleared."""

    def before_loss(self) -> None:
        """A wrapper that holds computes a loss."""

    def restore_gradients(self) -> None:
        """Give hidden gradients back."""


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
        self, wrapper: DummyLossWrapper, holder: AnyHolder, group: "dist.ProcessGroup | None"
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
                "does. Call `remove()` on the handle. Under DeepSpeed's ZeRO, hold the engine: "
                "`hold_inactive(wrapper, engine)`."
            )
        self.held = tuple(parameter.name for parameter in to_hold.values())
        return to_hold

    def _observe(self, step: Step, loss: Tensor) -> None:
        self._holder.before_loss()
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


def parameters_to_hold(
    holds: Iterable[WrapperHold], parameters: Iterable[nn.Parameter]
) -> dict[int, OwnedParameter]:
    """Which parameters of an optimizer its holds want to be held in this step, by `id`."""
    optimized = {id(parameter): parameter.device for parameter in parameters}
    device = next(iter(optimized.values()))
    agreed = {hold: hold.agree(device) for hold in holds}
    candidates: set[int] = set()
    if not all(all(is_trained.values()) for is_trained in agreed.values()):
        # No hold may hold a parameter that another wrapper has trained.
        used = [hold.used_by(k for k in keys if keys[k]) for hold, keys in agreed.items()]
        candidates = set(optimized).difference(*used)
    to_hold: dict[int, OwnedParameter] = {}
    for hold, is_trained in agreed.items():
        to_hold |= hold.parameters_to_hold(is_trained, candidates)
    return to_hold
