"""Looks into single values of a batch: their named fields, and whether they contain anything."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modaldummy._errors import BatchMetadataError, describe

MAX_NESTING = 16
_STRINGS = (str, bytes, bytearray, memoryview)
# Types of most values in a batch, for which nothing is probed: that would take most of the time.
COMMON_TYPES = frozenset((str, dict, list, tuple, bool, Tensor))
_NO_FIELD = "modaldummy_asks_for_no_field"
_INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("u", "") for bits in (8, 16, 32, 64)}


class Fields(NamedTuple):
    """Named fields of a value: the keys of a mapping, the attributes of a record.

    Attributes:
        keys: Names of the fields.
        get: Returns the value of a field.
        may_be_searched: Whether any field may be read. For a type that only resembles a mapping it
            is False, because reading a field can create it.
    """

    keys: list[Any]
    get: Callable[[Any], Any]
    may_be_searched: bool


def attribute(value: object, name: str, default: Any = None) -> Any:
    """An attribute of a value, or `default`; the value stays as it is.

    What its class or the value itself defines is read as usual, and a property may raise. Errors of
    `__getattr__` mean that there is no attribute, and so do answers if it answers any name. On a
    mapping it is not called: it may create an item.
    """
    if not hasattr(type(value), "__getattr__"):
        return getattr(value, name, default)
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        if isinstance(value, Mapping):
            return default
    try:
        getattr(value, _NO_FIELD)
    except Exception:  # which one, the class decides
        with contextlib.suppress(Exception):
            return getattr(value, name)
    else:
        with contextlib.suppress(Exception):
            delattr(value, _NO_FIELD)  # the class may have created it
    return default


def fields_of(value: Any) -> Fields | None:
    """The named fields of a mapping, TensorDict-like, dataclass or named tuple, else None."""
    if isinstance(value, type):
        return None
    if isinstance(value, Mapping):
        # Not `list(value)`: a TensorDict is a Mapping that iterates over rows.
        return Fields(list(value.keys()), value.__getitem__, True)
    if isinstance(value, tuple) and (names := getattr(type(value), "_fields", None)) is not None:
        return Fields(list(names), functools.partial(getattr, value), True)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        # A field with `init=False` may not have been set yet.
        return Fields(names, lambda name: getattr(value, name, None), True)
    if hasattr(type(value), "node_types") and hasattr(type(value), "__getitem__"):
        # PyG's HeteroData: its keys are attributes of nodes, and reading an item by such a name
        # would add a node type.
        return Fields([], value.__getitem__, False)
    if hasattr(type(value), "keys") and hasattr(type(value), "__getitem__"):
        keys = value.keys() if callable(value.keys) else value.keys
        names = list(keys) if isinstance(keys, Iterable) else [keys]
        # A pandas Series that is a column has numbers for keys.
        if not names or any(isinstance(name, str) for name in names):
            return Fields(names, value.__getitem__, False)
    return None


def is_collection(value: object) -> bool:
    """Whether `value` is a collection without named fields, and not a string or an array."""
    other = (Tensor, np.ndarray, *_STRINGS)
    if not isinstance(value, Collection) or isinstance(value, other):
        return False
    return fields_of(value) is None


def unbox(value: Any) -> Any:
    """The Python object that a column or scalar of pyarrow, or a 0-d array, contains."""
    if type(value) in COMMON_TYPES:
        return value
    for convert in ("as_py", "to_pylist"):
        if hasattr(type(value), convert):
            return getattr(value, convert)()
    is_box = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "OSTU"
    return value.item() if is_box else value


def is_missing(value: object) -> bool:
    """Whether a scalar stands for no value: None, NaN, NaT, NA of pandas, a masked element.

    The type decides before anything is compared, which could synchronize with a device.
    """
    if type(value) in COMMON_TYPES:
        return False
    if value is None or value is np.ma.masked:
        return True
    if isinstance(value, (Number, np.datetime64, np.timedelta64)):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")  # of pandas, which is not imported


def is_present(value: Any, where: str, depth: int = 0) -> bool | Tensor:
    """Whether the value of a mapping keyed by modality means that the modality is active.

    For a mask the answer is a bool tensor of shape `[]`, still on its device.
    """
    check_depth(depth, where)
    value = unbox(value)
    if is_missing(value):
        return False
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    is_array = isinstance(value, (Tensor, np.ndarray))
    if is_array and is_mask(value):
        check_has_values(value, where)
        present = without_broadcast_axes(value).any()
        return present if isinstance(value, Tensor) else bool(present)
    is_number = isinstance(value, (Number, np.generic)) and not isinstance(value, _STRINGS)
    if is_number or (is_array and value.ndim == 0):
        if depth > 0:
            return True
        raise BatchMetadataError(
            f"{where} is a number, {describe(value)}, which could be data or a flag. Use True or "
            "False for a flag, an array of at least one dimension for data."
        )
    if (parts := _parts_of(value)) is not None:
        return any(is_present(part, where, depth + 1) for part in parts)
    if isinstance(value, Tensor):
        return value.numel() > 0
    if isinstance(value, np.ndarray):
        return value.size > 0
    return len(value) > 0 if isinstance(value, Sized) else True


def _parts_of(value: Any) -> Iterable[Any] | None:
    """The items or fields of a container; None for single objects, tensors and images.

    A 1-d array is a column of numbers, which may all be missing. Other arrays of numbers are data.
    """
    if isinstance(value, (Tensor, *_STRINGS)):
        return None
    if isinstance(value, np.ndarray):
        items: Iterable[Any] = without_broadcast_axes(value)
        return items if value.ndim == 1 or value.dtype.kind in "MOSTUm" else None
    fields = fields_of(value)
    # The keys of a pandas Series may not be unique, so that its values are read without them.
    if fields and (fields.may_be_searched or not hasattr(type(value), "tolist")):
        return (fields.get(key) for key in fields.keys)
    return value if isinstance(value, Collection) else None


def is_like_collated_flags(value: Any) -> bool:
    """Whether `value` is a list or array of numbers, as collated flags of samples would be."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 1 and not is_mask(value)
    items = value if is_collection(value) else ()
    numbers = (item for item in items if isinstance(item, Number) and not isinstance(item, bool))
    return not all(map(is_missing, numbers))


