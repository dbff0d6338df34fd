"""Connects the output of a model to the parameters of all modalities, inside DDP."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.graph import reached_leaves
from modaldummy._core.loss_function import with_item
from modaldummy._engines import (
    check_ddps,
    ddps_around,
    forward_hooks,
    is_fsdp1_parameter,
    is_sharded,
)
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._handles import Handle


def attach_to_outputs(wrapper: DummyLossWrapper, model: nn.Module) -> "AttachHandle":
    """Connect the output of a model to the parameters of all modalities, so that DDP finds them.

    DDP with ``find_unused_parameters=True`` walks the graph of its output and marks every parameter
    that it does not find as unused. It stops if the dummy term then gives such a parameter a
    gradient. After this call, every output in gradient mode has an edge to each trainable parameter
    of the map, and backward sends no gradient along these edges. The training loop does not change.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> model.forward = lambda batch: model["T1"](batch["T1"])
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> handle = attach_to_outputs(wrapper, model)  # or the DDP around it
    >>> batch = {"T1": torch.ones(3, 4)}
    >>> wrapper.total(model(batch).square().mean(), batch).backward()
    >>> model["dMRI"].bias.grad
    tensor([1.0000e-07, 1.0000e-07])

    Args:
        wrapper: A wrapper of the module inside DDP.
        model: The DDP that training calls, also compiled, or the module that DDP will wrap. It
            returns a tensor, or tuples, lists, dicts and dataclasses that contain tensors.

    Returns:
        A handle. ``remove()``, or the end of its ``with`` block, ends the connection.

    Raises:
        TypeError: ``wrapper`` or ``model`` has the wrong type.
        ValueError: ``model`` has no parameter of the map, or contains several DDPs that have some.
        UnsupportedEngineError: DDP has a static graph and the scale is None. From forward: no
            output has a graph, the model uses reentrant checkpoints, or FSDP has sharded the
            parameters.

    Note:
        All gradients stay as they are without this call. With ``scale=None`` and
        ``find_unused_parameters=True``, DDP does not change the gradients of a modality that is
        inactive on all ranks.
    """
    check_wrapper(wrapper, model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {describe(model)}.")
    owned = wrapper.parameters.all()
    if owned.keys().isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"`model` ({type(model).__name__}) has none of the parameters of the modalities "
            f"{', '.join(map(repr, wrapper.modalities))}. Pass the model that the wrapper was made "
            "with, or the DDP around it."
        )
    ddps = ddps_around(model.modules(), owned)
    check_ddps(ddps, wrapper.scale, dummy_inside=True)
    if len(ddps) > 1:
        raise ValueError(
            f"`model` ({type(model).__name__}) contains {len(ddps)} DDP modules around parameters "
            "of the map. Put one DDP around the whole model, or pass find_unused_parameters=False."
        )
    module = ddps[0].module if ddps else model
    hook = module.register_forward_hook(_ConnectOutput(wrapper))
    return AttachHandle(hook.remove, type(module).__name__)


def is_attached(wrapper: DummyLossWrapper, module: nn.Module) -> bool:
    """Whether the output of `module`, which DDP calls, is connected to the map of `wrapper`."""
    hooks = (hook for hook in forward_hooks(module) if isinstance(hook, _ConnectOutput))
    return any(hook.wrapper is wrapper for hook in hooks)


class AttachHandle(Handle):
    """What ``attach_to_outputs`` returns; also a context manager, which removes it at its end.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> wrapper = DummyLossWrapper(model, {"T1": "0", "dMRI": "1"})
    >>> handle = attach_to_outputs(wrapper, model)
    >>> output = model(torch.ones(3, 4))
    >>> len(output.grad_fn.next_functions)  # the output itself and four parameters
    5
    >>> handle.remove()
    """


class _ConnectOutput:
    """A forward hook that connects the output to the trainable parameters of a map."""

    def __init__(self, wrapper: DummyLossWrapper) -> None:
        self.wrapper = wrapper

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """The output with edges to the parameters, or None to leave it as it is."""
        if not torch.is_grad_enabled():
            return None
        parameters = [
            owned.parameter for owned in self.wrapper.parameters.split(()).inactive_parameters
        ]
        if not parameters:
            return None
        if any(is_sharded(p) or is_fsdp1_parameter(p) for p in parameters):
            raise UnsupportedEngineError(
                "`attach_to_outputs` is for DDP, but FSDP has sharded the parameters. Call "
                "`remove()` on the handle: under FSDP `wrapper.total` works without it."
            )
        tensors = list(_tensors_with_graph(output))
        # Dynamo traces neither the walk nor reentrant checkpoints.
        if not torch.compiler.is_compiling() and reached_leaves(*tensors) is None:
            raise UnsupportedEngineError(
                f"{type(module).__name__} uses reentrant checkpoints. DDP and `attach_to_outputs` "
                "would then reduce the same parameters at different times. Pass "
                "use_reentrant=False to the checkpoint. Or pass find_unused_parameters=False to "
                "DDP, and call `remove()` on the handle."
            )
        if not tensors:
            raise UnsupportedEngineError(
                f"The output of {type(module).__name__} contains no tensor with a graph, got "
                f"{describe(output)}. Return a tensor with a graph, call the model in "
                "`torch.no_grad()`, or call `remove()` on the handle."
            )
        connected: Tensor = _Connect.apply(tensors[0], *parameters)  # type: ignore[no-untyped-call]
        return _replace_first(output, tensors[0], connected)


class _Connect(torch.autograd.Function):
    """The same tensor, with edges to parameters, which get no gradient from it."""

    only_connects = True

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        # Not a view of the input, which autograd would not let the caller change in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * ctx.num_parameters)


def _tensors_with_graph(output: Any) -> Iterator[Tensor]:
    """The tensors with a graph in `output`, in the containers that DDP searches."""
    if isinstance(output, Tensor):
        yield from [output] if output.requires_grad else []
    for _, item in _items(output):
        yield from _tensors_with_graph(item)


def _replace_first(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of `output` with `new` in place of the first `old`, or None if it is not in there."""
    if output is old:
        return new
    for key, item in _items(output):
        if (changed := _replace_first(item, old, new)) is not None:
            return with_item(output, key, changed)
    return None


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    """Keys, indices or field names of a container, with what is there."""
    if isinstance(container, dict):
        return container.items()
    if isinstance(container, (list, tuple)):
        return enumerate(container)
    if is_dataclass(container):
        return [(field.name, getattr(container, field.name)) for field in fields(container)]
    return ()
