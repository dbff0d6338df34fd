"""Which modalities a batch contains, read from whatever form its metadata has."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from modaldummy._core.batch_values import (
    COMMON_TYPES,
    Fields,
    attribute,
    check_depth,
    check_has_values,
    fields_of,
    is_collection,
    is_integer,
    is_like_collated_flags,
    is_mask,
    is_missing,
    is_present,
    unbox,
    without_broadcast_axes,
)
from modaldummy._errors import (
    BatchMetadataError,
    close_match,
    describe,
    first_few,
    unknown_modality,
)

Resolver: TypeAlias = Callable[[Any], Iterable[str] | None]

EXPLICIT_KEYS = ("active_modalities", "modalities", "modality")
MAX_COMPARISONS = 6_000  # of keys of a mapping with known names, in search of a misspelt one


def active_modalities(batch: Any, modalities: Sequence[str]) -> tuple[str, ...]:
    """Read from a batch which of the known modalities it contains.

    These forms are understood; the first one that fits decides:

    - a name, or a collection of names, which may be nested per sample;
    - a mapping, dataclass, named tuple or object with any of these forms under
      ``active_modalities``, ``modalities`` or ``modality``;
    - a mapping keyed by modality, possibly one level down, in which None, NaN, False, all-False
      and empty values mean inactive;
    - a list of samples, each in one of these forms;
    - a bool array ``[M]`` or ``[B, M]`` with the modalities in the order of ``modalities``;
    - an integer array ``[B]`` of indexes into ``modalities``, -1 for none.

    Arrays may be those of numpy or torch. An explicitly empty form means that nothing is active. A
    key such as ``missing_modalities`` is never read.

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
        BatchMetadataError: No form fits, the form can be read in two ways, or the batch is an
            iterator, which reading would use up.
        TypeError: ``modalities`` is a string.

    Note:
        Masks on an accelerator are copied to the host, which synchronizes with the device.
        Exceptions of an item, or of a property, are passed on. Those of ``__getattr__`` are not:
        such an object has no metadata.
    """
    if isinstance(modalities, str):
        raise TypeError(f"`modalities` must be a sequence of names, got {modalities!r}.")
    reader = BatchReader(modalities)
    active = reader.read(batch)
    return tuple(name for name in reader.modalities if name in active)


class BatchReader:
    """Reads batches for one fixed sequence of modalities.

    Args:
        modalities: The known modalities, in map order.
        resolver: A function of the user that reads a batch in place of this class, or None.
    """

    def __init__(self, modalities: Sequence[str], resolver: Resolver | None = None) -> None:
        if resolver is not None and not callable(resolver):
            raise TypeError(f"`resolver` must be callable or None, got {describe(resolver)}.")
        self.modalities: tuple[str, ...] = tuple(modalities)
        self.known_names = frozenset(self.modalities)
        self.resolver = resolver
        forms = [normalize(form, name) for form in ("NFC", "NFD") for name in self.modalities]
        # Those that only print like a modality are refused, where other keys are ignored.
        self._spellings: tuple[str, ...] = tuple(dict.fromkeys((*self.modalities, *forms)))

    def read(self, batch: Any) -> set[str]:
        """Active modalities in a batch.

        Raises:
            BatchMetadataError: The batch does not say which modalities it contains.
            UnknownModalityError: The batch names a modality that is not known.
        """
        if self.resolver is None:
            return self.read_value(batch, "`batch`")
        names = self.resolver(batch)
        if names is None:
            raise BatchMetadataError(
                f"`resolver` returned None for {describe(batch)}. Return the active modalities, "
                "an empty list if there are none."
            )
        return self.read_resolver_result(names)

    def read_resolver_result(self, names: Any) -> set[str]:
        """Active modalities in what a resolver returned, in any form of an explicit key."""
        names = list(names) if isinstance(names, Iterator) else names
        return self.read_value(names, "The result of `resolver`", explicit=True)

    def read_value(
        self, value: Any, where: str, *, explicit: bool = False, depth: int = 0
    ) -> set[str]:
        """Active modalities in a value that must contain metadata; arguments as for `try_read`."""
        active = self.try_read(value, where, explicit=explicit, depth=depth)
        if active is None:
            raise BatchMetadataError(
                f"{where} does not say which modalities it contains: {describe(value)}."
                f"{self._hint(value)} {self.remedy()}"
            )
        return active

    def remedy(self) -> str:
        """What to do about a batch that cannot be read."""
        first = next(iter(self.modalities), "T1")
        known = first_few(map(repr, self.modalities), 20) or "none"
        return (
            f"Known modalities: {known}. Put the active ones into the batch,"
            f" `batch['modalities'] = [{first!r}]`, `[]` if there are none, or name them yourself: "
            f"`modalities=[{first!r}]` in a call of a wrapped loss function, `[{first!r}]` in "
            "place of the batch elsewhere. A batch in another form needs "
            "`DummyLossWrapper(..., resolver=...)`."
        )

    def try_read(
        self, value: Any, where: str, *, explicit: bool = False, depth: int = 0
    ) -> set[str] | None:
        """Active modalities in a value, None if it contains no metadata; malformed ones raise.

        Args:
            value: Any value.
            where: What error messages call it.
            explicit: Whether only metadata can stand here. A list of bools then is a mask, None in
                a list is a sample without modalities, and every key of a mapping must be a
                modality.
            depth: Number of containers around the value.
        """
        check_depth(depth, where)
        value = unbox(value)
        if isinstance(value, str):
            return {self._known(value, where)}
        if isinstance(value, (Tensor, np.ndarray)):
            return self._read_array(value, where, depth)
        is_common = type(value) in COMMON_TYPES
        for key in () if is_common or isinstance(value, (Mapping, type)) else EXPLICIT_KEYS:
            named = unbox(attribute(value, key))
            if not is_missing(named) and not callable(named):
                return self.read_value(named, f"{where}.{key}", explicit=True, depth=depth + 1)
        if not is_common and isinstance(samples := attribute(value, "tensordicts"), list):
            # Of a lazily stacked TensorDict: its own keys are only those that all samples have.
            return self._read_collection(samples, where, explicit, depth)
        if (fields := fields_of(value)) is not None:
            if explicit and not any(key in fields.keys for key in EXPLICIT_KEYS):
                return self._read_flags(fields, where)
            return self._read_mapping(fields, where, depth)
        if is_collection(value):
            return self._read_collection(value, where, explicit, depth)
        return None

    def _known(self, name: object, where: str) -> str:
        """The known modality that `name` is; a member of a string Enum becomes a plain string."""
        if isinstance(name, str) and name in self.known_names:
            return str.__str__(name)
        raise unknown_modality(name, self.modalities, where)

    def _hint(self, value: Any) -> str:
        """What may have gone wrong with a `value` that contains no metadata."""
        if isinstance(value, Iterator):
            return " Reading an iterator would use it up; pass a list."
        fields = fields_of(value)
        options = EXPLICIT_KEYS + self.modalities
        for key in () if fields is None else fields.keys[: MAX_COMPARISONS // len(options)]:
            if not isinstance(key, str) or key in options:
                continue
            if (match := close_match(key, options, cutoff=0.75)) is not None:
                return f" Did you mean {match!r} by {key!r}?"
        return ""

    def _read_flags(self, fields: Fields, where: str) -> set[str]:
        """A mapping under an explicit key: only modalities, and no numbers that may be flags."""
        values = {self._known(key, where): fields.get(key) for key in fields.keys}
        for name, value in values.items():
            if is_like_collated_flags(value):
                raise BatchMetadataError(
                    f"{where}[{name!r}] contains numbers, {describe(value)}, which could be flags. "
                    "Use bools."
                )
        return self._present(values, where)

    def _read_mapping(self, fields: Fields, where: str, depth: int) -> set[str] | None:
        active = self._read_level(fields, where, depth)
        if active is not None or not fields.may_be_searched:
            return active
        answers: dict[Any, set[str]] = {}
        for key in fields.keys:
            inner = fields_of(fields.get(key))
            inside = f"{where}[{key!r}]"
            answer = None if inner is None else self._read_level(inner, inside, depth + 1)
            if answer is not None:
                answers[key] = answer
        if len({frozenset(answer) for answer in answers.values()}) > 1:
            listed = {k: [m for m in self.modalities if m in names] for k, names in answers.items()}
            raise BatchMetadataError(
                f"{where} contains contradictory modalities, {listed}. Say under 'modalities' "
                "which are meant."
            )
        return next(iter(answers.values()), None)

    def _read_level(self, fields: Fields, where: str, depth: int) -> set[str] | None:
        """Explicit keys first, then keys that are modalities; nothing further down."""
        for key in EXPLICIT_KEYS:
            value = unbox(fields.get(key)) if key in fields.keys else None
            if not is_missing(value):
                inside = f"{where}[{key!r}]"
                return self.read_value(value, inside, explicit=True, depth=depth + 1)
        keys = {key for key in fields.keys if isinstance(key, str)}
        names = [name for name in self._spellings if name in keys]
        values = {self._known(name, where): fields.get(name) for name in names}
        return self._present(values, where) if values else None

    def _present(self, values: Mapping[str, Any], where: str) -> set[str]:
        """The names whose values mean that their modality is active."""
        flags = {name: is_present(value, f"{where}[{name!r}]") for name, value in values.items()}
        masks = {name: flag for name, flag in flags.items() if isinstance(flag, Tensor)}
        if masks:
            # Stacked, so that the host synchronizes with the device once.
            device = next(iter(masks.values())).device
            on_host = torch.stack([flag.to(device) for flag in masks.values()]).tolist()
            flags |= dict(zip(masks, on_host, strict=True))
        return {name for name, flag in flags.items() if flag}

    def _read_collection(
        self, items: Collection[Any], where: str, explicit: bool, depth: int
    ) -> set[str] | None:
        if explicit and len(items) and all(isinstance(item, (bool, np.bool_)) for item in items):
            return self._read_array(np.asarray(list(items)), where, depth)
        active: set[str] = set()
        for index, item in enumerate(items):
            if explicit and is_missing(unbox(item)):
                continue  # a sample without modalities, as in a column with nulls
            place = f"{where}[{index}]"
            numbers = isinstance(item, (Tensor, np.ndarray)) and not is_mask(item)
            names = (
                None if numbers else self.try_read(item, place, explicit=explicit, depth=depth + 1)
            )
            if names is None:
                if index == 0 and not explicit:
                    return None
                raise BatchMetadataError(
                    f"{place} does not say which modalities it contains: {describe(item)}. If "
                    f"{where} is a tuple such as (inputs, targets), pass the item that does. If it "
                    "is a list of samples, write `[]`, or `'modalities': []` in a dict, for one "
                    "without modalities. Integers could be flags or indexes: use bools, or an "
                    "integer array of indexes."
                )
            active |= names
        return active

    def _read_array(self, array: Any, where: str, depth: int) -> set[str]:
        if isinstance(array, np.ndarray) and array.dtype.kind in "UTO":
            names = without_broadcast_axes(array).ravel().tolist()
            return self.read_value(names, where, explicit=True, depth=depth + 1)
        check_has_values(array, where)
        if isinstance(array, np.matrix):
            array = np.asarray(array)  # its columns would stay matrices
        if is_mask(array):
            return self._read_mask(array, where)
        if isinstance(array, np.ndarray) and array.ndim == 1 and not is_present(array, where):
            return set()  # pandas makes NaN, or NaT, of a column of missing names
        return self._read_indexes(array, where)

    def _read_mask(self, mask: Any, where: str) -> set[str]:
        width = len(self.modalities)
        if mask.ndim not in (1, 2) or mask.shape[-1] != width:
            raise BatchMetadataError(
                f"{where} is a bool mask of shape {list(mask.shape)}; expected [{width}] or "
                f"[B, {width}], one column for each of {first_few(self.modalities, 20)}."
            )
        rows = without_broadcast_axes(mask, mask.ndim - 1)
        columns = (rows[None] if rows.ndim == 1 else rows).any(0).tolist()
        return {name for name, flag in zip(self.modalities, columns, strict=True) if flag}

    def _read_indexes(self, array: Any, where: str) -> set[str]:
        width = len(self.modalities)
        is_uint8 = array.dtype in (torch.uint8, np.uint8)
        if not is_integer(array) or is_uint8 or array.ndim != 1:
            hint = " Convert uint8 to bool or to int64: it may be a mask." if is_uint8 else ""
            raise BatchMetadataError(
                f"{where} is {describe(array)}, which names no modality; expected names, a bool "
                f"mask [{width}] or [B, {width}], or integer indexes [B].{hint} "
                f"{self.remedy()}"
            )
        # A masked array of numpy gives None for a hidden element.
        indexes = set(without_broadcast_axes(array).tolist()) - {-1, None}
        if wrong := sorted(index for index in indexes if not 0 <= index < width):
            raise BatchMetadataError(
                f"{where} contains the index {wrong[0]}; expected 0 to {width - 1} for "
                f"{first_few(self.modalities, 20)}, or -1 for none."
            )
        return {self.modalities[index] for index in indexes}
