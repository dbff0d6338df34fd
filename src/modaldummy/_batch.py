"""Which modalities a batch holds, read from whatever form its metadata comes in."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modaldummy._errors import BatchMetadataError, close_match, describe, unknown_modality

EXPLICIT_KEYS = ("active_modalities", "modalities", "modality")

MAX_NESTING = 16


def active_modalities(batch: Any, modalities: Sequence[str]) -> tuple[str, ...]:
    """Read from a batch which of the known modalities it holds.

    Understood, in this order: a name; a collection of names, nested per sample; a mapping,
    dataclass, named tuple or object that holds any of these forms under `active_modalities`,
    `modalities` or `modality`; a mapping keyed by modality, where None, False, all-False and empty
    values mean inactive; such a mapping one level down; a list of samples, each in one of these
    forms; a bool array `[M]` or `[B, M]` in the order of `modalities`; an integer array `[B]` of
    indexes into `modalities`, -1 for none. Arrays may be numpy's or torch's. An explicitly empty
    form means that nothing is active. A key such as `missing_modalities` is never read, and an
    iterator is refused, since reading would use it up.

        >>> active_modalities({"modality": ["T1", "T1", "dMRI"]}, ["T1", "rsfMRI", "dMRI"])
        ('T1', 'dMRI')
        >>> active_modalities({"T1": torch.zeros(2, 1, 8, 8), "dMRI": None}, ["T1", "dMRI"])
        ('T1',)

    Args:
        batch: The batch or its metadata; it is not changed.
        modalities: The known modalities, in map order.

    Returns:
        The active modalities, in the order of `modalities`.

    Raises:
        UnknownModalityError: The batch names a modality that is not in `modalities`.
        BatchMetadataError: Nothing recognised, or a form that leaves room for two readings.
        TypeError: `modalities` is a string.

    Note:
        Masks on an accelerator are copied to the host, which waits for the device.
    """
    if isinstance(modalities, str):
        raise TypeError(f"`modalities` must be a sequence of names, got {modalities!r}.")
    reader = Reader(modalities)
    return reader.in_map_order(reader.read(batch, "`batch`"))


class Reader:
    """Reads batches for one fixed sequence of modalities."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)

    def in_map_order(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.modalities if name in names)

    def read(self, value: Any, where: str, *, explicit: bool = False, depth: int = 0) -> set[str]:
        """Active modalities in `value`, which must hold them in some form."""
        found = self.probe(value, where, explicit=explicit, depth=depth)
        if found is None:
            raise BatchMetadataError(
                f"{where} does not say which modalities it holds: {describe(value)}."
                f"{self._hint(value)} {self.fixes()}"
            )
        return found

    def fixes(self) -> str:
        """What to do about a batch that cannot be read."""
        first = self.modalities[0]
        return (
            f"Known modalities: {', '.join(map(repr, self.modalities))}. Put the active ones into "
            f"the batch, `batch['modalities'] = [{first!r}]`, or name them yourself: "
            f"`modalities=[{first!r}]` in a call of a wrapped loss function, `[{first!r}]` in "
            "place of the batch elsewhere. A batch in another form needs "
            "`DummyLossWrapper(..., resolver=...)`."
        )

    def probe(
        self, value: Any, where: str, *, explicit: bool = False, depth: int = 0
    ) -> set[str] | None:
        """Active modalities in `value`, or None if it holds no metadata; malformed ones raise.

        `explicit` says that `value` stands where only metadata can stand, so that lists of numbers
        are masks or indexes, and every key of a mapping must be a modality.
        """
        if depth > MAX_NESTING:
            raise BatchMetadataError(
                f"{where} is nested more than {MAX_NESTING} levels deep; pass a list of names."
            )
        if isinstance(value, str):
            return {self.known(value, where)}
        if isinstance(value, (Tensor, np.ndarray)):
            return self._read_array(value, where)
        if (mapping := _as_mapping(value)) is not None:
            if explicit and not any(key in mapping for key in EXPLICIT_KEYS):
                names = [self.known(key, where) for key in mapping]
                return self._present(mapping, names, where)
            return self._read_mapping(mapping, where, depth)
        if is_plain_collection(value):
            return self._read_collection(list(value), where, explicit, depth)
        for key in EXPLICIT_KEYS:
            attribute = getattr(value, key, None)
            if attribute is not None and not callable(attribute):
                return self.read(attribute, f"{where}.{key}", explicit=True, depth=depth + 1)
        return None

    def known(self, name: object, where: str) -> str:
        """`name` if it is a known modality."""
        if isinstance(name, str) and name in self.modalities:
            return str(name)
        raise unknown_modality(name, self.modalities, where)

    def _hint(self, value: Any) -> str:
        """What may have gone wrong with a `value` that holds no metadata."""
        if isinstance(value, Iterator):
            return " Reading an iterator would use it up; pass a list."
        for key in _as_mapping(value) or ():
            if isinstance(key, str) and (
                match := close_match(key, EXPLICIT_KEYS + self.modalities)
            ):
                return f" Did you mean {match!r} by {key!r}?"
        return ""

    def _read_mapping(self, mapping: Mapping[Any, Any], where: str, depth: int) -> set[str] | None:
        found = self._read_level(mapping, where, depth)
        if found is not None:
            return found
        answers: dict[Any, set[str]] = {}
        for key in mapping:
            inner = _as_mapping(mapping[key])
            if inner is None:
                continue
            answer = self._read_level(inner, f"{where}[{key!r}]", depth + 1)
            if answer is not None:
                answers[key] = answer
        if len({frozenset(answer) for answer in answers.values()}) > 1:
            read = {key: self.in_map_order(answer) for key, answer in answers.items()}
            raise BatchMetadataError(
                f"{where} holds contradictory modalities, {read}; say under 'modalities' which "
                "are meant."
            )
        return next(iter(answers.values()), None)

    def _read_level(self, mapping: Mapping[Any, Any], where: str, depth: int) -> set[str] | None:
        """Explicit keys first, then keys that are modalities; nothing further down."""
        for key in EXPLICIT_KEYS:
            if key in mapping and mapping[key] is not None:
                at = f"{where}[{key!r}]"
                return self.read(mapping[key], at, explicit=True, depth=depth + 1)
        names = [name for name in self.modalities if name in mapping]
        return self._present(mapping, names, where) if names else None

    def _present(self, mapping: Mapping[Any, Any], names: list[str], where: str) -> set[str]:
        flags = {name: _is_present(mapping[name], f"{where}[{name!r}]") for name in names}
        masks = {name: flag for name, flag in flags.items() if isinstance(flag, Tensor)}
        if masks:
            device = next(iter(masks.values())).device
            read = torch.stack([flag.to(device) for flag in masks.values()]).tolist()
            flags |= dict(zip(masks, read, strict=True))
        return {name for name, flag in flags.items() if flag}

    def _read_collection(
        self, items: list[Any], where: str, explicit: bool, depth: int
    ) -> set[str] | None:
        if explicit and items and all(isinstance(item, (bool, np.bool_)) for item in items):
            return self._read_array(np.asarray(items), where)
        found: set[str] = set()
        for index, item in enumerate(items):
            at = f"{where}[{index}]"
            numbers = isinstance(item, (Tensor, np.ndarray)) and not _is_mask(item)
            names = None if numbers else self.probe(item, at, explicit=explicit, depth=depth + 1)
            if names is None:
                if index == 0 and not explicit:
                    return None
                raise BatchMetadataError(
                    f"{at} does not say which modalities it holds: {describe(item)}. If {where} "
                    "is a tuple such as (inputs, targets), pass the item that does; if it is a "
                    "list of samples, write an empty list for one without modalities; integers "
                    "could be flags or indexes, so use bools, or an integer array of indexes."
                )
            found |= names
        return found

    def _read_array(self, array: Any, where: str) -> set[str]:
        width = len(self.modalities)
        if isinstance(array, np.ndarray) and array.dtype.kind in "UO":
            return {self.known(name, where) for name in array.ravel().tolist()}
        if _is_mask(array):
            if array.ndim not in (1, 2) or array.shape[-1] != width:
                raise BatchMetadataError(
                    f"{where} is a bool mask of shape {list(array.shape)}; expected [{width}] or "
                    f"[B, {width}], one column for each of {', '.join(self.modalities)}."
                )
            columns = array.reshape(-1, width).any(0).tolist()
            return {name for name, on in zip(self.modalities, columns, strict=True) if on}
        if not _is_integer(array) or array.ndim != 1:
            raise BatchMetadataError(
                f"{where} is {describe(array)}, which names no modality; expected names, a bool "
                f"mask [{width}] or [B, {width}], or integer indexes [B]. {self.fixes()}"
            )
        indexes = set(array.tolist()) - {-1}
        if wrong := sorted(index for index in indexes if not 0 <= index < width):
            raise BatchMetadataError(
                f"{where} holds the index {wrong[0]}; expected 0 to {width - 1} for "
                f"{', '.join(self.modalities)}, or -1 for none."
            )
        return {self.modalities[index] for index in indexes}


