"""What ranks tell each other: first that their maps agree, then one number for each key."""

import hashlib
import itertools
import json
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, modalities_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._errors import RankDisagreementError, first_few
from modaldummy._group import num_ranks, tensor_device

# The groups in which the maps of a wrapper are known to agree. All ranks of a group compare them in
# the same call, so all or none of them have an entry.
_AGREED: weakref.WeakKeyDictionary[DummyLossWrapper, weakref.WeakSet[Any]]
_AGREED = weakref.WeakKeyDictionary()


def keys_in_order(keys: Collection[ModalityKey]) -> list[ModalityKey]:
    """The keys in an order that is the same on all ranks, even if a `set` made the map."""
    return sorted(keys, key=lambda key: sorted(modalities_of(key)))


def check_same_map(
    wrapper: DummyLossWrapper, group: "dist.ProcessGroup | None", caller: str
) -> None:
    """Compare the keys and paths of the map over ranks, once for each wrapper and group.

    Args:
        wrapper: The wrapper with the map.
        group: The ranks that compare their maps, all by default; each calls this function.
        caller: What the user called, for the error.

    Raises:
        RankDisagreementError: On every rank, with the same text: the maps differ.
    """
    agreed = _AGREED.setdefault(wrapper, weakref.WeakSet())
    if (key := group or dist.group.WORLD) in agreed:
        return
    paths = {
        "-".join(sorted(modalities_of(key))): sorted(map(strip_wrappers, paths))
        for key, paths in wrapper.parameters.paths.items()
    }
    text = json.dumps(paths, sort_keys=True)
    if not is_same_text(wrapper, text, group, caller):
        data = text.encode()
        lengths = gather(wrapper, len(data).to_bytes(8), group, caller)
        length = max(int.from_bytes(row) for row in lengths.values())
        texts = gather(wrapper, data.ljust(length), group, caller)
        raise _disagreement({rank: json.loads(bytes(row)) for rank, row in texts.items()})
    agreed.add(key)


def is_same_text(
    wrapper: DummyLossWrapper, text: str, group: "dist.ProcessGroup | None", caller: str
) -> bool:
    """Whether all ranks of a group have this text, by a digest; a single rank gathers nothing."""
    if num_ranks(group) == 1:
        return True
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return len(set(map(bytes, gather(wrapper, digest, group, caller).values()))) == 1


def gather(
    wrapper: DummyLossWrapper, row: Sequence[int], group: "dist.ProcessGroup | None", caller: str
) -> dict[int, list[int]]:
    """The bytes that each rank of `group` sends, by rank; all rows have the same length.

    Raises:
        RankDisagreementError: Another rank did not send any in time.
    """
    parameter = next(wrapper.parameters.model.parameters())
    device = tensor_device(group, parameter.device)
    sent = torch.tensor(list(row), dtype=torch.uint8, device=device)
    received = sent.new_empty(num_ranks(group), len(row))
    with _in_time(caller):
        dist.all_gather(list(received), sent, group=group)
        rows: list[list[int]] = received.tolist()
    return dict(zip(dist.get_process_group_ranks(group), rows, strict=True))


def gather_objects(value: Any, group: "dist.ProcessGroup | None", caller: str) -> list[Any]:
    """What each rank of `group` sends, in the order of the ranks, as Python objects.

    Raises:
        RankDisagreementError: Another rank did not send any in time.
    """
    values = [None] * num_ranks(group)
    with _in_time(caller):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def _in_time(caller: str) -> Iterator[None]:
    """Say what to look for if another rank does not take part in a collective."""
    try:
        yield
    except RuntimeError as error:
        raise RankDisagreementError(
            f"Not all ranks called {caller} before the timeout of their group. A rank has ended, "
            "hangs, or runs another part of the program. Look at what each rank printed last, and "
            f"let all ranks call {caller} equally often."
        ) from error


def text_by_rank(words: Mapping[int, Sequence[str]]) -> str:
    """Such as `ranks 0, 2: T1; rank 1: dMRI, rsfMRI; rank 3: nothing`."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, said in words.items():
        ranks_of.setdefault(tuple(said), []).append(rank)
    parts = (
        f"{text_of_ranks(ranks)}: {first_few(said) or 'nothing'}"
        for said, ranks in ranks_of.items()
    )
    return first_few(parts, separator="; ")


def text_of_ranks(ranks: Sequence[int]) -> str:
    """Such as `rank 3` or `ranks 0-15, 32`."""
    # Consecutive ranks have the same distance to their index.
    groups = itertools.groupby(enumerate(ranks), lambda item: item[1] - item[0])
    runs = [[rank for _, rank in group] for _, group in groups]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {first_few(words)}"


def _disagreement(maps: Mapping[int, Mapping[str, list[str]]]) -> RankDisagreementError:
    keys = sorted(set().union(*maps.values()))
    differing = [key for key in keys if len({str(own.get(key)) for own in maps.values()}) > 1]
    owned = text_by_rank({rank: own.get(differing[0], []) for rank, own in maps.items()})
    return RankDisagreementError(
        f"`modality_param_map` differs among ranks in {first_few(differing)}. The paths of "
        f"{differing[0]} are on {owned}. Give every rank the same keys and paths. If only some "
        "ranks share this model, pass them as `group=`."
    )
