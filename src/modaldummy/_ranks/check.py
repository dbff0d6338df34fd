"""Checks before forward that ranks agree on their modalities, if their engine needs that."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._errors import RankDisagreementError, UnsupportedEngineError, first_few
from modaldummy._group import check_group, num_ranks, tensor_device
from modaldummy._ranks.conflicts import ZERO2_SCALE_NONE, find_conflicts

# The first byte that a rank sends. The others say which keys of the map are active.
_UNREADABLE, _READABLE = range(2)

# Rank to the keys that are active in its batch, in map order.
_ActiveKeys: TypeAlias = Mapping[int, tuple[ModalityKey, ...]]


def check_ranks(
    wrapper: DummyLossWrapper,
    batch: Any,
    *,
    model: nn.Module | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> None:
    """Raise on all ranks if they have different modalities and their engine does not support that.

    Call it before forward, on all ranks of ``group``. It does nothing if all ranks have the same
    modalities, or if their engine supports divergent ranks: DDP, ZeRO-1, and FSDP2 that shards only
    the whole model do.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> check_ranks(wrapper, {"T1": torch.ones(3, 4)})

    Only keys of the map whose parameters the engine shards have to agree. If forward runs every
    tower on every rank, pass ``wrapper.modalities`` as ``batch``.

    Args:
        wrapper: The wrapper whose map says which modalities own which parameters.
        batch: The batch or its metadata, in any form of ``active_modalities``.
        model: The module that training calls, if it is not the model of the wrapper: a DeepSpeed
            engine, or a larger model that FSDP2 shards.
        group: The ranks that have to agree; all ranks by default. A call gathers one byte per key
            of the map, and one more, from each rank. The host waits for it. A single rank only
            reads its batch.

    Raises:
        RankDisagreementError: On every rank, with the same text: ranks have different modalities
            under an engine that does not support it. Or another rank could not read its batch, or
            did not call ``check_ranks`` before the timeout of ``group``.
        BatchMetadataError: The batch of this rank does not say which modalities it contains.
        UnknownModalityError: The batch of this rank names a modality that is not in the map.
        UnsupportedEngineError: The scale is None and a modality is inactive on all ranks. ZeRO-2,
            and ZeRO-1 with ``overlap_comm``, would stop in backward.
        TypeError: ``wrapper``, ``model`` or ``group`` has the wrong type.
        ValueError: Ranks differ, and ``model`` shares no parameter with the model of the wrapper.
    """
    check_wrapper(wrapper)
    check_model(model)
    check_group(group)
    if num_ranks(group) == 1:
        wrapper.reader.read(batch)
        return
    keys = list(wrapper.parameters.paths)
    try:
        active = wrapper.parameters.active_keys(wrapper.reader.read(batch))
    except Exception:
        # The error of this rank says more than that another rank did not answer.
        with contextlib.suppress(RankDisagreementError):
            _gather(wrapper, [_UNREADABLE] + [0] * len(keys), group)
        raise
    rows = _gather(wrapper, [_READABLE] + [int(key in active) for key in keys], group)
    if failed := [rank for rank, row in rows.items() if row[0] == _UNREADABLE]:
        raise RankDisagreementError(
            f"The batch could not be read on {_text_of_ranks(failed)}. Look at the error there: it "
            "gives the reason."
        )
    active_keys = {rank: tuple(itertools.compress(keys, row[1:])) for rank, row in rows.items()}
    _check_conflicts(wrapper, model, active_keys)


def _gather(
    wrapper: DummyLossWrapper, row: list[int], group: "dist.ProcessGroup | None"
) -> dict[int, list[int]]:
    """The row of bytes that each rank of `group` sends, by rank."""
    parameter = next(wrapper.parameters.model.parameters())
    device = tensor_device(group, parameter.device)
    sent = torch.tensor(row, dtype=torch.uint8, device=device)
    received = sent.new_empty(num_ranks(group), len(row))
    try:
        dist.all_gather(list(received), sent, group=group)
        rows: list[list[int]] = received.tolist()
    except RuntimeError as error:
        raise RankDisagreementError(
            "Not all ranks called `check_ranks` before the timeout of their group. A rank has "
            "ended, hangs, or runs another part of the program. Look at what each rank printed "
            "last, and let all ranks call `check_ranks` equally often, before forward."
        ) from error
    return dict(zip(dist.get_process_group_ranks(group), rows, strict=True))


def _check_conflicts(
    wrapper: DummyLossWrapper, model: nn.Module | None, active_keys: _ActiveKeys
) -> None:
    """Raise if the engine does not support which keys are active on which ranks."""
    parameters = wrapper.parameters
    somewhere = set().union(*active_keys.values())
    everywhere = somewhere.intersection(*active_keys.values())
    inactive = [key for key in parameters.paths if key not in somewhere]
    differing = [key for key in parameters.paths if key in somewhere - everywhere]
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
        names = first_few((owned.name for owned in one.parameters), 3)
        concerned = f"This concerns {first_few(map(text_of, keys))} ({names})."
        problems.append(f"{one.conflict.message} {concerned} {one.conflict.remedy}")
    if problems:
        raise RankDisagreementError(
            f"Ranks have different modalities: {_text_of_active_keys(active_keys)}. "
            f"{' '.join(problems)}"
        )


def _text_of_active_keys(active_keys: _ActiveKeys) -> str:
    """Such as `ranks 0, 2: T1; rank 1: dMRI, rsfMRI; rank 3: nothing`."""
    ranks_of: dict[tuple[ModalityKey, ...], list[int]] = {}
    for rank, keys in active_keys.items():
        ranks_of.setdefault(keys, []).append(rank)
    parts = (
        f"{_text_of_ranks(ranks)}: {first_few(map(text_of, keys)) or 'nothing'}"
        for keys, ranks in ranks_of.items()
    )
    return first_few(parts, separator="; ")


def _text_of_ranks(ranks: Sequence[int]) -> str:
    """Such as `rank 3` or `ranks 0-15, 32`."""
    # Consecutive ranks have the same distance to their index.
    groups = itertools.groupby(enumerate(ranks), lambda item: item[1] - item[0])
    runs = [[rank for _, rank in group] for _, group in groups]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {first_few(words)}"
