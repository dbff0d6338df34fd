"""Single values that nobody meant for a batch: of every type, endless, hostile."""

import itertools
import math
from collections import UserList, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum, StrEnum
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import torch

from modaldummy._core.batch import EXPLICIT_KEYS


class Planted(Exception):  # noqa: N818  # no error of ours
    """What hostile values raise; it is passed on, and nothing else is."""


class Colour(Enum):
    T1 = "T1"
    RED = 1


class Modality(StrEnum):
    T1 = "T1"
    DMRI = "dMRI"


class Name(str):
    """Equal to what it says, and unlike it in print."""

    def __repr__(self) -> str:
        raise Planted


class Moody(str):
    """A string that will not be compared."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise Planted


class Raising:
    """Each attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise Planted


class Mirror:
    """Each attribute is the value itself."""

    def __getattr__(self, name: str) -> Any:
        return self


class Maker:
    """Each attribute is made when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        setattr(self, name, Maker())
        return getattr(self, name)


class AttrDict(dict[Any, Any]):
    """Its items are its attributes, and one that it does not have could be created."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


class NAType:
    """As in pandas, it equals nothing, and the answer has no truth value."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise Planted

    __hash__ = None  # type: ignore[assignment]


class Scalar:
    """As in pyarrow."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def as_py(self) -> Any:
        return self.value


class Unsized:
    """Looks like a collection, and is none."""

    def __len__(self) -> int:
        raise Planted

    def __iter__(self) -> Any:
        raise Planted

    def __contains__(self, item: object) -> bool:
        raise Planted


class Keyed:
    """Has keys that are no method, and gives everything for each."""

    def __init__(self, keys: Any, value: Any) -> None:
        self.keys, self.value = keys, value

    def __getitem__(self, key: Any) -> Any:
        return self.value


class Column(UserList[Any]):
    """As in pandas: a collection whose keys are numbers, or names that need not be unique."""

    names: Any = None

    def keys(self) -> Any:
        return range(len(self)) if self.names is None else [self.names] * len(self)

    def __getitem__(self, key: Any) -> Any:
        return Column(self.data) if isinstance(key, str) else self.data[key]

    def tolist(self) -> Any:
        return self.data


class Nulls(Column):
    """As in pyarrow: it can be read as a list only."""

    __iter__ = None  # type: ignore[assignment]

    def to_pylist(self) -> Any:
        return self.data


@dataclass
class Record:
    x: Any
    modality: Any = None
    T1: Any = None
    unset: Any = field(init=False)


Pair = namedtuple("Pair", ["inputs", "targets"])
Scans = namedtuple("Scans", ["T1", "modalities"])

STRINGS = [
    *("T1", "T1", "dMRI", "rsfMRI", "T1w", "T", "t1", " T1", "T10", "", "é", "\ud800", "\0"),
    *("T1,dMRI", "missing_modalities", "x" * 100_000, "modality", "inputs", "labels", "keys", "0"),
]
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int64, torch.uint16, torch.float16, torch.float64),
    *(torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bits8),
]
KINDS = ["?", "u1", "i8", "f2", "f8", "c8", "U3", "S3", "O", "M8[s]", "m8[s]", "V4", "i4,U2", "T"]


def _tensor(random: Random) -> Any:
    shape = random.choice([(), (0,), (1,), (3,), (2,), (3, 3), (0, 3), (1, 1), (2, 1, 3)])
    tensor = torch.zeros(shape, dtype=torch.uint8)
    for index in range(tensor.numel()):
        tensor.view(-1)[index] = random.randrange(3)
    dtype = random.choice(DTYPES)
    if dtype is torch.bits8:
        return torch.empty(shape, dtype=dtype)
    tensor = tensor.to(dtype)
    kind = random.randrange(10)
    if kind == 0:
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == 1 and dtype in (torch.bool, torch.int64, torch.float64):
        return tensor.to_sparse() if tensor.ndim else tensor
    if kind == 2 and dtype in (torch.bool, torch.float64) and tensor.ndim == 2:
        return tensor.to_sparse_csr()
    if kind == 3:
        return tensor[None].expand(10**9, *shape)  # of which memory has one row
    if kind == 4:
        return tensor.mT if tensor.ndim == 2 else tensor.requires_grad_(dtype.is_floating_point)
    return torch.nn.Parameter(tensor, requires_grad=False) if kind == 5 else tensor


