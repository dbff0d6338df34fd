"""Combinations of modalities in a dataset, and the steps of an epoch that each of them gets."""

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
    """Group the samples of a dataset by their combination of modalities.

    Args:
        modalities: For each sample a name or an iterable of names.

    Returns:
        Combination to the indices of its samples, both in dataset order; and a checksum of that.
    """
    if isinstance(modalities, (str, bytes, Mapping)) or not (
        hasattr(modalities, "__len__") and hasattr(modalities, "__getitem__")
    ):
        raise TypeError(
            "`modalities` must be a sequence with a name or an iterable of names for each sample "
            f"of the dataset, got {describe(modalities)}."
        )
    if not len(modalities):
        raise ValueError("`modalities` is empty. Pass one entry for each sample of the dataset.")
    codes = np.empty(len(modalities), dtype=np.int64)
    combinations: dict[ModalityKey, int] = {}
    # A dataset has few different entries, so each of them is parsed once.
    code_of: dict[Any, int] = {}
    entries = modalities.tolist() if isinstance(modalities, np.ndarray) else modalities
    for index, entry in enumerate(entries):
        names = entry if isinstance(entry, str) else _names_in(entry)
        try:
            codes[index] = code_of[names]
        except (KeyError, TypeError):
            combination = _combination_of(names, f"Entry {index} of `modalities`", entry)
            code_of[names] = combinations.setdefault(combination, len(combinations))
            codes[index] = code_of[names]
    indices = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    checksum = zlib.crc32(repr(list(combinations)).encode())
    checksum = zlib.crc32(codes.astype("<i8").tobytes(), checksum)
    return dict(zip(combinations, indices, strict=True)), checksum


def read_sizes(batch_size: Any, combinations: Collection[ModalityKey]) -> dict[ModalityKey, int]:
    """Number of samples of each combination in a batch of one rank, in the order of the mapping."""
    if not isinstance(batch_size, Mapping):
        return dict.fromkeys(combinations, check_int("batch_size", batch_size, 1))
    sizes: dict[ModalityKey, int] = {}
    known = ", ".join(map(repr, combinations))
    for given, size in batch_size.items():
        names = given if isinstance(given, str) else _names_in(given)
        combination = _combination_of(names, "A key of `batch_size`", given)
        if combination not in combinations:
            match = close_match(text_of(combination), [text_of(other) for other in combinations])
            hint = f"; did you mean {match!r}?" if match else "."
            raise ValueError(
                f"`batch_size` names {given!r}, which is not the combination of any sample{hint} "
                f"Combinations in the dataset: {known}."
            )
        if combination in sizes:
            raise ValueError(f"`batch_size` names {combination!r} twice. Give it one number.")
        sizes[combination] = check_int(f"batch_size[{given!r}]", size, 0)
    if missing := [combination for combination in combinations if combination not in sizes]:
        raise ValueError(
            f"`batch_size` lacks {', '.join(map(repr, missing))}. Give each combination a number, "
            f"or 0 to leave it out. Combinations in the dataset: {known}."
        )
    if not any(sizes.values()):
        raise ValueError("`batch_size` is 0 for each combination. Give one of them at least 1.")
    return {combination: size for combination, size in sizes.items() if size}


def read_temperature(temperature: Any, is_mix: bool) -> float:
    """The temperature as a float."""
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"`temperature` must be a number, got {describe(temperature)}.")
    if not float(temperature) > 0:
        raise ValueError(
            f"`temperature` must be above 0, got {temperature}. Pass 1.0 for shares in proportion "
            "to the samples, or `math.inf` for equal shares."
        )
    if is_mix and temperature != 1:
        raise ValueError(
            f"`temperature` must be 1.0 if `batch_size` is a mapping, got {temperature}. The "
            "mapping already gives the shares."
        )
    return float(temperature)


def check_int(name: str, number: Any, least: int) -> int:
    """`number` itself, if it is an int of at least `least`."""
    if not isinstance(number, int) or isinstance(number, bool):
        hint = ", or a mapping of combinations to ints" if name == "batch_size" else ""
        raise TypeError(f"`{name}` must be an int{hint}, got {describe(number)}.")
    if number < least:
        raise ValueError(f"`{name}` must be {least} or more, got {number}.")
    return number


