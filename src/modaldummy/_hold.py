"""Keeps parameters that no batch has taught still in `optimizer.step()`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._modalities import ModalityKey
from modaldummy._paths import Located
from modaldummy._window import Window, check_not_capturing
from modaldummy._wrapper import DummyLossWrapper


def hold_inactive(
    wrapper: DummyLossWrapper, optimizer: Optimizer, *, group: "dist.ProcessGroup | None" = None
) -> "HoldHandle":
    """Keep the optimizer from moving parameters that no batch has taught.

    From now on, at each `optimizer.step()`, a parameter whose keys of the map were inactive in
    every backward pass since the gradients were last cleared, on every rank, is left exactly as
    it is: value, optimizer state and step counter, bit for bit, as if it had no gradient. The
    gradient is there before the step and after it. A parameter that something active shares, or
    that belongs to a module outside of the map too, is never held.

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
    None again before a backward pass: so after a step that `torch.amp.GradScaler` skipped.

    Several handles may share an optimizer or a wrapper: what one wrapper sees taught, no handle of
    the same optimizer holds. Where no loss of a wrapper was backwarded, nothing is held for it.

    Args:
        wrapper: What knows which modalities were active.
        optimizer: Any optimizer that leaves parameters alone whose gradient is None, as those of
            `torch.optim` do but for `LBFGS`.
        group: Ranks that have to agree, all of which step equally often; by default all, where
            `torch.distributed` is in use. Each step then costs one MAX reduction of an integer
            for each key of the map; a step with a closure one more for each call of the closure.

    Returns:
        A handle whose `remove()`, or end as a context manager, lets the optimizer go.

    Raises:
        TypeError: `wrapper`, `optimizer` or `group` is none, or an optimizer around another one.
        ValueError: The optimizer has no parameter of the map.
        UnsupportedEngineError: The optimizer is `LBFGS`, or `SGD` with `fused=True` and momentum.
            From `step()`: the optimizer has changed a parameter that had no gradient. From a loss
            and `step()`: a CUDA graph is being captured.
    """
    if not isinstance(wrapper, DummyLossWrapper):
        raise TypeError(f"`wrapper` must be a DummyLossWrapper, got {describe(wrapper)}.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {describe(optimizer)}; call "
            "`hold_inactive` once for each optimizer."
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` must be a torch.distributed.ProcessGroup that this rank belongs to, or None "
            f"for all ranks, got {describe(group)}."
        )
    _check_optimizer(optimizer)
    return HoldHandle(wrapper, _holder_of(optimizer), group)


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


class HoldHandle:
    """What `hold_inactive` returns; also a context manager, which removes it at its end.

    Attributes:
        held: Full names of the parameters that the last step held.
    """

    def __init__(
        self, wrapper: DummyLossWrapper, holder: "_Holder", group: "dist.ProcessGroup | None"
    ) -> None:
        self.held: tuple[str, ...] = ()
        self._wrapper = wrapper
        self._holder = holder
        self._group = group
        self._map = wrapper._map
        self._elsewhere = self._map.used_elsewhere()
        self._window = Window(list(self._map.paths), holder.is_cleared)
        if holder.identities().isdisjoint(self._map.owned(self._map.paths)):
            raise ValueError(
                f"`optimizer` ({type(holder.optimizer).__name__}) has no parameter of the "
                f"modalities {', '.join(map(repr, wrapper.modalities))}; pass the one that has "
                "the model's own parameters, made after the model was moved or sharded."
            )
        wrapper._observers.append(self._observe)
        holder.handles.append(self)

    def remove(self) -> None:
        """Let the optimizer go; a second call does nothing."""
        if self in self._holder.handles:
            self._holder.handles.remove(self)
            self._wrapper._observers.remove(self._observe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _observe(self, active: list[ModalityKey], loss: Tensor) -> None:
        self._holder.on_loss()
        self._window.watch(active, loss)

    def _outcome(self) -> tuple[set[int], dict[int, Located]]:
        """`id` of parameters that something taught, and parameters that an inactive key owns."""
        taught, inactive = self._window.outcome(self._group)
        # Of several handles any may hold what this one knows to be taught.
        known = self._map.owned(taught) if inactive or len(self._holder.handles) > 1 else {}
        return known.keys() | self._elsewhere.keys(), self._map.owned(inactive)


class _Taken(NamedTuple):
    """The gradient of a held parameter while the optimizer steps."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor | None
    version: int


