"""Records how towers are called, and from where their shadows can take part in the graph."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._core.graph import leaves_of as graph_leaves
from modaldummy._core.graph import most_leaves, reached_nodes
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._engines import (
    apply_function,
    fsdp2_reshard_all,
    is_reentrant,
    module_buffers,
    running_checkpoint,
)
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._shadow.calls import Point, TowerCall, copied, is_floating, placement_of
from modaldummy._shadow.functions import Probe
from modaldummy._shadow.trees import leaves_of, replaced

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(eq=False)
class _Call:
    """A call of any module while a forward pass is recorded.

    Attributes:
        point: Which call it is.
        parent: The call around it.
        scope: The frame of the checkpoint around it, None without one.
        children: Calls of modules during this one.
        tower_call: What is recorded if it is a tower.
        probes: Nodes of its outputs, if it is a tower, else of its inputs, by their places.
        paths: Where in its arguments each of its inputs is.
    """

    point: Point
    parent: "_Call | None"
    scope: FrameType | None
    children: list["_Call"] = field(default_factory=list)
    tower_call: TowerCall | None = None
    probes: dict[int, Any] = field(default_factory=dict)
    paths: list[Any] = field(default_factory=list)

    def walk(self) -> Iterator["_Call"]:
        """This call and all calls during it, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.walk()