def count_steps(
    counts: Mapping[ModalityKey, int], sizes: Mapping[ModalityKey, int], drop_last: bool
) -> Ints:
    """Number of steps that the samples of each combination last for.

    Args:
        counts: Number of samples of each combination in the dataset.
        sizes: Number of samples that a step takes from each combination on all ranks.
        drop_last: Whether to drop a last step that is not full.
    """
    if drop_last:
        steps = [counts[combination] // sizes[combination] for combination in counts]
    else:  # rounded up
        steps = [-(-counts[combination] // sizes[combination]) for combination in counts]
    if not any(steps):
        needs = (f"{k!r} has {counts[k]} of {sizes[k]}" for k in counts)
        raise ValueError(
            "`drop_last=True` leaves no batch, because no batch is full on all ranks: "
            f"{', '.join(needs)}. Pass `drop_last=False` or a smaller `batch_size`."
        )
    return np.array(steps)


def share_steps(num_steps: int, counts: Sequence[int], temperature: float) -> Ints:
    """Divide the steps of an epoch among combinations, by the method of largest remainders.

    Each combination gets at least one step, if there are enough steps. The others share the rest.

    Args:
        num_steps: Number of steps to divide.
        counts: Number of samples of each combination.
        temperature: Shares are in proportion to `count ** (1 / temperature)`.
    """
    largest = math.log(max(counts))
    weight = np.array([math.exp((math.log(n) - largest) / temperature) for n in counts])
    raised = np.zeros(len(weight), dtype=bool)
    while True:
        quota = np.where(raised, 1.0, (num_steps - raised.sum()) * weight)
        quota[~raised] /= weight[~raised].sum()
        below_one = quota < 1
        if not below_one.any() or num_steps < len(weight):
            break
        raised |= below_one
    steps = np.floor(quota).astype(np.int64)
    # Logarithms may differ between ranks in the last bit. Rounding keeps the order the same.
    order = np.argsort(-np.round(quota - steps, 9), kind="stable")
    steps[order[: num_steps - steps.sum()]] += 1
    return steps


def order_steps(num_steps: Ints, generator: torch.Generator | None) -> Ints:
    """Order the steps of an epoch: at random, or evenly spread without a generator.

    Args:
        num_steps: Number of steps of each combination.
        generator: Source of randomness.

    Returns:
        For each step of the epoch, the index into `num_steps`.
    """
    order = np.repeat(np.arange(len(num_steps)), num_steps)
    if generator is not None:
        return order[permutations(1, len(order), generator)]
    middles = [(np.arange(number) + 0.5) / number for number in num_steps if number]
    return order[np.argsort(np.concatenate(middles), kind="stable")]


def permutations(number: int, length: int, generator: torch.Generator) -> Ints:
    """A number of random orders of `range(length)`, one after the other in one array."""
    # The device is named because the user may have set another default device.
    keys = torch.rand(number, length, generator=generator, dtype=torch.float64, device="cpu")
    return np.argsort(keys.numpy(), axis=1, kind="stable").reshape(-1)


def _names_in(entry: Any) -> tuple[Any, ...]:
    """The names in an entry that is not a name itself, as a tuple that can be a dictionary key."""
    if isinstance(entry, (tuple, list, set, frozenset)):  # faster than the check below
        return tuple(entry)
    has_names = isinstance(entry, Iterable) and not isinstance(entry, (bytes, Mapping))
    return tuple(entry) if has_names else (entry,)


def _combination_of(names: Any, where: str, entry: Any) -> ModalityKey:
    """A name, or a sorted tuple of different names; errors begin with `where`."""
    names = (names,) if isinstance(names, str) else names
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where} must be a name or an iterable of names, got {describe(entry)}.")
    if "" in names:
        raise ValueError(f"{where} must name modalities, got {describe(entry)}. Pass () for none.")
    # Sorted, because a set of names has another order in each process.
    plain = sorted({str.__str__(name) for name in names})
    return plain[0] if len(plain) == 1 else tuple(plain)
