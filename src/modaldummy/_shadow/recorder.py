"""Records how towers are called, and from where their shadows can take part in the graph."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._core.graph import leaves_of, most_leaves, reached_nodes
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._engines import (
    apply_function,
    checkpoint_kind,
    fsdp2_reshard_all,
    module_buffers,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._shadow.calls import Point, TowerCall, copied, is_floating, placement_of
from modaldummy._shadow.functions import Probe

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(eq=False)
class _Call:
    """A call of any module while a forward pass is recorded.

    Attributes:
        point: Which call it is.
        parent: The call around it.
        checkpoint: As in `TowerCall`.
        children: Calls of modules during this one.
        tower_call: What is recorded if it is a tower.
        probes: Nodes of its outputs, if it is a tower, else of its inputs, by their places.
        paths: Where in its arguments each of its inputs is.
    """

    point: Point
    parent: "_Call | None"
    checkpoint: bool | None
    children: list["_Call"] = field(default_factory=list)
    tower_call: TowerCall | None = None
    probes: dict[int, Any] = field(default_factory=dict)
    paths: Sequence[Any] = ()

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
        if not self._stack:
            self._counts.clear()
        parent = self._stack[-1] if self._stack else None
        call = _Call(Point(module, self._counts[module]), parent, checkpoint_kind())
        self._counts[module] += 1
        around = next((c.point.module for c in self._stack if c.tower_call is not None), None)
        self._stack.append(call)
        if around is not None:
            _check_batch_norm(call)
            if extra := self._towers.get(module, set()) - self._towers[around]:
                names = ", ".join(sorted(map(text_of, extra)))
                raise UnsupportedEngineError(
                    f"{describe(module)}, a tower of {names}, runs inside {describe(around)}, a "
                    "tower of another key. Give both to the same key."
                )
            return None
        if parent is not None:
            parent.children.append(call)
        if module in self._towers:
            _check_batch_norm(call)
            call.tower_call = TowerCall(
                module,
                call.point.number,
                tree_map(lambda leaf: copied(leaf, self._model), (args, kwargs)),
                *self._placements[module],
                call.checkpoint,
                torch.is_grad_enabled(),
            )
            return None
        if parent is None:
            return None
        inputs, structure = tree_flatten_with_path((args, kwargs))
        call.paths = [path for path, _ in inputs]
        return tree_unflatten(self._probed(call, [leaf for _, leaf in inputs]), structure)

    def _leave(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._stack.pop()
        if call.tower_call is not None:
            leaves, structure = tree_flatten(output)
            num_leaves = _most_leaves(tree_flatten((args, kwargs))[0], leaves)
            call.tower_call = dataclasses.replace(call.tower_call, num_leaves=num_leaves)
            if call.tower_call.checkpoint is True:
                call.probes = {n: None for n, leaf in enumerate(leaves) if is_floating(leaf)}
            return tree_unflatten(self._probed(call, leaves), structure)
        if self._stack:
            return None
        self.passes.append(_tower_calls(call, output))
        leaves, structure = tree_flatten(output)
        return tree_unflatten(self._probed(call, leaves), structure)

    def _probed(self, call: _Call, leaves: list[Any]) -> list[Any]:
        """The leaves; tensors with a graph go through a probe."""
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                leaves[place] = apply_function(Probe, leaf)
                call.probes[place] = leaves[place].grad_fn
        return leaves


def _most_leaves(inputs: list[Any], outputs: list[Any]) -> int:
    """The largest number of leaves of the graph that one node between inputs and outputs has."""
    before, after = (
        {leaf.grad_fn for leaf in found if isinstance(leaf, Tensor)} for found in (inputs, outputs)
    )
    return most_leaves(reached_nodes(after - before, without=before))


def _check_batch_norm(call: _Call) -> None:
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
    if call.checkpoint is not None and module.track_running_stats:
        raise UnsupportedEngineError(
            f"{describe(module)} in a tower runs inside a checkpoint, whose second run would "
            f"count recorded inputs in its running statistics. {remedy}"
        )


def loss_places(output: Any) -> list[int]:
    """The place of the leaf called `loss` in the output of a model, else those of all tensors."""
    leaves, _ = tree_flatten(output)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [place for place in tensors if leaves[place] is loss] or tensors


def _tower_calls(root: _Call, output: Any) -> list[TowerCall]:
    """The calls of towers in a recorded forward pass, in order, with their stations and ties."""
    leaves, _ = tree_flatten(output)
    reached = reached_nodes([leaves[place].grad_fn for place in loss_places(output)])
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
        if later and later[0].checkpoint is True:
            raise UnsupportedEngineError(
                f"{describe(later[0].point.module)}, which runs after the tower "
                f"{describe(tower_call.tower)}, runs inside a reentrant checkpoint. Pass "
                "`use_reentrant=False` to the checkpoint."
            )
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
                if leaves_of(reached_nodes([node], without=of_towers)) != set():
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