class _Holder:
    """All handles of one optimizer, which hold together: between its step hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.handles: list[HoldHandle] = []
        self._taken: list[_Taken] = []
        self._others = False  # whether others than those had a gradient
        self._depth = 0  # of calls of `step`: one that a subclass overrides may call its parent's
        self._in_closure = False
        try:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        except AttributeError as error:
            raise TypeError(
                f"`optimizer` ({type(optimizer).__name__}) has no step hooks, as if it were one "
                "around another optimizer; pass the inner one, often `optimizer.optimizer`."
            ) from error

    def identities(self) -> set[int]:
        """`id` of each parameter that the optimizer has."""
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def is_cleared(self) -> bool:
        """Whether all gradients of the optimizer are None, and nothing keeps them elsewhere."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if any(parameter.grad is not None for parameter in params):
            return False
        # FSDP2 keeps gradients that are not reduced yet to itself.
        return not any(hasattr(parameter, "to_local") for parameter in params)

    def on_loss(self) -> None:
        """A loss is computed: if not by a closure, a step that has not ended has raised."""
        if self._depth and not self._in_closure:
            self._depth = 0

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1 or not self.handles:
            return None
        check_not_capturing()
        self._take()
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_hold(args[1]), *args[2:]), kwargs
        if callable(closure := kwargs.get("closure")):
            return args, kwargs | {"closure": self._with_hold(closure)}
        return None

    def _with_hold(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that sees all gradients, and leaves behind those that are not held."""

        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._give_back()
            self._in_closure = True
            try:
                result = closure(*args, **kwargs)
            finally:
                self._in_closure = False
            self._take()
            return result

        return evaluate

    def _take(self) -> None:
        """Take the gradients of all parameters to be held away."""
        outcomes = [handle._outcome() for handle in self.handles]
        idle = any(inactive for _, inactive in outcomes)
        free = self.identities().difference(*(taught for taught, _ in outcomes)) if idle else set()
        held: dict[int, Located] = {}
        for handle, (_, inactive) in zip(self.handles, outcomes, strict=True):
            own = {identity: inactive[identity] for identity in inactive if identity in free}
            handle.held = tuple(name for name, _, _ in own.values())
            held |= own
        self._taken = [_Taken(name, p, p.grad, p._version) for name, p, _ in held.values()]
        for taken in self._taken:
            taken.parameter.grad = None
        self._others = bool(self._taken) and not self.is_cleared()

    def _give_back(self) -> None:
        # An optimizer may clear all gradients in its step.
        if not (self._others and self.is_cleared()):
            for taken in self._taken:
                taken.parameter.grad = taken.gradient
        self._taken = []

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        moved = [name for name, p, _, version in self._taken if p._version != version]
        self._give_back()
        for handle in self.handles:
            handle._window.close()
        if moved:
            raise UnsupportedEngineError(
                f"{type(optimizer).__name__} has changed {moved[0]!r} and {len(moved) - 1} more "
                "parameters that had no gradient, so that they cannot be held; give them an "
                "optimizer that leaves such parameters alone, or `remove()` the handle."
            )


def _holder_of(optimizer: Optimizer) -> _Holder:
    """The one `_Holder` of an optimizer, kept where it is neither copied nor saved."""
    holder: _Holder | None = getattr(optimizer, "_modaldummy_holder", None)
    if holder is None:
        holder = _Holder(optimizer)
        optimizer._modaldummy_holder = holder  # type: ignore[attr-defined]
    return holder
