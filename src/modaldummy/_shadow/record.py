"""What forward passes with all modalities have shown, on this rank and on others."""

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch.distributed as dist
from torch import nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, ParameterMap, text_of
from modaldummy._engines import is_compiled
from modaldummy._errors import (
    RankDisagreementError,
    RecordError,
    UnsupportedEngineError,
    describe,
    first_few,
)
from modaldummy._ownership import owners_of
from modaldummy._ranks.agreement import gather_objects, is_same_text
from modaldummy._ranks.conflicts import fills_buckets_on_arrival, find_conflicts
from modaldummy._shadow.calls import Point, TowerCall

_CALLER = "the model for the first time with its shadow"

# The calls of towers in a forward pass, in order.
Pass = Sequence[TowerCall]


def towers_of(parameters: ParameterMap, model: nn.Module) -> dict[nn.Module, set[ModalityKey]]:
    """Modules that may be towers, and the keys that own all of their parameters.

    A `ParameterList` and a `ParameterDict` cannot be called, so their parameters have no tower.
    """
    owners = owners_of(parameters)
    towers = {}
    for module in model.modules():
        owned = [set(owners.get(id(parameter), ())) for parameter in module.parameters()]
        is_container = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        if owned and not is_container and (keys := set.intersection(*owned)):
            towers[module] = keys
    return towers


