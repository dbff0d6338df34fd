"""Checks before forward that ranks agree on their modalities, if their engine needs that."""

import contextlib
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._errors import RankDisagreementError, UnsupportedEngineError, first_few
from modaldummy._group import check_group, num_ranks
from modaldummy._ranks.agreement import (
    check_same_map,
    gather,
    keys_in_order,
    text_by_rank,
    text_of_ranks,
)
from modaldummy._ranks.conflicts import ZERO2_SCALE_NONE, find_conflicts

# The first byte that a rank sends. The others say which keys of the map are active.
_UNREADABLE, _READABLE = range(2)

_CALLER = "`check_ranks`"


def check_ranks(
    wrapper: DummyLossWrapper,
    batch: Any,
    *,
    model: nn.Module | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> None:
    """Raise on all ranks if they have different modalities and their engine does not support that.

    Call it before forward, on all ranks of ``group``. It does nothing if all ranks have the same
    modalities, or if their engine supports divergent ranks: DDP, ZeRO-1, and FSDP that shards only
    the whole model do.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> check_ranks(wrapper, {"T1": torch.ones(3, 4)})

    Only keys of the map whose parameters the engine shards have to agree. If forward runs every
    tower on every rank, pass ``wrapper.modalities`` as ``batch``.

    Args:
        wrapper: The wrapper whose map says which modalities own which parameters.
        batch: The batch or its metadata, in any form of ``active_modalities``.
        model: The module that training calls, if it is not the model of the wrapper: a DeepSpeed
            engine, or a larger model that FSDP shards.
        group: The ranks that have to agree; all ranks by default. A call gathers one byte per key
            of the map, and one more, from each rank. The host waits for it. The first call with a
            wrapper and a group also compares the maps. A single rank only reads its batch.

    Raises:
        RankDisagreementError: On every rank, with the same text: ranks have different modalities
            under an engine that does not support it, or maps with different keys or paths. Or
            another rank could not read its batch, or did not call ``check_ranks`` in time.
        BatchMetadataError: The batch of this rank does not say which modalities it contains.
        UnknownModalityError: The batch of this rank names a modality that is not in the map.
        UnsupportedEngineError: The scale is None and a modality is inactive on all ranks. ZeRO-2,
            and ZeRO-1 with ``overlap_comm``, would stop in backward.
        TypeError: ``wrapper``, ``model`` or ``group`` has the wrong type.
        ValueError: Ranks differ, and ``model`` shares no parameter with the model of the wrapper.
    """
    check_wrapper(wrapper, batch)
    check_model(model)
    check_group(group)
    if num_ranks(group) == 1:
        wrapper.reader.read(batch)
        return
    check_same_map(wrapper, group, _CALLER)
    keys = keys_in_order(wrapper.parameters.paths)
    try:
        active = set(wrapper.parameters.active_keys(wrapper.reader.read(batch)))
    except Exception:
        # The error of this rank says more than that another rank did not answer.
        with contextlib.suppress(RankDisagreementError):
            gather(wrapper, [_UNREADABLE] + [0] * len(keys), group, _CALLER)
        raise
    rows = gather(wrapper, [_READABLE] + [int(key in active) for key in keys], group, _CALLER)
    if failed := [rank for rank, row in rows.items() if row[0] == _UNREADABLE]:
        raise RankDisagreementError(
            f"The batch could not be read on {text_of_ranks(failed)}. Look at the error there: it "
            "gives the reason."
        )
    active_keys = {rank: list(itertools.compress(keys, row[1:])) for rank, row in rows.items()}
    _check_conflicts(wrapper, model, active_keys)


def _check_conflicts(
    wrapper: DummyLossWrapper,
    model: nn.Module | None,
    active_keys: Mapping[int, Collection[ModalityKey]],
) -> None:
    """Raise if the engine does not support which keys are active on which ranks."""
    parameters = wrapper.parameters
    somewhere = set().union(*active_keys.values())
    everywhere = somewhere.intersection(*active_keys.values())
    inactive = parameters.paths.keys() - somewhere
    differing = keys_in_order(somewhere - everywhere)
    if inactive and wrapper.scale is None:
        conflicts = find_conflicts(wrapper, called_model(wrapper, model), inactive)
        if any(one.conflict is ZERO2_SCALE_NONE for one in conflicts):
            raise UnsupportedEngineError(f"{ZERO2_SCALE_NONE.message} {ZERO2_SCALE_NONE.remedy}")
    if not differing:
        return
    problems = []
    for one in find_conflicts(wrapper, called_model(wrapper, model), differing):
        ids = {id(owned.parameter) for owned in one.parameters}
        keys = [key for key in differing if not ids.isdisjoint(parameters.of_keys([key]))]
        names = first_few(sorted(owned.name for owned in one.parameters), 3)
        concerned = f"This concerns {first_few(map(text_of, keys))} ({names})."
        problems.append(f"{one.conflict.message} {concerned} {one.conflict.remedy}")
    if problems:
        active = {rank: list(map(text_of, keys)) for rank, keys in active_keys.items()}
        raise RankDisagreementError(
            f"Ranks have different modalities: {text_by_rank(active)}. {' '.join(problems)}"
        )
