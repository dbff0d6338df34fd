"""Holds parameters that DeepSpeed's ZeRO steps as parts of flat tensors."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy._core import DummyLossWrapper
from modaldummy._engines import (
    FlatParameter,
    version_of,
    zero_flat_parameters,
    zero_optimizer,
    zero_stage,
    zero_swaps_state,
)
from modaldummy._errors import UnsupportedEngineError
from modaldummy._hold.wrapper_hold import WrapperHold, parameters_to_hold


class _HeldRange(NamedTuple):
    """A part of a flat parameter that a step must not change.

    Attributes:
        flat: The parameter.
        part: Where the part is.
        values: By name, copies of the values that the part of the parameter, "", and of tensors of
            the optimizer state had before the step.
    """

    flat: Tensor
    part: slice
    values: dict[str, Tensor]


class _HiddenGradient(NamedTuple):
    """The gradient of a flat parameter, which is None while the optimizer steps.

    Attributes:
        flat: The parameter.
        gradient: Its gradient.
        version: How often its values had been changed in place before the step.
    """

    flat: Tensor
    gradient: Tensor | None
    version: int


class ZeroHolder:
    """Carries out all holds of one DeepSpeed engine, by hooks around the steps of its optimizer.

    ZeRO lets that optimizer step one flat tensor for each parameter group or sub-group, and then
    copies the values to the parameters of the module. The gradient of a flat tensor of which all
    parameters are held is None for the step. Where only some are held, their ranges of the flat
    tensor and of the optimizer state get their old values back after the step.

    Args:
        engine: The engine; the holder does not keep it alive.

    Attributes:
        target: A weak reference to the engine.
        holds: One for each wrapper.
    """

    def __init__(self, engine: Any) -> None:
        self.target = weakref.ref(engine)
        self.holds: list[WrapperHold] = []
        # `engine.global_steps` since when losses count.
        self._first_step = engine.global_steps
        # Whether it is decided what the step that runs holds; ZeRO-3 steps sub-group by sub-group.
        self._decided = False
        self._flats: dict[int, FlatParameter] = {}
        self._held: set[int] = set()
        self._ranges: list[_HeldRange] = []
        self._hidden: list[_HiddenGradient] = []
        inner: Optimizer = zero_optimizer(engine)
        inner.register_step_pre_hook(self._before_step)
        inner.register_step_post_hook(self._after_step)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the module that ZeRO steps; none once the engine is gone."""
        for each in self._flats.values() if self.target() is not None else ():
            yield from each.parameters

    def has_gradients(self) -> bool:
        """False: ZeRO takes gradients away as they arrive."""
        return False

    def is_cleared(self) -> bool:
        """False: ZeRO clears gradients at a step, and nobody else can."""
        return False

    def before_loss(self) -> None:
        """Forget what was trained before the last step, also if the engine has skipped it."""
        engine = self.target()
        if engine is not None and (self._decided or engine.global_steps != self._first_step):
            self._start_over(engine)

    def restore_gradients(self) -> None:
        """Give hidden gradients back."""
        for hidden in self._hidden:
            hidden.flat.grad = hidden.gradient
        self._hidden = []

    def _before_step(self, inner: Optimizer, *_: Any) -> None:
        engine = self.target()
        if engine is None:
            return
        if engine.global_steps != self._first_step:  # a step without a loss of the wrapper
            self._start_over(engine)
        if not self._decided:
            self._decided = True
            self._flats = {id(each.flat): each for each in zero_flat_parameters(engine)}
            self._held = set(parameters_to_hold(self.holds, self.parameters()))
            self.holds = [hold for hold in self.holds if not hold.ended]
        for group in inner.param_groups:
            for flat in group["params"]:
                self._hold(inner, self._flats[id(flat)])

    def _start_over(self, engine: Any) -> None:
        self._first_step = engine.global_steps
        self._decided = False
        for hold in self.holds:
            hold.trained_keys.start_over()

    def _hold(self, inner: Optimizer, flat: FlatParameter) -> None:
        if all(id(parameter) in self._held for parameter in flat.parameters):
            tensor = flat.flat
            self._hidden.append(_HiddenGradient(tensor, tensor.grad, version_of(tensor)))
            tensor.grad = None
            return
        tensors = _tensors_of(inner, flat.flat)
        for start, stop in joined(
            (r.start, r.stop) for r in flat.ranges if id(r.parameter) in self._held
        ):
            part = slice(start, stop)
            values = {name: tensor[part].clone() for name, tensor in tensors.items()}
            self._ranges.append(_HeldRange(flat.flat, part, values))

    def _after_step(self, inner: Optimizer, *_: Any) -> None:
        changed = any(version_of(hidden.flat) != hidden.version for hidden in self._hidden)
        self.restore_gradients()
        for held in self._ranges:
            for name, tensor in _tensors_of(inner, held.flat).items():
                # State that the first step of an optimizer has made starts with zeros.
                tensor[held.part] = held.values.get(name, 0)
        self._ranges = []
        if changed:
            raise UnsupportedEngineError(
                f"{type(inner).__name__} has changed parameters whose gradient is None during the "
                "step. Use an optimizer that skips them, or `remove()` the handle."
            )


def _tensors_of(inner: Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """A flat parameter, under "", and what the optimizer state has for each of its elements."""
    state = inner.state.get(flat, {}).items()
    return {"": flat.detach().view(-1)} | {
        name: tensor.view(-1)
        for name, tensor in state
        if isinstance(tensor, Tensor) and tensor.shape == flat.shape
    }


def check_engine(wrapper: DummyLossWrapper, engine: Any) -> None:
    """Refuse an engine whose parameters cannot be held.

    Raises:
        UnsupportedEngineError: It is of no stage of ZeRO, or keeps parameters in another way.
        ValueError: It has no parameter of the map.
    """
    if not 1 <= (stage := zero_stage(engine)) <= 3:
        raise UnsupportedEngineError(
            f"The engine is of ZeRO stage {stage}, whose optimizer has the parameters of the "
            "model. Pass `engine.optimizer`, or use stage 1, 2 or 3."
        )
    if zero_swaps_state(engine):
        raise UnsupportedEngineError(
            "ZeRO-3 keeps the optimizer state on NVMe, where `hold_inactive` cannot hold it. "
            "Offload it to the CPU: `offload_optimizer` with the device 'cpu'."
        )
    try:
        flats = zero_flat_parameters(engine)
    except AttributeError as error:
        raise UnsupportedEngineError(
            f"`hold_inactive` does not know where {type(engine.optimizer).__name__} keeps its "
            f"parameters: {error}. Use the optimizer of ZeRO-1, 2 or 3 as DeepSpeed 0.19 makes it."
        ) from error
    if not isinstance(inner := zero_optimizer(engine), Optimizer):
        raise UnsupportedEngineError(
            f"{type(inner).__name__} has no step hooks. Give the engine an optimizer of torch."
        )
    if not any(id(p) in wrapper.parameters.all() for flat in flats for p in flat.parameters):
        names = ", ".join(map(repr, wrapper.modalities))
        raise ValueError(f"The engine has no parameter of the modalities {names}.")


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, with neighbours made one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found
