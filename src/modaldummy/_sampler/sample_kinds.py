"""Kinds of samples that a dataset has, and the steps of an epoch that each of them gets."""

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._errors import close_match, describe

Ints: TypeAlias = NDArray[np.int64]


def group_samples(modalities: Any) -> tuple[dict[ModalityKey, Ints], int]:
    """Samples by kind, both in the order of the dataset, and a checksum of that."""
    if isinstance(modalities, (str, bytes, Mapping)) or not (
        hasattr(modalities, "__len__") and hasattr(modalities, "__getitem__")
    ):
        raise TypeError(
            "`modalities` must be a sequence that has, for each sample of the dataset, a name or "
            f"an iterable of names, got {describe(modalities)}."
        )
    if not len(modalities):
        raise ValueError("`modalities` is empty; pass an entry for each sample of the dataset.")
    codes = np.empty(len(modalities), dtype=np.int64)
    kinds: dict[ModalityKey, int] = {}
    # Of a million entries only those that are written differently are read.
    known: dict[Any, int] = {}
    entries = modalities.tolist() if isinstance(modalities, np.ndarray) else modalities
    for place, entry in enumerate(entries):
        written = entry if isinstance(entry, str) else _members(entry)
        try:
            codes[place] = known[written]
        except (KeyError, TypeError):
            kind = _kind_of(written, f"Entry {place} of `modalities`", entry)
            codes[place] = known[written] = kinds.setdefault(kind, len(kinds))
    places = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    checksum = zlib.crc32(codes.astype("<i8").tobytes(), zlib.crc32(repr(list(kinds)).encode()))
    return dict(zip(kinds, places, strict=True)), checksum


def read_sizes(batch_size: Any, kinds: Collection[ModalityKey]) -> dict[ModalityKey, int]:
    """How many samples of each kind a batch holds on each rank, in the order of the mapping."""
    if not isinstance(batch_size, Mapping):
        return dict.fromkeys(kinds, check_int("batch_size", batch_size, 1))
    sizes: dict[ModalityKey, int] = {}
    known = ", ".join(map(repr, kinds))
    for given, size in batch_size.items():
        kind = _kind_of(
            given if isinstance(given, str) else _members(given), "A key of `batch_size`", given
        )
        if kind not in kinds:
            match = close_match(text_of(kind), [text_of(other) for other in kinds])
            hint = f"; did you mean {match!r}?" if match else "."
            raise ValueError(
                f"`batch_size` names {given!r}, which no sample holds{hint} Kinds of samples: "
                f"{known}."
            )
        if kind in sizes:
            raise ValueError(f"`batch_size` names the kind {kind!r} twice; give it one number.")
        sizes[kind] = check_int(f"batch_size[{given!r}]", size, 0)
    if missing := [kind for kind in kinds if kind not in sizes]:
        raise ValueError(
            f"`batch_size` lacks {', '.join(map(repr, missing))}; give a kind of samples that no "
            f"batch shall hold the number 0. Kinds of samples: {known}."
        )
    if not any(sizes.values()):
        raise ValueError("`batch_size` is 0 for each kind of samples; give one at least 1.")
    return {kind: size for kind, size in sizes.items() if size}


def read_temperature(temperature: Any, is_mix: bool) -> float:
    """The temperature as a float."""
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"`temperature` must be a number, got {describe(temperature)}.")
    if not float(temperature) > 0:
        raise ValueError(
            "`temperature` must be above 0: 1.0 for shares in proportion to the samples, "
            f"`math.inf` for equal ones, got {temperature}."
        )
    if is_mix and temperature != 1:
        raise ValueError(
            "`temperature` must be 1.0 where `batch_size` is a mapping, which says the shares "
            f"itself, got {temperature}."
        )
    return float(temperature)


def check_int(name: str, number: Any, least: int) -> int:
    """`number`, if it is an int that is not too small."""
    if not isinstance(number, int) or isinstance(number, bool):
        hint = ", or a mapping of kinds to ints" if name == "batch_size" else ""
        raise TypeError(f"`{name}` must be an int{hint}, got {describe(number)}.")
    if number < least:
        raise ValueError(f"`{name}` must be {least} or more, got {number}.")
    return number


def count_steps(
    counts: Mapping[ModalityKey, int], full: Mapping[ModalityKey, int], drop_last: bool
) -> Ints:
    """How many times each kind has the samples that a step takes from it on all ranks."""
    steps = [
        counts[kind] // full[kind] if drop_last else -(-counts[kind] // full[kind])
        for kind in counts
    ]
    if not any(steps):
        needs = (f"{kind!r} has {counts[kind]} of {full[kind]}" for kind in counts)
        raise ValueError(
            "`drop_last=True` leaves no batch, as none is full on all ranks: "
            f"{', '.join(needs)}; pass `drop_last=False` or a smaller `batch_size`."
        )
    return np.array(steps)


def allot(num_steps: int, counts: Sequence[int], temperature: float) -> Ints:
    """Steps of each kind: largest remainders, and at least one where there are enough.

    What is left by kinds that would get less than one is shared among the others.
    """
    largest = math.log(max(counts))
    weight = np.array([math.exp((math.log(n) - largest) / temperature) for n in counts])
    raised = np.zeros(len(weight), dtype=bool)
    while True:
        quota = np.where(raised, 1.0, (num_steps - raised.sum()) * weight)
        quota[~raised] /= weight[~raised].sum()
        few = quota < 1
        if not few.any() or num_steps < len(weight):
            break
        raised |= few
    steps = np.floor(quota).astype(np.int64)
    # Ranks may differ in the last bit of a logarithm, and must not in what they do with it.
    order = np.argsort(-np.round(quota - steps, 9), kind="stable")
    steps[order[: num_steps - steps.sum()]] += 1
    return steps


def order_steps(num_steps: Ints, generator: torch.Generator | None) -> Ints:
    """Which of `len(num_steps)` each step of an epoch goes to: at random, or evenly spread."""
    order = np.repeat(np.arange(len(num_steps)), num_steps)
    if generator is not None:
        return order[permutations(1, len(order), generator)]
    middles = [(np.arange(number) + 0.5) / number for number in num_steps if number]
    return order[np.argsort(np.concatenate(middles), kind="stable")]


def permutations(turns: int, length: int, generator: torch.Generator) -> Ints:
    """So many random orders of `range(length)`, one after the other."""
    # Named, as a default device may be set.
    keys = torch.rand(turns, length, generator=generator, dtype=torch.float64, device="cpu")
    return np.argsort(keys.numpy(), axis=1, kind="stable").reshape(-1)


def _members(entry: Any) -> tuple[Any, ...]:
    """What an entry that is no name holds, to be looked up by."""
    if isinstance(entry, (tuple, list, set, frozenset)):  # quicker than to ask an abstract class
        return tuple(entry)
    readable = isinstance(entry, Iterable) and not isinstance(entry, (bytes, Mapping))
    return tuple(entry) if readable else (entry,)


def _kind_of(written: Any, where: str, entry: Any) -> ModalityKey:
    names = (written,) if isinstance(written, str) else written
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where} must be a name or an iterable of names, got {describe(entry)}.")
    if "" in names:
        raise ValueError(f"{where} must name modalities, got {describe(entry)}; for none pass ().")
    # A set of names has another order in each process.
    plain = sorted({str.__str__(name) for name in names})
    return plain[0] if len(plain) == 1 else tuple(plain)
