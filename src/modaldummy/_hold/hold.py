"""Keeps an optimizer from changing parameters that no batch has trained."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._engines import is_deepspeed_engine
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._group import check_group
from modaldummy._handles import Handle
from modaldummy._hold.holder import holder_of
from modaldummy._hold.wrapper_hold import WrapperHold
from modaldummy._hold.zero_holder import check_engine
from modaldummy._optimizers import parameter_ids_of, why_not_held


def hold_inactive(
    wrapper: DummyLossWrapper,
    optimizer: Optimizer | nn.Module,
    *,
    group: "dist.ProcessGroup | None" = None,
) -> "HoldHandle":
    """Keep the optimizer from changing parameters that no batch has trained.

    Adam turns a gradient of 1e-7 into an almost full step. After this call, ``optimizer.step()``
    skips every parameter whose keys of the map were inactive in all backward passes since the
    gradients were last cleared, on every rank. The value, the optimizer state and the step counter
    of a skipped parameter stay bit for bit as they were. Its gradient is the same after the step.

    >>> import torch
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

    A parameter that an active modality or the trunk shares is never held. Only losses that go
    through the wrapper count. A ``UserWarning`` says so if a held gradient is more than a dummy
    gradient. The how-to page on holding parameters covers special cases.

    DeepSpeed's ZeRO steps flat tensors of many parameters. With an engine of ZeRO-1, 2 or 3, values
    and state tensors of held parameters stay bit for bit as they were, also those of the master
    copy, but a ``step`` counter that they share with trained parameters advances. Give each
    modality a parameter group of its own: its counter is then held too, and nothing is copied.
    Dummy gradients count in the norm to which the engine clips, unless the scale is 0.0.

    Args:
        wrapper: The wrapper whose losses are trained.
        optimizer: A torch optimizer that skips parameters without a gradient: all of
            ``torch.optim`` except ``LBFGS``. If it steps another optimizer, pass that one. Or a
            DeepSpeed engine of ZeRO-1, 2 or 3, between two steps.
        group: The ranks that must agree; all ranks by default. All of them step equally often.
            Each step costs one all-reduce of one integer per key, and one more for each call of
            its closure.

    Returns:
        A handle. ``remove()``, or the end of its ``with`` block, ends the hold.

    Raises:
        TypeError: An argument has the wrong type, or the optimizer has no step hooks.
        ValueError: The optimizer or engine has no parameter of the map.
        UnsupportedEngineError: A copy of the optimizer changes copies of parameters that have no
            gradient, or fails, such as ``LBFGS`` and ``SGD`` with ``fused=True`` and momentum.
            The engine is of stage 0, its state is on NVMe, or its optimizer is an unknown one.
            From ``step()``: it changed a held parameter, computed a loss other than by its
            closure, or has lost all parameters of the map. From ``step()`` or a loss: a CUDA graph
            is being captured.
    """
    check_wrapper(wrapper, optimizer)
    check_group(group)
    if isinstance(optimizer, nn.Module) and is_deepspeed_engine(type(optimizer)):
        check_engine(wrapper, optimizer)
        return _handle(wrapper, optimizer, group)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {describe(optimizer)}. Call "
            "`hold_inactive` once for each optimizer. Under DeepSpeed's ZeRO pass the engine."
        )
    if parameter_ids_of(optimizer).isdisjoint(wrapper.parameters.all()):
        raise ValueError(
            f"`optimizer` ({type(optimizer).__name__}) has no parameter of the modalities "
            f"{', '.join(map(repr, wrapper.modalities))}. Pass the optimizer that has the model's "
            "own parameters, made after the model was moved or sharded. Under DeepSpeed's ZeRO "
            "pass the engine."
        )
    if reason := why_not_held(optimizer, wrapper.parameters.all()):
        raise UnsupportedEngineError(f"`optimizer` cannot be held: {reason}")
    return _handle(wrapper, optimizer, group)


def _handle(
    wrapper: DummyLossWrapper, target: Any, group: "dist.ProcessGroup | None"
) -> "HoldHandle":
    holder = holder_of(target)
    hold = WrapperHold(wrapper, holder, group)
    holder.holds.append(hold)
    return HoldHandle(hold, type(target).__name__)


class HoldHandle(Handle):
    """What ``hold_inactive`` returns. ``remove()``, or the end of a ``with`` block, ends the hold.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with hold_inactive(wrapper, optimizer) as handle:
    ...     wrapper.total(model["T1"](torch.ones(3, 4)).mean(), ["T1"]).backward()
    ...     optimizer.step()
    >>> handle.held
    ('dMRI.weight', 'dMRI.bias')
    >>> handle
    <HoldHandle of AdamW, removed>

    A copy of the handle, of the wrapper or of the optimizer holds nothing.
    """

    def __init__(self, hold: WrapperHold, target: str) -> None:
        super().__init__(hold.end, target)
        self._hold = hold

    @property
    def held(self) -> tuple[str, ...]:
        """Full names of the parameters that the last step held."""
        return self._hold.held

    def __getstate__(self) -> dict[str, Any]:
        # Removing a copy must not end the hold.
        return vars(self) | {"_removed": True}