def _is_present(value: Any, where: str) -> bool | Tensor:
    """Whether the value of a mapping keyed by modality means that the modality is active.

    The answer for a mask is a bool tensor of shape `[]`, still on its device.
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return bool(value)
    is_array = isinstance(value, (Tensor, np.ndarray))
    if is_array and _is_mask(value):
        return value.any() if isinstance(value, Tensor) else bool(value.any())
    if isinstance(value, (Number, np.generic)) or (is_array and value.ndim == 0):
        raise BatchMetadataError(
            f"{where} holds a number, {describe(value)}, which could be data or a flag. Use True "
            "or False for a flag, an array of at least one dimension for data."
        )
    if isinstance(value, Tensor):
        return value.numel() > 0
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.size > 0
    if isinstance(value, (list, tuple, np.ndarray)):
        return any(
            (isinstance(item, Number) and not isinstance(item, bool)) or _is_present(item, where)
            for item in value
        )
    return len(value) > 0 if isinstance(value, Sized) else True


def _is_mask(array: Any) -> bool:
    return array.dtype in (torch.bool, np.bool_)


def _is_integer(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return array.dtype.kind in "iu"
    return not (array.is_floating_point() or array.is_complex())


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """`value` as a mapping if it has named fields: mapping, TensorDict-like, tuple, dataclass."""
    if isinstance(value, type):
        return None
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "keys") and hasattr(value, "__getitem__"):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118  # a TensorDict iterates rows
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [key for key in EXPLICIT_KEYS if hasattr(value, key) and key not in names]
        fields = {name: getattr(value, name) for name in names}
        return {name: held for name, held in fields.items() if not callable(held)}
    return None


def is_plain_collection(value: object) -> bool:
    other = (str, bytes, Tensor, np.ndarray)
    return (
        isinstance(value, Collection)
        and not isinstance(value, other)
        and _as_mapping(value) is None
    )
