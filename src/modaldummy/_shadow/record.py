"""Records how towers are called, and from where their shadows can take part in the graph."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modaldummy._core.graph import leaves_of, reached_nodes
from modaldummy._core.parameter_map import ModalityKey, ParameterMap, text_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._engines import (
    apply_function,
    checkpoint_kind,
    fsdp2_reshard_all,
    module_buffers,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)
from modaldummy._errors import RecordError, UnsupportedEngineError, describe, first_few
from modaldummy._ownership import owners_of
from modaldummy._shadow.functions import Probe


@dataclass(frozen=True)
class Point:
    """A moment of a forward pass: before or after the n-th call of a module.

    Attributes:
        module: The module.
        number: How often it was called before in this forward pass.
        after: Whether the call has ended.
    """

    module: nn.Module
    number: int
    after: bool = False

    def moved(self, outer: Mapping[nn.Module, nn.Module]) -> "Point":
        """The same with what wraps the module now."""
        return dataclasses.replace(self, module=outer.get(self.module, self.module))


@dataclass(eq=False)
class TowerCall:
    """A recorded call of a tower.

    Attributes:
        tower: The module.
        leaves: Its arguments, detached, as leaves of a tree.
        structure: The structure of that tree.
        checkpoint: `use_reentrant` of the checkpoint around it, None without one.
        has_grad: Whether gradients were enabled.
        outputs: Places of its output tensors that the loss depends on.
        station: When the tower has run at the latest.
        ties: Points from the station on at which tensors that the loss depends on go into modules
            of the trunk, with their paths among the arguments there. The first that a forward pass
            has is tied, else the output of the model.
    """

    tower: nn.Module
    leaves: list[Any]
    structure: Any
    checkpoint: bool | None
    has_grad: bool
    outputs: tuple[int, ...] = ()
    station: Point = field(init=False)
    ties: dict[Point, list[Any]] = field(default_factory=dict)

    def move(self, outer: Mapping[nn.Module, nn.Module]) -> None:
        """Go from modules to what wraps them now."""
        self.tower = outer.get(self.tower, self.tower)
        self.station = self.station.moved(outer)
        self.ties = {point.moved(outer): paths for point, paths in self.ties.items()}

    def arguments(self, model: nn.Module) -> Any:
        """Positional and keyword arguments for another call."""
        return tree_unflatten([_copied(leaf, model) for leaf in self.leaves], self.structure)

    def text(self, model: nn.Module) -> str:
        """What has to be the same on all ranks."""
        names = {module: strip_wrappers(name) for name, module in model.named_modules()}
        at = f"{names[self.station.module]} {self.station.number} {self.station.after}"
        ties = [(names[point.module], point.number, paths) for point, paths in self.ties.items()]
        return f"{names[self.tower]} {at} {self.checkpoint} {self.has_grad} {self.outputs} {ties}"


def is_floating(leaf: Any) -> bool:
    """Whether a leaf of a tree is a tensor that may need a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


