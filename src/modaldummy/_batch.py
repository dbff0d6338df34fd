"""Which modalities a batch holds, read from whatever form its metadata comes in."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modaldummy._errors import BatchMetadataError, close_match, describe, unknown_modality
from modaldummy._values import (
    Fields,
    check_depth,
    check_has_values,
    fields_of,
    is_integer,
    is_like_collated_flags,
    is_mask,
    is_plain_collection,
    is_present,
    once,
)

EXPLICIT_KEYS = ("active_modalities", "modalities", "modality")
_COMPARED = 1000  # keys of a mapping that are looked at for a slip of the pen


def active_modalities(batch: Any, modalities: Sequence[str]) -> tuple[str, ...]:
    """Read from a batch which of the known modalities it holds.

    Understood, in this order: a name; a collection of names, nested per sample; a mapping,
    dataclass, named tuple or object that holds any of these forms under ``active_modalities``,
    ``modalities`` or ``modality``; a mapping keyed by modality, where None, False, all-False and
    empty values mean inactive; such a mapping one level down; a list of samples, each in one of
    these forms; a bool array ``[M]`` or ``[B, M]``, modalities in the order of ``modalities``; an
    integer array ``[B]`` of indexes into ``modalities``, -1 for none. Arrays may be numpy's or
    torch's. An explicitly empty form means that nothing is active. A key such as
    ``missing_modalities`` is never read, and an iterator is refused, since reading would use it up.

    >>> active_modalities({"modality": ["T1", "T1", "dMRI"]}, ["T1", "rsfMRI", "dMRI"])
    ('T1', 'dMRI')
    >>> active_modalities({"T1": torch.zeros(2, 1, 8, 8), "dMRI": None}, ["T1", "dMRI"])
    ('T1',)

    Args:
        batch: The batch or its metadata; it is not changed.
        modalities: The ``M`` known modalities, in map order.

    Returns:
        The active modalities, in the order of ``modalities``.

    Raises:
        UnknownModalityError: The batch names a modality that is not in ``modalities``.
        BatchMetadataError: Nothing recognised, or a form that leaves room for two readings.
        TypeError: ``modalities`` is a string.

    Note:
        Masks on an accelerator are copied to the host, which waits for the device. What an
        attribute or an item of the batch raises when it is asked for is passed on.
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
        first = next(iter(self.modalities), "T1")
        known = ", ".join(map(repr, self.modalities)) or "none"
        return (
            f"Known modalities: {known}. Put the active ones into the batch,"
            f" `batch['modalities'] = [{first!r}]`, or name them yourself: "
            f"`modalities=[{first!r}]` in a call of a wrapped loss function, `[{first!r}]` in "
            "place of the batch elsewhere. A batch in another form needs "
            "`DummyLossWrapper(..., resolver=...)`."
        )

    def probe(
        self, value: Any, where: str, *, explicit: bool = False, depth: int = 0
    ) -> set[str] | None:
        """Active modalities in `value`, or None if it holds no metadata; malformed ones raise.

        `explicit` says that `value` stands where only metadata can stand, so that a list of bools
        is a mask, None in a list is a sample without modalities, and every key of a mapping must be
        a modality.
        """
        check_depth(depth, where)
        if isinstance(value, str):
            return {self.known(value, where)}
        if isinstance(value, (Tensor, np.ndarray)):
            return self._read_array(value, where, depth)
        for key in () if isinstance(value, (Mapping, type)) else EXPLICIT_KEYS:
            attribute = getattr(value, key, None)
            if attribute is not None and not callable(attribute):
                return self.read(attribute, f"{where}.{key}", explicit=True, depth=depth + 1)
        if isinstance(samples := getattr(value, "tensordicts", None), list):
            # Stacked lazily: its own keys are only those that all samples have.
            return self._read_collection(samples, where, explicit, depth)
        if (fields := fields_of(value)) is not None:
            if explicit and not any(key in fields.keys for key in EXPLICIT_KEYS):
                return self._read_flags(fields, where)
            return self._read_mapping(fields, where, depth)
        if is_plain_collection(value):
            return self._read_collection(value, where, explicit, depth)
        return None

    def known(self, name: object, where: str) -> str:
        """The known modality that `name` is; of the map's own type where `name` is an Enum."""
        if isinstance(name, str):
            for modality in self.modalities:
                if modality == name:
                    return modality
        raise unknown_modality(name, self.modalities, where)

    def _hint(self, value: Any) -> str:
        """What may have gone wrong with a `value` that holds no metadata."""
        if isinstance(value, Iterator):
            return " Reading an iterator would use it up; pass a list."
        fields = fields_of(value)
        options = EXPLICIT_KEYS + self.modalities
        for key in () if fields is None else fields.keys[:_COMPARED]:
            match = (
                close_match(key, options) if isinstance(key, str) and key not in options else None
            )
            if match is not None:
                return f" Did you mean {match!r} by {key!r}?"
        return ""

    def _read_flags(self, fields: Fields, where: str) -> set[str]:
        """A mapping under an explicit key: only modalities, and no numbers that could be flags."""
        values = {}
        for key in fields.keys:
            name, value = self.known(key, where), fields.get(key)
            if is_like_collated_flags(value):
                raise BatchMetadataError(
                    f"{where}[{name!r}] holds numbers, {describe(value)}, which could be flags; "
                    "use bools."
                )
            values[name] = value
        return self._present(values, where)

    def _read_mapping(self, fields: Fields, where: str, depth: int) -> set[str] | None:
        found = self._read_level(fields, where, depth)
        if found is not None or not fields.may_be_searched:
            return found
        answers: dict[Any, set[str]] = {}
        for key in fields.keys:
            inner = fields_of(fields.get(key))
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

    def _read_level(self, fields: Fields, where: str, depth: int) -> set[str] | None:
        """Explicit keys first, then keys that are modalities; nothing further down."""
        for key in EXPLICIT_KEYS:
            value = fields.get(key) if key in fields.keys else None
            if value is not None:
                at = f"{where}[{key!r}]"
                return self.read(value, at, explicit=True, depth=depth + 1)
        names = [name for name in self.modalities if name in fields.keys]
        return self._present({name: fields.get(name) for name in names}, where) if names else None

    def _present(self, values: Mapping[str, Any], where: str) -> set[str]:
        flags = {name: is_present(value, f"{where}[{name!r}]") for name, value in values.items()}
        masks = {name: flag for name, flag in flags.items() if isinstance(flag, Tensor)}
        if masks:
            device = next(iter(masks.values())).device
            read = torch.stack([flag.to(device) for flag in masks.values()]).tolist()
            flags |= dict(zip(masks, read, strict=True))
        return {name for name, flag in flags.items() if flag}

    def _read_collection(
        self, items: Collection[Any], where: str, explicit: bool, depth: int
    ) -> set[str] | None:
        if explicit and len(items) and all(isinstance(item, (bool, np.bool_)) for item in items):
            return self._read_array(np.asarray(list(items)), where, depth)
        found: set[str] = set()
        for index, item in enumerate(items):
            if item is None and explicit:
                continue  # a sample without modalities, as in a column with nulls
            at = f"{where}[{index}]"
            numbers = isinstance(item, (Tensor, np.ndarray)) and not is_mask(item)
            names = None if numbers else self.probe(item, at, explicit=explicit, depth=depth + 1)
            if names is None:
                if index == 0 and not explicit:
                    return None
                raise BatchMetadataError(
                    f"{at} does not say which modalities it holds: {describe(item)}. If {where} "
                    "is a tuple such as (inputs, targets), pass the item that does; if it is a "
                    "list of samples, write `[]`, or `'modalities': []` in a dict, for one without "
                    "modalities; integers could be flags or indexes, so use bools, or an integer "
                    "array of indexes."
                )
            found |= names
        return found

    def _read_array(self, array: Any, where: str, depth: int) -> set[str]:
        width = len(self.modalities)
        if isinstance(array, np.ndarray) and array.dtype.kind in "UTO":
            return self.read(once(array).ravel().tolist(), where, explicit=True, depth=depth + 1)
        check_has_values(array, where)
        if isinstance(array, np.matrix):
            array = np.asarray(array)  # its columns would stay matrices
        if is_mask(array):
            if array.ndim not in (1, 2) or array.shape[-1] != width:
                raise BatchMetadataError(
                    f"{where} is a bool mask of shape {list(array.shape)}; expected [{width}] or "
                    f"[B, {width}], one column for each of {', '.join(self.modalities)}."
                )
            rows = once(array, array.ndim - 1)
            columns = (rows[None] if rows.ndim == 1 else rows).any(0).tolist()
            return {name for name, on in zip(self.modalities, columns, strict=True) if on}
        if not is_integer(array) or array.ndim != 1:
            raise BatchMetadataError(
                f"{where} is {describe(array)}, which names no modality; expected names, a bool "
                f"mask [{width}] or [B, {width}], or integer indexes [B]. {self.fixes()}"
            )
        if array.dtype in (torch.uint8, np.uint8):
            raise BatchMetadataError(
                f"{where} is {describe(array)}; uint8 is used for masks as well as for indexes. "
                "Convert it to bool or to int64."
            )
        indexes = set(once(array).tolist()) - {-1, None}  # None: hidden by a masked array
        if wrong := sorted(index for index in indexes if not 0 <= index < width):
            raise BatchMetadataError(
                f"{where} holds the index {wrong[0]}; expected 0 to {width - 1} for "
                f"{', '.join(self.modalities)}, or -1 for none."
            )
        return {self.modalities[index] for index in indexes}
