"""Batches that nobody meant: good ones in which something is another, and anything, nested."""

import itertools
import math
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable
from random import Random
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from modaldummy._core.batch import EXPLICIT_KEYS
from tools.fuzz_values import (
    LEAVES,
    STRINGS,
    WEIGHTS,
    AttrDict,
    Colour,
    Column,
    Keyed,
    Modality,
    Name,
    NAType,
    Nulls,
    Pair,
    Record,
    Scalar,
    Scans,
)

KNOWN: list[tuple[str, ...]] = [
    ("T1", "rsfMRI", "dMRI"),
    ("T1", "T1w", "T10"),
    ("T1",),
    (Modality.T1, Modality.DMRI),
    ("", "é", "\ud800", "a" * 500),
    ("modality", "modalities"),
    (),
]


def make(random: Random) -> tuple[Any, tuple[str, ...]]:
    """A batch, and the modalities that are known; half of the batches were nearly good."""
    known = random.choice(KNOWN)
    if random.random() < 0.5:
        return value(random, random.choice([0, 1, 2, 3, 4, 20])), known
    batch = _meant(random, known)
    if random.random() < 0.7:
        other = value(random, random.choice([0, 0, 1, 2]))
        if isinstance(batch, dict):
            batch[_key(random)] = other
        elif isinstance(batch, list):
            batch.insert(random.randrange(len(batch) + 1), other)
        else:
            batch = {random.choice(EXPLICIT_KEYS): batch, _key(random): other}
    return batch, known


def _meant(random: Random, known: tuple[str, ...]) -> Any:
    """One of the forms that are read."""
    flags = [[random.random() < 0.5 for _ in known] for _ in range(random.choice([1, 2, 8]))]
    samples = [[name for name, on in zip(known, row, strict=True) if on] for row in flags]
    key = random.choice(EXPLICIT_KEYS)
    missing = random.choice([None, math.nan, [None, math.nan], NAType(), Nulls([None]), []])
    data = {name: torch.zeros(2, 3) if name in samples[0] else missing for name in known}
    forms: list[Any] = [samples[0], samples, {key: samples}, data, {"inputs": data, "labels": 1}]
    forms += [[{key: names} for names in samples], [SimpleNamespace(modality=n) for n in samples]]
    forms += [AttrDict(data), [AttrDict(data)], {key: Nulls([*samples[0], None])}]
    forms += [torch.tensor(flags), np.array(flags), {key: flags}, _array(random, samples)]
    forms += [{key: dict(zip(known, flags[0], strict=True))}, torch.tensor([-1, len(known) - 1])]
    return random.choice(forms)


def value(random: Random, depth: int) -> Any:
    """Anything, of about so many levels."""
    if depth <= 0 or random.random() < 0.15:
        return random.choices(LEAVES, WEIGHTS)[0](random)
    width = 1 if depth > 4 else random.choice([0, 1, 1, 2, 3])
    items = [value(random, depth - 1) for _ in range(width)]
    if random.random() < 0.2:
        items *= 2  # all of one type, as samples are
    return random.choice(_CONTAINERS)(random, items)


def _key(random: Random) -> Any:
    kind = random.random()
    if kind < 0.4:
        return random.choice(EXPLICIT_KEYS)
    if kind < 0.9:
        return random.choice(STRINGS)
    return random.choice([0, None, ("T1",), Colour.T1, math.nan, b"T1", True, int, Name("T1")])


def _mapping(random: Random, items: list[Any]) -> dict[Any, Any]:
    return {_key(random): item for item in items}


def _strings(random: Random, items: list[Any]) -> dict[str, Any]:
    return {random.choice([*EXPLICIT_KEYS, "T1", "x", "keys", "_fields"]): item for item in items}


def _named(column: Column, name: str) -> Column:
    column.names = name
    return column


def _set(random: Random, items: list[Any]) -> set[Any]:
    return {random.choice([*STRINGS, 1, None, ("T1", "dMRI"), frozenset({"T1"})]) for _ in items}


def _array(random: Random, items: list[Any]) -> Any:
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    return array.reshape(random.choice([(-1,), (1, -1), (-1, 1)])) if items else array


_CONTAINERS: list[Callable[[Random, list[Any]], Any]] = [
    *[lambda _, items: items] * 3,
    *[lambda _, items: UserList(items), lambda _, items: Column(items)],
    *[lambda _, items: Nulls(items), lambda _, items: Scalar(items)],
    lambda random, items: _named(Column(items), random.choice(STRINGS)),
    lambda random, items: AttrDict(_mapping(random, items)),
    *[_mapping] * 6,
    lambda _, items: tuple(items),
    lambda _, items: deque(items),
    lambda _, items: iter(items),
    lambda random, items: _mapping(random, items).keys(),
    lambda random, items: _mapping(random, items).values(),
    lambda random, items: MappingProxyType(_mapping(random, items)),
    lambda random, items: OrderedDict(_mapping(random, items)),
    lambda random, items: UserDict(_mapping(random, items)),
    lambda random, items: SimpleNamespace(**_strings(random, items)),
    lambda random, items: Keyed(random.choice([list("ab"), 5, None, ["T1", "modality"]]), items),
    lambda _, items: Record(items, *items[:2]),
    lambda _, items: Pair(items, items[:1]),
    lambda _, items: Scans(items, items[:1]),
    lambda _, items: SimpleNamespace(tensordicts=items),
    lambda _, items: itertools.chain(items),
    _set,
    _array,
]