def _numpy(random: Random) -> Any:
    kind = random.choice(KINDS)
    dtype: Any = np.dtypes.StringDType() if kind == "T" else np.dtype(kind)
    shape = random.choice([(), (0,), (1,), (3,), (3, 3), (0, 3), (2, 1, 3)])
    array = np.zeros(shape, dtype=dtype)
    if kind in ("?", "u1", "i8", "f8"):
        for place in np.ndindex(shape):
            array[place] = random.randrange(0 if kind == "u1" else -1, 4)
    elif kind in ("U3", "O", "T"):
        array[...] = random.choice(["T1", "dMR", ""] + [None, 1, math.nan] * (kind == "O"))
    form = random.randrange(8)
    if form == 0:
        return np.broadcast_to(array, (10**9, *shape))
    if form == 1 and array.ndim == 2 and kind != "i4,U2":
        return array.view(np.matrix) if kind in "?i8f8" else array.T
    if form == 2:
        return np.ma.masked_array(array, mask=random.random() < 0.5) if kind in "?i8f8" else array
    return array[()] if form == 3 else array


def _numbers(random: Random) -> Any:
    return random.choice(
        [
            *(math.nan, NAType(), np.ma.masked, Scalar(None), Scalar("T1"), Scalar(math.nan)),
            *(0, 1, -1, 10**5000, 0.0, math.nan, math.inf, 1j, Decimal("NaN"), Fraction(1, 3)),
            *(np.int8(1), np.float32("nan"), np.datetime64("NaT"), np.bool_(True)),
            *(np.str_("T1"), np.bytes_(b"T1")),
        ]
    )


def _others(random: Random) -> Any:
    return random.choice(
        [
            *(object(), ..., NotImplemented, int, Record, Colour, len, lambda: "T1", slice(3)),
            *(Colour.T1, Colour.RED, Modality.T1, Name("T1"), Name("x"), Moody("T1")),
            *(b"T1", bytearray(b"T1"), memoryview(b"T1"), memoryview(bytes(4)).cast("B", (2, 2))),
            *(range(3), range(10**12), torch.nn.Identity(), torch.bool, torch.Size([3])),
            *(
                Raising(),
                Mirror(),
                Maker(),
                AttrDict(T1=True),
                AttrDict(modality=math.nan),
                Unsized(),
                torch.Generator(),
            ),
        ]
    )


def _endless(random: Random) -> Any:
    """What holds itself, or is far too deep."""
    kind = random.randrange(6)
    inner: Any = random.choice(["T1", None, True])
    if kind < 2:
        for _ in range(random.choice([15, 16, 17, 40, 3000])):
            inner = [inner] if kind else {random.choice([*EXPLICIT_KEYS, "T1", "x"]): inner}
        return inner
    if kind == 2:
        own: list[Any] = [inner]
        own *= random.choice([1, 5])
        own.insert(random.choice([0, 9]), own)
        return own
    if kind == 3:
        mapping: dict[str, Any] = {}
        mapping[random.choice([*EXPLICIT_KEYS, "T1", "x"])] = mapping
        return mapping
    if kind == 4:
        array = np.empty(1, dtype=object)
        array[0] = array
        return array
    return (name for name in itertools.repeat("T1"))


LEAVES: list[Callable[[Random], Any]] = [
    lambda random: random.choice(STRINGS),
    lambda random: random.choice([None, True, False]),
    _tensor,
    _numpy,
    _numbers,
    _others,
    _endless,
]
WEIGHTS = [8, 4, 3, 3, 2, 3, 1]
