"""Agreement between ranks on what a batch holds, where their engine needs it."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._errors import RankDisagreementError, UnsupportedEngineError
from modaldummy._ranks.group import check_group, num_ranks, tensor_device
from modaldummy._ranks.limits import STOPPING
from modaldummy._ranks.sharding import limits

# Whether a rank could read its batch, told before which keys of the map are active in it.
_UNREADABLE, _READ = range(2)


def check_ranks(
    wrapper: DummyLossWrapper,
    batch: Any,
    *,
    model: nn.Module | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> None:
    """Raise on all ranks where they hold different modalities and their engine cannot bear that.

    Call it before forward, on all ranks of ``group``. Silent where ranks agree, and where they may
    differ: without an engine, under DDP, ZeRO-1, and FSDP2 for the whole model.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> check_ranks(wrapper, {"T1": torch.ones(3, 4)})

    A rank that cannot read its batch raises its own error, and all others say which rank that is,
    so that no rank is left to wait. What has to agree is whether a key of the map is active; keys
    without a parameter that the engine splits need not. Where forward runs every tower on every
    rank, pass ``wrapper.modalities`` as ``batch``.

    Args:
        wrapper: What knows which modalities own which parameters.
        batch: The batch or its metadata, in any form of ``active_modalities``.
        model: The model as it is called, if an engine is around that of the wrapper: a DeepSpeed
            engine, or FSDP2 for more than that.
        group: Ranks that have to agree; by default all, where ``torch.distributed`` is in use. A
            call gathers, from each rank, a byte for each key of the map and one more, and the host
            waits for it. On a single rank the batch is read, and nothing else is checked.

    Raises:
        RankDisagreementError: The same text on every rank: ranks differ where they must not, or
            some of them could not read their batch. Or a rank did not take part before the timeout
            of ``group``.
        BatchMetadataError: The batch of this rank does not say which modalities it holds.
        UnknownModalityError: The batch of this rank names a modality that the map does not have.
        UnsupportedEngineError: The scale is None and no rank holds a modality, at which ZeRO-2, and
            ZeRO-1 with ``overlap_comm``, would stop.
        TypeError: ``wrapper``, ``model`` or ``group`` is of another kind.
        ValueError: Where ranks differ: ``model`` shares no parameter with that of the wrapper.
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
        # The error of this rank says more than that another did not answer.
        with contextlib.suppress(RankDisagreementError):
            _gather(wrapper, [_UNREADABLE] + [0] * len(keys), group)
        raise
    told = _gather(wrapper, [_READ] + [int(key in active) for key in keys], group)
    ranks = dist.get_process_group_ranks(group)
    _check_all_read(ranks, [said[0] for said in told])
    marks = [said[1:] for said in told]
    _check_absent(wrapper, model, marks)
    _check_agreement(wrapper, model, ranks, marks)


def _gather(
    wrapper: DummyLossWrapper, said: list[int], group: "dist.ProcessGroup | None"
) -> list[list[int]]:
    """What each rank says, in the order of the ranks of `group`."""
    parameter = next(wrapper.parameters.model.parameters())
    device = tensor_device(group, parameter.device)
    own = torch.tensor(said, dtype=torch.uint8, device=device)
    everyone = own.new_empty(num_ranks(group), len(said))
    try:
        dist.all_gather(list(everyone), own, group=group)
        told: list[list[int]] = everyone.tolist()
    except RuntimeError as error:
        raise RankDisagreementError(
            "Not all ranks took part in `check_ranks` before the timeout of their group: one has "
            "ended, hangs, or is elsewhere in the program. See what each rank printed last, and "
            "have all of them call `check_ranks` equally often, before forward."
        ) from error
    return told


def _check_all_read(ranks: Sequence[int], marks: Sequence[int]) -> None:
    failed = [rank for rank, mark in zip(ranks, marks, strict=True) if mark == _UNREADABLE]
    if failed:
        raise RankDisagreementError(
            f"The batch could not be read on {_ranks(failed)}; look at the error there, which says "
            "why."
        )


def _check_absent(
    wrapper: DummyLossWrapper, model: nn.Module | None, marks: Sequence[Sequence[int]]
) -> None:
    """Raise where backward would stop at a modality that no rank holds, as it has no gradient."""
    if wrapper.scale is not None:
        return
    columns = zip(wrapper.parameters.paths, zip(*marks, strict=True), strict=True)
    absent = [key for key, column in columns if not any(column)]
    if absent and any(
        found.limit is STOPPING for found in limits(wrapper, called_model(wrapper, model), absent)
    ):
        raise UnsupportedEngineError(f"{STOPPING.message} {STOPPING.remedy}")


def _check_agreement(
    wrapper: DummyLossWrapper,
    model: nn.Module | None,
    ranks: Sequence[int],
    marks: Sequence[Sequence[int]],
) -> None:
    """Raise where ranks differ in a key that has a parameter which cannot bear it."""
    keys = list(wrapper.parameters.paths)
    columns = zip(keys, zip(*marks, strict=True), strict=True)
    differing = [key for key, column in columns if len(set(column)) > 1]
    if not differing:
        return
    problems = []
    for found in limits(wrapper, called_model(wrapper, model), differing):
        own = {id(parameter) for _, parameter, _ in found.parameters}
        split = [key for key in differing if not own.isdisjoint(wrapper.parameters.of_keys([key]))]
        names = _some((name for name, _, _ in found.parameters), 3)
        concerned = f"Concerned: {_some(map(text_of, split))} ({names})."
        problems.append(f"{found.limit.message} {concerned} {found.limit.remedy}")
    if problems:
        raise RankDisagreementError(
            f"Ranks hold different modalities: {_holdings(keys, ranks, marks)}. "
            f"{' '.join(problems)}"
        )


def _holdings(
    keys: Sequence[ModalityKey], ranks: Sequence[int], marks: Sequence[Sequence[int]]
) -> str:
    """Such as `ranks 0, 2: T1; rank 1: dMRI, rsfMRI; rank 3: nothing`."""
    members: dict[tuple[int, ...], list[int]] = {}
    for rank, own in zip(ranks, marks, strict=True):
        members.setdefault(tuple(own), []).append(rank)
    parts = []
    for own, holders in members.items():
        held = _some(text_of(key) for key, mark in zip(keys, own, strict=True) if mark)
        parts.append(f"{_ranks(holders)}: {held or 'nothing'}")
    return _some(parts, separator="; ")


def _ranks(ranks: Sequence[int]) -> str:
    """Such as `rank 3` or `ranks 0-15, 32`."""
    # Ranks in a row have the same distance to their place.
    rows = itertools.groupby(enumerate(ranks), lambda item: item[1] - item[0])
    runs = [[rank for _, rank in row] for _, row in rows]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {_some(words)}"


def _some(words: Iterable[str], number: int = 6, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    listed = list(words)
    more = [f"and {len(listed) - number} more"] if len(listed) > number else []
    return separator.join(listed[:number] + more)