class Record:
    """The calls of towers that a rank with all modalities makes in a forward pass.

    Args:
        passes: Recorded forward passes, alike on all ranks.
        towers: As from `towers_of`.
        parameters: The map.

    Attributes:
        order: All calls, in the order of the model.
        calls: Those of each tower.
        at: Those of each station.
        points: All stations and ties.
        watched: All towers, and the modules of stations and ties.
        keys: As `towers`.

    Raises:
        RecordError: A key has no tower that was called, a tower was not called for each of its
            keys, towers were called in different ways or orders, or the loss does not depend on a
            tower that is trained.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        towers: Mapping[nn.Module, set[ModalityKey]],
        parameters: ParameterMap,
    ) -> None:
        order_of = {key: place for place, key in enumerate(parameters.paths)}
        rank_of = {tower: min(order_of[key] for key in keys) for tower, keys in towers.items()}
        self.order = merge(passes, rank_of)
        self.keys = towers
        self.calls: dict[nn.Module, list[TowerCall]] = {}
        self.at: dict[Point, list[TowerCall]] = {}
        for call in self.order:
            self.calls.setdefault(call.tower, []).append(call)
            self.at.setdefault(call.station, []).append(call)
        self.points = {*self.at, *(point for call in self.order for point in call.ties)}
        self.watched = {point.module for point in self.points} | self.calls.keys()
        self._check_keys(parameters)
        self._check_calls(parameters)

    def modules(self) -> set[nn.Module]:
        """All modules of the towers that were called."""
        return {module for tower in self.calls for module in tower.modules()}

    def _check_keys(self, parameters: ParameterMap) -> None:
        recorded = {key for tower in self.calls for key in self.keys[tower]}
        missing = [
            text_of(key)
            for key in parameters.paths.keys() - recorded
            if any(owned.module in self.keys for owned in parameters.of_keys([key]).values())
        ]
        if missing:
            raise RecordError(
                f"The record contains no call of a tower of {first_few(sorted(missing))}. Record a "
                "batch that contains every modality. A tower is a module that is called, not a "
                "`ModuleList` or a module of which only another method than `forward` is called."
            )

    def _check_calls(self, parameters: ParameterMap) -> None:
        for tower, own in self.calls.items():
            if len(own) < len(self.keys[tower]):
                keys = [text_of(key) for key in parameters.paths if key in self.keys[tower]]
                raise RecordError(
                    f"{describe(tower)} is the tower of {first_few(keys)} and was called "
                    f"{len(own)} times in the record. Record one batch that contains all of them."
                )
            is_trained = any(parameter.requires_grad for parameter in tower.parameters())
            if is_trained and not any(call.outputs for call in own):
                raise RecordError(
                    f"The recorded loss does not depend on {describe(tower)}, a tower that is "
                    "trained. Record in gradient mode, a batch whose loss depends on every "
                    "modality: in a causal model, media come before the labelled text."
                )


def merge(passes: Iterable[Pass], rank_of: Mapping[nn.Module, int]) -> list[TowerCall]:
    """The calls of all forward passes, each call number of a tower once, in one order.

    Args:
        passes: Forward passes; longer ones say more about how a tower is called.
        rank_of: Which of two towers comes first if no forward pass contains both.

    Raises:
        RecordError: There is no such order, or a tower was called in two ways.
    """
    calls: dict[Any, TowerCall] = {}
    before: dict[Any, set[Any]] = {}
    for recorded in sorted(passes, key=len, reverse=True):
        previous: set[Any] = set()
        for call in recorded:
            known = calls.setdefault((call.tower, call.number), call)
            if (known.checkpoint, known.has_grad) != (call.checkpoint, call.has_grad):
                raise RecordError(
                    f"{describe(call.tower)}, a tower, was recorded in two ways: inside a "
                    "checkpoint and outside of one, or with gradients and without. Record all "
                    "forward passes in the same mode, on every rank."
                )
            before.setdefault((call.tower, call.number), set()).update(previous)
            previous = {(call.tower, call.number)}
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError as error:
        towers = first_few({describe(tower): None for tower, _ in error.args[1]})
        raise RecordError(
            f"The recorded forward passes call towers in different orders: {towers}. Call towers "
            "in an order that does not depend on the batch, such as that of its keys."
        ) from None
    ready: list[Any] = []
    order = []
    while sorter:
        ready.extend(sorter.get_ready())
        first = min(ready, key=lambda identity: (rank_of[identity[0]], identity[1]))
        ready.remove(first)
        sorter.done(first)
        order.append(calls[first])
    return order


def passes_of_all_ranks(
    passes: Sequence[Pass],
    wrapper: DummyLossWrapper,
    model: nn.Module,
    group: "dist.ProcessGroup | None",
) -> Sequence[Pass]:
    """The recorded forward passes of all ranks, which exchange them only if they differ.

    Args:
        passes: Those of this rank.
        wrapper: The wrapper.
        model: The model, whose modules have the same names on all ranks.
        group: The ranks; each of them calls this function.

    Raises:
        UnsupportedEngineError: Records differ, and an argument cannot be sent to other ranks.
        RankDisagreementError: Another rank did not call this function in time.
    """
    names = {module: name for name, module in model.named_modules()}
    named = [[call.renamed(names) for call in recorded] for recorded in passes]
    if is_same_text(wrapper, str([[_text(call) for call in own] for own in named]), group, _CALLER):
        return passes
    try:
        received = gather_objects(named, group, _CALLER)
    except RankDisagreementError:
        raise
    except Exception as error:
        raise UnsupportedEngineError(
            "Ranks have recorded different forward passes, and an argument of a tower cannot be "
            f"sent to other ranks: {error}. Record the same examples on every rank."
        ) from error
    modules = {name: module for module, name in names.items()}
    return [[call.renamed(modules) for call in recorded] for own in received for recorded in own]


def _text(call: TowerCall) -> str:
    """What has to be the same on all ranks; not the arguments."""
    kind = call.checkpoint, call.has_grad, call.is_inference, call.autocast, call.num_leaves
    where = call.outputs, call.station, list(call.ties.items())
    return f"{call.tower} {call.number} {kind} {where}"


def check_order_of_gradients(record: Record, model: nn.Module) -> None:
    """Refuse towers whose gradients arrive in another order on each rank, if the engine needs one.

    Of the leaves that one node of a graph has, autograd visits the first two in their order. The
    order of more depends on how many other nodes wait to run.

    Raises:
        UnsupportedEngineError: There is such a tower.
    """
    towers = [
        call.tower
        for call in record.order
        if call.num_leaves > 2 or any(map(is_compiled, call.tower.modules()))
    ]
    if towers and fills_buckets_on_arrival(model):
        raise UnsupportedEngineError(
            f"One step of the backward pass of {describe(towers[0])}, a tower, gives three or more "
            "parameters and inputs their gradients, as that of an LSTM or of a compiled module "
            "does. ZeRO-2, ZeRO-3 and `overlap_comm` need the same order of gradients on all "
            "ranks, and that of these depends on the batch. Use FSDP or ZeRO-1 without "
            "`overlap_comm`, and pass the engine as `model`."
        )


def check_parameters_without_tower(wrapper: DummyLossWrapper, model: nn.Module) -> None:
    """Refuse parameters of the map that no shadowed tower contains, if the engine needs one.

    Raises:
        UnsupportedEngineError: There are such parameters.
    """
    for conflicting in find_conflicts(wrapper, model):
        names = sorted(owned.name for owned in conflicting.parameters)
        raise UnsupportedEngineError(
            f"No recorded call of a tower reaches {first_few(names)}. "
            f"{conflicting.conflict.message} Move these parameters into a module that is called "
            "only with their modality, or leave them out of the map."
        )
