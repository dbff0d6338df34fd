"""Ties the parameters of modalities to what a model returns, inside of DDP."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.graph import reached_leaves
from modaldummy._core.loss_function import with_item
from modaldummy._engines import check_ddp_reduces, ddps_around, forward_hooks, is_sharded
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._handles import Handle


def attach_to_outputs(wrapper: DummyLossWrapper, model: nn.Module) -> "AttachHandle":
    """Let DDP see the parameters of all modalities in what its forward returns.

    DDP with ``find_unused_parameters=True`` walks the graph of its outputs, takes what it does not
    find for unused, and stops at a dummy term that reaches such parameters after all. From now on,
    in gradient mode, the output has edges to all of them, by which backward hands them nothing. The
    dummy term and the training loop stay as they are: the loss has to go through the wrapper.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> model.forward = lambda batch: model["T1"](batch["T1"])
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> handle = attach_to_outputs(wrapper, model)  # or the DDP around it
    >>> batch = {"T1": torch.ones(3, 4)}
    >>> wrapper.total(model(batch).square().mean(), batch).backward()
    >>> model["dMRI"].bias.grad
    tensor([1.0000e-07, 1.0000e-07])

    Args:
        wrapper: Made with the module inside of DDP.
        model: What is called in training: DDP, a compiled DDP, or the module that DDP will wrap.
            It returns a tensor, or tuples, lists, dicts and dataclasses that hold tensors.

    Returns:
        A handle whose ``remove()``, or end as a context manager, lets the model go.

    Raises:
        TypeError: ``wrapper`` or ``model`` is of another kind.
        ValueError: ``model`` has none of the parameters of the map, or several DDPs that do.
        UnsupportedEngineError: The graph of DDP is static and the scale None. From forward: nothing
            that the model returned has a graph; parts of it run under reentrant checkpointing; or
            FSDP2 has sharded the parameters, which asks for nothing of this kind.

    Note:
        Backward visits each parameter once, so that the gradients are those that the loss gives.
        With ``scale=None``, DDP leaves the gradients of a modality that no rank had at a step as
        they are, None for instance, where it looks for unused parameters.
    """
    check_wrapper(wrapper)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {describe(model)}.")
    owned = wrapper.parameters.all()
    if owned.keys().isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"`model` ({type(model).__name__}) has none of the parameters of the modalities "
            f"{', '.join(map(repr, wrapper.modalities))}; pass the model that the wrapper was made "
            "with, or the DDP around it."
        )
    ddps = list(ddps_around(model.modules(), owned))
    for ddp in ddps:
        check_ddp_reduces(ddp, wrapper.scale)
    if len(ddps) > 1:
        raise ValueError(
            f"`model` ({type(model).__name__}) has {len(ddps)} DDP modules around parameters of "
            "the map; put one around the whole model, or pass find_unused_parameters=False."
        )
    return AttachHandle(wrapper, ddps[0].module if ddps else model)


def is_attached(wrapper: DummyLossWrapper, module: nn.Module) -> bool:
    """Whether `module`, which DDP calls, ties what `wrapper` adds to its outputs."""
    handles = (getattr(hook, "__self__", None) for hook in forward_hooks(module))
    return any(isinstance(h, AttachHandle) and h.wrapper is wrapper for h in handles)


class AttachHandle(Handle):
    """What ``attach_to_outputs`` returns; also a context manager, which removes it at its end.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> wrapper = DummyLossWrapper(model, {"T1": "0", "dMRI": "1"})
    >>> handle = attach_to_outputs(wrapper, model)
    >>> output = model(torch.ones(3, 4))
    >>> len(output.grad_fn.next_functions)  # the output itself, four parameters
    5
    >>> handle.remove()
    """

    def __init__(self, wrapper: DummyLossWrapper, module: nn.Module) -> None:
        self.wrapper = wrapper
        hook = module.register_forward_hook(self._after_forward)
        super().__init__(hook.remove, type(module).__name__)

    def _after_forward(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """`output` with edges to the parameters of the map; None to leave it as it is."""
        if not torch.is_grad_enabled():
            return None
        parameters = [p for _, p, _ in self.wrapper.parameters.split(()).parameters]
        if not parameters:
            return None
        if any(map(is_sharded, parameters)):
            raise UnsupportedEngineError(
                "`attach_to_outputs` is for DDP, and FSDP2 has sharded the parameters; `remove()` "
                "the handle, `wrapper.total` needs no help there."
            )
        tensors = list(_tensors(output))
        # Dynamo traces neither the walk nor what it looks for.
        if not torch.compiler.is_compiling() and reached_leaves(*tensors) is None:
            raise UnsupportedEngineError(
                f"{type(module).__name__} runs parts under reentrant checkpointing, which DDP and "
                "`attach_to_outputs` would each reduce at another time; pass use_reentrant=False "
                "to the checkpoint, or find_unused_parameters=False to DDP and `remove()` the "
                "handle."
            )
        if not tensors:
            raise UnsupportedEngineError(
                f"Nothing in what {type(module).__name__} returned, {describe(output)}, is a "
                "tensor with a graph that the dummy term could be attached to; let it return one, "
                "call it without gradient mode, or `remove()` the handle."
            )
        tied: Tensor = _Tie.apply(tensors[0], *parameters)  # type: ignore[no-untyped-call]
        return _replaced(output, tensors[0], tied)


class _Tie(torch.autograd.Function):
    """The same tensor, with edges to parameters, which get no gradient from it."""

    only_connects = True

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        # No view, which autograd would not let anyone change in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * ctx.num_parameters)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors with a graph in `output`, looked for where DDP does."""
    if isinstance(output, Tensor):
        yield from [output] if output.requires_grad else []
    for _, item in _items(output):
        yield from _tensors(item)


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of `output` with `new` where `old` comes first; None if it does not have it."""
    if output is old:
        return new
    for place, item in _items(output):
        if (changed := _replaced(item, old, new)) is not None:
            return with_item(output, place, changed)
    return None


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, dict):
        return container.items()
    if isinstance(container, (list, tuple)):
        return enumerate(container)
    if is_dataclass(container):
        return [(field.name, getattr(container, field.name)) for field in fields(container)]
    return ()