class Recorder:
    """Records forward passes of a model.

    Args:
        model: The model that training calls.
        towers: As from `towers_of`.

    Attributes:
        passes: The calls of towers in each forward pass, in order.
    """

    def __init__(self, model: nn.Module, towers: Mapping[nn.Module, set[ModalityKey]]) -> None:
        self._model = model
        self._towers = towers
        self._placements = {tower: placement_of(tower) for tower in towers}
        self._stack: list[_Call] = []
        self._counts: Counter[nn.Module] = Counter()
        self.passes: list[list[TowerCall]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes in the `with` block, which leave no trace in the model."""
        with ExitStack() as stack:
            stack.enter_context(without_trace(self._model))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._model.modules():
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(self._leave, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield
        fsdp2_reshard_all(self._model)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is self._model:
            self._stack.clear()  # an earlier forward pass may have failed
            self._counts.clear()
        parent = self._stack[-1] if self._stack else None
        call = _Call(Point(module, self._counts[module]), parent, running_checkpoint())
        tower = next((c for c in self._stack if c.tower_call is not None), None)
        self._stack.append(call)
        if tower is not None:
            self._check_inside(call, tower)
            return None
        self._counts[module] += 1
        if parent is not None:
            parent.children.append(call)
        if module in self._towers:
            _check_batch_norm(call, call)
            device, dtype = self._placements[module]
            call.tower_call = TowerCall(
                module,
                call.point.number,
                copied((args, kwargs), self._model),
                device,
                dtype,
                None if call.scope is None else is_reentrant(call.scope),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                autocast_dtype(device.type),
            )
            return None
        return None if parent is None else self._probed(call, (args, kwargs))

    def _leave(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._stack.pop()
        if call.tower_call is not None:
            num_leaves = _most_leaves((args, kwargs), output)
            call.tower_call = dataclasses.replace(call.tower_call, num_leaves=num_leaves)
            if call.tower_call.checkpoint is True:
                leaves = enumerate(leaf for _, leaf in leaves_of(output))
                call.probes = {place: None for place, leaf in leaves if is_floating(leaf)}
        elif not self._stack:
            self.passes.append(_tower_calls(call, output))
        else:
            return None
        return self._probed(call, output)

    def _probed(self, call: _Call, tree: Any) -> Any:
        """The tree; tensors with a graph go through a probe."""
        new: dict[int, Tensor] = {}
        for place, (path, leaf) in enumerate(leaves_of(tree)):
            call.paths.append(path)
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                if id(leaf) not in new:
                    new[id(leaf)] = apply_function(Probe, leaf)
                call.probes[place] = new[id(leaf)].grad_fn
        return replaced(tree, new)

    def _check_inside(self, call: _Call, tower: _Call) -> None:
        """Refuse a call inside a tower from which a shadow would go wrong."""
        _check_batch_norm(call, tower)
        keys = self._towers[tower.point.module]
        if extra := self._towers.get(call.point.module, set()) - keys:
            names = ", ".join(sorted(map(text_of, extra)))
            raise UnsupportedEngineError(
                f"{describe(call.point.module)}, a tower of {names}, runs inside "
                f"{describe(tower.point.module)}, a tower of another key. Give both to the same "
                "key."
            )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on devices of a type, None if it is off."""
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None


def _most_leaves(inputs: Any, outputs: Any) -> int:
    """The largest number of leaves of the graph that one node between inputs and outputs has."""
    before, after = (
        {leaf.grad_fn for _, leaf in leaves_of(tree) if isinstance(leaf, Tensor)}
        for tree in (inputs, outputs)
    )
    return most_leaves(reached_nodes(after - before, without=before))


def _check_batch_norm(call: _Call, tower: _Call) -> None:
    """Refuse batch norm in a tower that a shadow would change, on this rank or on others.

    Raises:
        UnsupportedEngineError: It is one in training mode, over ranks or inside a checkpoint.
    """
    module = call.point.module
    if not (isinstance(module, _BATCH_NORMS) and module.training):
        return
    remedy = "Call `eval()` on it, or use another norm, such as group norm."
    if isinstance(module, nn.SyncBatchNorm):
        raise UnsupportedEngineError(
            f"{describe(module)} in a tower averages over all ranks, also over recorded inputs. "
            f"{remedy}"
        )
    # A checkpoint around the whole tower is part of the shadow, which leaves no trace.
    if call.scope is not tower.scope and module.track_running_stats:
        raise UnsupportedEngineError(
            f"{describe(module)} runs inside a checkpoint in a tower. Its second run would count "
            f"recorded inputs in the running statistics. {remedy}"
        )


def losses_in(output: Any) -> list[Tensor]:
    """The tensor called `loss` in the output of a model, else all tensors."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = [leaf for _, leaf in leaves_of(output) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor is loss] or tensors


def _check_station(tower: _Call, station: _Call) -> None:
    """Refuse a tower and the call that follows it, or that is around it, in one checkpoint.

    Raises:
        UnsupportedEngineError: A shadow could not run in the same way.
    """
    if station.scope is None:
        return
    names = f"{describe(station.point.module)} and the tower {describe(tower.point.module)}"
    if station.scope is tower.scope:
        raise UnsupportedEngineError(
            f"One checkpoint contains {names}. Checkpoint each of them alone."
        )
    if is_reentrant(station.scope):
        raise UnsupportedEngineError(
            f"{names} follow each other, and the first runs inside a reentrant checkpoint. Pass "
            "`use_reentrant=False` to the checkpoint."
        )


def _tower_calls(root: _Call, output: Any) -> list[TowerCall]:
    """The calls of towers in a recorded forward pass, in order, with their stations and ties."""
    reached = reached_nodes([loss.grad_fn for loss in losses_in(output)])
    calls = list(root.walk())
    found = []
    for call in calls:
        if (tower_call := call.tower_call) is None or call.parent is None:
            continue
        places = [place for place, node in call.probes.items() if node in reached]
        if tower_call.checkpoint is True:  # its graph is made in backward
            places = list(call.probes)
        siblings = call.parent.children
        later = [c for c in siblings[siblings.index(call) :] if c.tower_call is None]
        _check_station(call, later[0] if later else call.parent)
        station = later[0].point if later else dataclasses.replace(call.parent.point, after=True)
        ties = _ties(calls, later[0], reached) if later else {}
        found.append(
            dataclasses.replace(tower_call, outputs=tuple(places), station=station, ties=ties)
        )
    return found


def _ties(
    calls: Sequence[_Call], station: _Call, reached: Collection[Any]
) -> dict[Point, list[Any]]:
    """Inputs of the trunk from the station on, up to one that does not come from towers alone."""
    of_towers = {node for call in calls if call.tower_call for node in call.probes.values()}
    ties: dict[Point, list[Any]] = {}
    for call in calls[calls.index(station) :]:
        for place, node in call.probes.items():
            if node in reached and call.tower_call is None:
                ties.setdefault(call.point, []).append(call.paths[place])
                if graph_leaves(reached_nodes([node], without=of_towers)) != set():
                    return ties
    return ties


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Calls of the module in the `with` block change neither its buffers nor the random state."""
    before = [(buffers, dict(buffers)) for buffers in map(module_buffers, module.modules())]
    # Not saved and copied back: batch norm does not raise version counters, and a module may put
    # another tensor in place of a buffer.
    for buffers, kept in before:
        buffers.update({name: b if b is None else b.clone() for name, b in kept.items()})
    try:
        with torch.random.fork_rng(_devices(module)):
            yield
    finally:
        for buffers, kept in before:
            buffers.clear()
            buffers.update(kept)


def _devices(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")})
