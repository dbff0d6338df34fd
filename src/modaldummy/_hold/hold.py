"""Keeps parameters that no batch has taught still in `optimizer.step()`."""

import weakref
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, Step
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._handles import Handle
from modaldummy._hold.holder import holder_of
from modaldummy._hold.lookout import Lookout, may_be_dummy
from modaldummy._hold.window import Window
from modaldummy._ranks.group import check_group


def hold_inactive(
    wrapper: DummyLossWrapper, optimizer: Optimizer, *, group: "dist.ProcessGroup | None" = None
) -> "HoldHandle":
    """Keep the optimizer from moving parameters that no batch has taught.

    From now on, at each ``optimizer.step()``, a parameter whose keys of the map were inactive in
    every backward pass since the gradients were last cleared, on every rank, is left exactly as
    it is: value, optimizer state and step counter, bit for bit, as if it had no gradient. The
    gradient is there before the step and after it. A parameter that something active shares, or
    that the model also has outside of the map, is never held.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> handle = hold_inactive(wrapper, optimizer)
    >>> loss = wrapper.total(model["T1"](torch.ones(3, 4)).square().mean(), ["T1"])
    >>> loss.backward()
    >>> optimizer.step()
    >>> handle.held
    ('dMRI.weight', 'dMRI.bias')

    The gradients count as cleared by a step that ran, and where all gradients of the optimizer are
    None again before a backward pass: so after a step that ``torch.amp.GradScaler`` skipped.

    Several handles may share an optimizer or a wrapper: what one wrapper sees taught, no handle of
    the same optimizer holds. A step before which no loss of the wrapper was backwarded holds
    nothing for it. Beside such a loss, gradients from elsewhere do not count: a modality that only
    a loss without the wrapper taught is held, and so is one whose name is misspelt in a batch. Of
    that a ``UserWarning`` tells, once for each key of the map: the values of its gradients are
    looked at in the first, second, fourth, eighth... step that holds it, which waits for the
    device.

    Args:
        wrapper: What knows which modalities were active.
        optimizer: Any optimizer that leaves parameters alone whose gradient is None, as those of
            ``torch.optim`` do but for ``LBFGS``. If it steps another one, as sharpness-aware
            optimizers do outside of ``step``, pass that.
        group: Ranks that have to agree, all of which step equally often; by default all, where
            ``torch.distributed`` is in use. Each step then costs one MAX reduction of an integer
            for each key of the map; a step with a closure one more for each call of the closure.

    Returns:
        A handle whose ``remove()``, or end as a context manager, lets the optimizer go.

    Raises:
        TypeError: ``wrapper``, ``optimizer`` or ``group`` is of another kind, or the optimizer is
            one around another one, without step hooks.
        ValueError: The optimizer has no parameter of the map.
        UnsupportedEngineError: The optimizer is ``LBFGS``, or ``SGD`` with ``fused=True`` and
            momentum. From ``step()``, once it is over: it has changed a held parameter, of which
            torch's version counter tells, but not if it wrote to ``parameter.data``; or it has
            computed a loss other than by its closure. From ``step()``: it has lost all parameters
            of the map to copies. From it or a loss: a CUDA graph is being captured.
    """
    check_wrapper(wrapper)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {describe(optimizer)}; call "
            "`hold_inactive` once for each optimizer, and not for those of DeepSpeed's ZeRO, which "
            "step copies of the parameters."
        )
    check_group(group)
    _check_optimizer(optimizer)
    return HoldHandle(wrapper, optimizer, group)