class _CopiesGraphless(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that have a graph, without it."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo.setdefault(id(tensor), copied)


def _copied(leaf: Any, model: nn.Module) -> Any:
    """A copy of an argument, without a graph. A call may change it: a cache grows by each call."""
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    kept = {id(module): module for module in model.modules()}
    try:
        with _CopiesGraphless():
            return copy.deepcopy(leaf, kept)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedEngineError(
            f"A tower is called with {describe(leaf)}, which cannot be copied: {error}. Keep it in "
            "the tower, or pass tensors and plain values in its place."
        ) from error


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


def towers_of(parameters: ParameterMap, model: nn.Module) -> dict[nn.Module, set[ModalityKey]]:
    """Modules all of whose parameters belong to the same keys, and these keys."""
    owners = owners_of(parameters)
    towers = {}
    for module in model.modules():
        owned = [set(owners.get(id(parameter), ())) for parameter in module.parameters()]
        if owned and (keys := set.intersection(*owned)):
            towers[module] = keys
    return towers


class Recorder:
    """Records forward passes of a model.

    Args:
        model: The model that training calls.
        parameters: The map.

    Attributes:
        towers: Modules that may be towers, and the keys that own all of their parameters.
        passes: The calls of towers in each forward pass, in order.
    """

    def __init__(self, model: nn.Module, parameters: ParameterMap) -> None:
        self._model = model
        self.towers = towers_of(parameters, model)
        self._stack: list[_Call] = []
        self._counts: Counter[nn.Module] = Counter()
        self.passes: list[list[TowerCall]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes in the `with` block, which leave no trace in the model."""
        with ExitStack() as stack:
            stack.enter_context(without_trace(self._model))
            for module in self._model.modules():
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(self._leave)
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
            if extra := self.towers.get(module, set()) - self.towers[around]:
                names = ", ".join(sorted(map(text_of, extra)))
                raise UnsupportedEngineError(
                    f"{describe(module)}, a tower of {names}, runs inside {describe(around)}, a "
                    "tower of another key. Give both to the same key."
                )
            return None
        if parent is not None:
            parent.children.append(call)
        inputs, structure = tree_flatten_with_path((args, kwargs))
        call.paths, leaves = [path for path, _ in inputs], [leaf for _, leaf in inputs]
        if module in self.towers:
            call.tower_call = TowerCall(
                module,
                [_copied(leaf, self._model) for leaf in leaves],
                structure,
                call.checkpoint,
                torch.is_grad_enabled(),
            )
            return None
        return tree_unflatten(self._probed(call, leaves), structure) if parent else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self._stack.pop()
        if call.tower_call is not None:
            leaves, structure = tree_flatten(output)
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


def _tower_calls(root: _Call, output: Any) -> list[TowerCall]:
    """The calls of towers in a recorded forward pass, in order, with their stations and ties."""
    leaves, _ = tree_flatten(output)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    results = [loss] if loss is not None else [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    reached = reached_nodes([result.grad_fn for result in results])
    calls = list(root.walk())
    found = []
    for call in calls:
        if (tower_call := call.tower_call) is None or call.parent is None:
            continue
        places = [place for place, node in call.probes.items() if node in reached]
        if tower_call.checkpoint is True:  # its graph is made in backward
            places = list(call.probes)
        tower_call.outputs = tuple(places)
        siblings = call.parent.children
        later = [c for c in siblings[siblings.index(call) :] if c.tower_call is None]
        if later and later[0].checkpoint is True:
            raise UnsupportedEngineError(
                f"{describe(later[0].point.module)}, which runs after the tower "
                f"{describe(tower_call.tower)}, runs inside a reentrant checkpoint. Pass "
                "`use_reentrant=False` to the checkpoint."
            )
        if later:
            tower_call.station = later[0].point
            tower_call.ties = _ties(calls, later[0], reached)
        else:
            tower_call.station = Point(call.parent.point.module, call.parent.point.number, True)
        found.append(tower_call)
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


def merge(passes: Sequence[Sequence[TowerCall]]) -> list[TowerCall]:
    """The calls of all recorded passes in one order, each call number of a tower once.

    A call that earlier passes lack goes before the next one that they have. Ranks that run other
    towers for real then call all of them in the order of the model.
    """
    order: list[TowerCall] = []
    for recorded in sorted(passes, key=len, reverse=True):  # long ones say most about the order
        known: dict[tuple[nn.Module, int], int] = {}
        counts: Counter[nn.Module] = Counter()
        for place, call in enumerate(order):
            known[call.tower, counts[call.tower]] = place
            counts[call.tower] += 1
        remaining = Counter(call.tower for call in recorded)
        place = len(order)
        for call in reversed(recorded):
            remaining[call.tower] -= 1
            found = known.get((call.tower, remaining[call.tower]))
            if found is None:
                order.insert(place, call)
            else:
                place = found
    return order


def check_record(
    parameters: ParameterMap,
    towers: Mapping[nn.Module, Collection[ModalityKey]],
    calls: Mapping[nn.Module, Sequence[TowerCall]],
) -> None:
    """Refuse a record from which a shadow would go wrong.

    Args:
        parameters: The map.
        towers: As in `Recorder`.
        calls: The recorded calls of each tower.

    Raises:
        RecordError: A key has no tower that was called, a tower was not called for each of its
            keys, or the loss does not depend on a tower that is trained.
    """
    recorded = {key for tower in calls for key in towers[tower]}
    if missing := [text_of(key) for key in parameters.paths if key not in recorded]:
        raise RecordError(
            f"The record contains no call of a tower of {first_few(missing)}. Record a batch that "
            "contains every modality. A tower is a module that is called, not a `ModuleList` or a "
            "module of which only another method than `forward` is called."
        )
    for tower, own in calls.items():
        if len(own) < len(towers[tower]):
            keys = first_few(text_of(key) for key in parameters.paths if key in towers[tower])
            raise RecordError(
                f"{describe(tower)} is the tower of {keys} and was called {len(own)} times in the "
                "record. Record one batch that contains all of them."
            )
        if any(p.requires_grad for p in tower.parameters()) and not any(c.outputs for c in own):
            raise RecordError(
                f"The recorded loss does not depend on {describe(tower)}, a tower that is trained. "
                "Record in gradient mode, a batch whose loss depends on every modality: in a "
                "causal model, media come before the labelled text."
            )


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