def check_depth(depth: int, where: str) -> None:
    """Refuse a value inside of more than `MAX_NESTING` containers."""
    if depth > MAX_NESTING:
        raise BatchMetadataError(
            f"{where} is nested more than {MAX_NESTING} levels deep; pass a list of names."
        )


def check_has_values(array: Any, where: str) -> None:
    """Refuse a tensor that has no values, or whose values cannot be read one by one."""
    if isinstance(array, Tensor) and (
        array.is_meta or array.is_nested or array.layout != torch.strided
    ):
        raise BatchMetadataError(
            f"{where} is a tensor of dtype {array.dtype} and layout {array.layout} on the device "
            f"{array.device}, whose values cannot be read; pass a dense mask or a list of names."
        )


def without_broadcast_axes(array: Any, axes: int | None = None) -> Any:
    """An array without the repeats that `expand` or `broadcast_to` made along its first axes.

    It has the same set of values, and reading it takes no longer than its memory is large.

    Args:
        array: Of torch or numpy.
        axes: How many of the first axes may be shortened; all by default.
    """
    strides = array.stride() if isinstance(array, Tensor) else array.strides
    if 0 not in strides[:axes]:
        return array
    return array[tuple(slice(None if stride else 1) for stride in strides[:axes])]


def is_mask(array: Any) -> bool:
    """Whether an array of torch or numpy is one of bools."""
    return array.dtype in (torch.bool, np.bool_)


def is_integer(array: Any) -> bool:
    """Whether an array of torch or numpy is one of integers."""
    if isinstance(array, np.ndarray):
        return array.dtype.kind in "iu"
    return array.dtype in _INTEGERS