def _check_optimizer(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedEngineError(
            "LBFGS moves all of its parameters along one direction, also those without a "
            "gradient, so that none can be held; give the modalities an optimizer of another "
            "kind, or freeze those that are absent for good."
        )
    if isinstance(optimizer, torch.optim.SGD) and any(
        group["fused"] and group["momentum"] for group in optimizer.param_groups
    ):
        raise UnsupportedEngineError(
            "SGD with `fused=True` and momentum fails, with or without a hold, as soon as a "
            "parameter gets its first gradient later than the others (a TypeError of "
            "`torch._fused_sgd_`), as one does that has been held; pass `foreach=True`."
        )


class HoldHandle(Handle):
    """What ``hold_inactive`` returns; also a context manager, which removes it at its end.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with hold_inactive(wrapper, optimizer) as handle:
    ...     wrapper.total(model["T1"](torch.ones(3, 4)).mean(), ["T1"]).backward()
    ...     optimizer.step()
    >>> handle.held
    ('dMRI.weight', 'dMRI.bias')
    >>> handle.remove()

    A copy of it, of the wrapper or of the optimizer holds nothing.

    Attributes:
        held: Full names of the parameters that the last step held.
    """

    def __init__(
        self, wrapper: DummyLossWrapper, optimizer: Optimizer, group: "dist.ProcessGroup | None"
    ) -> None:
        holder = holder_of(optimizer)
        self.held: tuple[str, ...] = ()
        self._holder = holder
        self._group = group
        self._map = wrapper.parameters
        self._shared = self._map.shared_with_trunk()
        self._lookout = Lookout()
        # Gradients that are there already may be anyone's.
        known = self._map.paths if holder.has_gradients() else ()
        self._window = Window(list(self._map.paths), holder.is_cleared, known)
        if holder.identities().isdisjoint(self._map.all()):
            raise ValueError(
                f"`optimizer` ({type(optimizer).__name__}) has no parameter of the "
                f"modalities {', '.join(map(repr, wrapper.modalities))}; pass the one that has "
                "the model's own parameters, made after the model was moved or sharded; under "
                "DeepSpeed's ZeRO none has: use scale=0.0 there."
            )
        unsubscribe = wrapper.subscribe(self._observe)
        super().__init__(unsubscribe, type(optimizer).__name__)
        self.wrapper = wrapper
        holder.handles.append(self)
        # The wrapper may outlive the optimizer.
        weakref.finalize(optimizer, unsubscribe).atexit = False

    def _observe(self, step: Step, loss: Tensor) -> None:
        self._holder.loss_seen.raised = True
        self._window.watch(step.active_keys, loss)

    def close_window(self) -> None:
        """Start anew after a step."""
        self._window.close()

    def outcome(self, device: torch.device) -> tuple[set[int], list[ModalityKey]]:
        """`id` of parameters that something taught, and the keys that are inactive."""
        taught, inactive = self._window.outcome(self._has_learned, self._group, device)
        # Of several handles any may hold what this one knows to be taught.
        known = self._map.of_keys(taught) if inactive or len(self._holder.handles) > 1 else {}
        return known.keys() | self._shared, [] if self.removed else inactive

    def to_hold(
        self, inactive: list[ModalityKey], untaught: Collection[int]
    ) -> dict[int, OwnedParameter]:
        """Those of `untaught`, by `id`, that the inactive keys own; also noted as held."""
        located = self._map.of_keys(inactive)
        own = {identity: located[identity] for identity in located if identity in untaught}
        if inactive and not own:
            self._check_has_any()
        self.held = tuple(name for name, _, _ in own.values())
        for key in filter(self._lookout.is_due, inactive):
            self._lookout.look(key, (own[i] for i in self._map.of_keys([key]) if i in own))
        return own

    def _check_has_any(self) -> None:
        """Raise if none of the parameters that the optimizer has now is of the map."""
        if self._map.all().keys().isdisjoint(self._holder.identities()):
            raise UnsupportedEngineError(
                "The optimizer has no parameter of the modalities any more, so that none can be "
                "held: its parameters were replaced after `hold_inactive`, as DeepSpeed's ZeRO "
                "does; `remove()` the handle, and use scale=0.0."
            )

    def _has_learned(self, key: ModalityKey, taught: Collection[ModalityKey]) -> bool:
        """Whether gradients of parameters that are `key`'s alone are more than those of dummies."""
        own = self._map.of_keys([key])
        alone = own.keys() - self._map.of_keys(taught).keys() - self._shared
        gradients = [g for g in (own[identity][1].grad for identity in alone) if g is not None]
        telling = [gradient for gradient in gradients if gradient.numel() > 1]
        return bool(gradients) and not (telling and all(map(may_be_dummy, telling)))
