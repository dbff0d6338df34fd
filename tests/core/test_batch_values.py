"""Single values of a batch: which are missing, and which attributes an object has."""

import math
from collections import UserList, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modaldummy import BatchMetadataError, active_modalities
from modaldummy._core.batch_values import attribute
from modaldummy._core.loss_function import find_loss, is_data, may_contain_metadata

KNOWN = ("T1", "rsfMRI", "dMRI")
X = torch.zeros(2, 3)

# --- Missing values ---------------------------------------------------------------------------


class NAType:
    """As in pandas: it equals nothing, and the answer has no truth value."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Scalar:
    """As in pyarrow."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def as_py(self) -> Any:
        return self.value


class Column:
    """As in pyarrow: no Collection, and its items are scalars of its own."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def to_pylist(self) -> list[Any]:
        return self.items


class Series:
    """As in pandas: the keys of a column are numbers, and need not be unique."""

    def __init__(self, items: list[Any], keys: list[Any] | None = None) -> None:
        self.items = items
        self.index = [0] * len(items) if keys is None else keys

    def keys(self) -> list[Any]:
        return self.index

    def __getitem__(self, key: Any) -> Any:
        places = [place for place, other in enumerate(self.index) if other == key]
        found = [self.items[place] for place in places]
        return found[0] if len(found) == 1 else Series(found, [key] * len(found))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, key: object) -> bool:
        return key in self.index

    def tolist(self) -> list[Any]:
        return self.items


def objects(items: list[Any]) -> Any:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


MISSING = {
    "None": None,
    "NaN": math.nan,
    "NaN of numpy": np.float32("nan"),
    "complex NaN": complex("nan"),
    "decimal NaN": Decimal("NaN"),
    "NaT of numpy": np.datetime64("NaT"),
    "duration NaT": np.timedelta64("NaT"),
    "NA": NAType(),
    "NaT": type("NaTType", (), {})(),
    "masked": np.ma.masked,
    "null": Scalar(None),
    "0-d array of None": np.array(None),
}
COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "UserList": UserList,
    "deque": deque,
    "values of a dict": lambda items: dict(enumerate(items)).values(),
    "Series": Series,
    "Series with names": lambda items: Series(items, ["sub-01"] * len(items)),
    "column": Column,
    "scalar": Scalar,
    "array": objects,
    "nested": lambda items: [{"x": items}],
}
PRESENT = ["scan.nii", 0.0, np.str_("scan.nii"), np.datetime64("2020-01-01"), X, object()]


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_column_without_any_value_is_inactive(missing: Any, column: Any) -> None:
    batch = {"T1": column([missing, missing]), "rsfMRI": missing, "dMRI": column([None, missing])}
    assert active_modalities(batch, KNOWN) == ()
    for value in PRESENT:
        assert active_modalities({"T1": column([missing, value])}, KNOWN) == ("T1",)


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_a_missing_name_is_none(missing: Any) -> None:
    """In a column of names, and in the row of a table."""
    for name in ("list", "Series", "column", "array"):
        names = COLUMNS[name](["T1", missing])
        assert active_modalities({"modality": names}, KNOWN) == ("T1",)
        assert active_modalities({"modality": COLUMNS[name]([missing])}, KNOWN) == ()
    for key in ("modality", "active_modalities"):
        assert active_modalities({key: missing, "dMRI": X}, KNOWN) == ("dMRI",)
    assert active_modalities({"modalities": {"T1": [missing], "dMRI": True}}, KNOWN) == ("dMRI",)
    record = SimpleNamespace(active_modalities=missing, modality="dMRI")
    assert active_modalities(record, KNOWN) == ("dMRI",)


NAN = np.full(2, np.nan)
ARRAYS: dict[str, tuple[Any, bool]] = {
    "column of NaN": (NAN, False),
    "column with a number": (np.array([np.nan, 0.0]), True),
    "column of NaT": (np.full(2, np.datetime64("NaT")), False),
    "columns of NaT": (np.full((2, 2), np.datetime64("NaT")), False),
    "masked column": (np.ma.masked_array(["a", "b"], mask=True), False),
    "column of empty strings": (np.array(["", ""]), False),
    "empty string of numpy": (np.str_(""), False),
    "0-d string": (np.array("scan.nii"), True),
    "image of NaN": (np.full((2, 2), np.nan), True),
    "tensor of NaN": (torch.from_numpy(NAN), True),
    "range": (range(10**12), True),
    "empty range": (range(0), False),
    "scalar of False": (Scalar(False), False),
}


@pytest.mark.parametrize(("value", "is_active"), ARRAYS.values(), ids=ARRAYS)
def test_a_1d_array_is_a_column_and_any_other_is_data(value: Any, is_active: bool) -> None:
    assert active_modalities({"T1": value, "dMRI": None}, KNOWN) == ("T1",) * is_active


def test_forms_in_columns_and_rows_of_tables() -> None:
    names = Series(["T1", "dMRI"])
    assert active_modalities(names, KNOWN) == ("T1", "dMRI")
    assert active_modalities(Column([{"T1": X}, {"modality": "dMRI"}]), KNOWN) == ("T1", "dMRI")
    assert active_modalities({"modality": NAN}, KNOWN) == ()
    row = Series(["scan.nii", math.nan], ["T1", "dMRI"])
    assert active_modalities([row, row], KNOWN) == ("T1",)
    with pytest.raises(BatchMetadataError, match=r"\['T1'\] contains numbers"):
        active_modalities({"modalities": {"T1": UserList([1, math.nan])}}, KNOWN)


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_a_column_of_paths_is_no_argument_with_metadata(missing: Any) -> None:
    assert not may_contain_metadata(Column(["scan.nii", missing]), KNOWN)
    assert not may_contain_metadata(["scan.nii", missing], KNOWN)
    assert may_contain_metadata(Column(["T1", missing]), KNOWN)


# --- Attributes -------------------------------------------------------------------------------


class AttrDict(dict[str, Any]):
    """In hundreds of repositories; it raises KeyError for an attribute that it does not have."""

    __getattr__ = dict.__getitem__


class MakesItems(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self.setdefault(name, MakesItems())


class Raising:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class MakesAttributes(Raising):
    def __getattr__(self, name: str) -> Any:
        setattr(self, name, MakesAttributes())
        return getattr(self, name)


class AnswersAll(Raising):
    def __getattr__(self, name: str) -> Any:
        return {}


class AnswersAllByCalls(Raising):
    def __getattr__(self, name: str) -> Any:
        return lambda *args: name


class Delegating:
    """Its fields are in another object, and what that raises is its own affair."""

    def __init__(self, **fields: Any) -> None:
        self.inner = fields

    def __getattr__(self, name: str) -> Any:
        return vars(self)["inner"][name]


ITEMS: list[Callable[..., Any]] = [AttrDict, MakesItems]
ATTRIBUTES: list[Callable[..., Any]] = [
    Raising,
    MakesAttributes,
    AnswersAll,
    AnswersAllByCalls,
    Delegating,
]


def state(value: Any) -> tuple[str, list[str]]:
    return repr(dict(value) if isinstance(value, dict) else value), sorted(vars(value))


@pytest.mark.parametrize("make", ITEMS + ATTRIBUTES)
def test_looking_for_an_attribute_raises_and_creates_nothing(make: Callable[..., Any]) -> None:
    """In a batch, in samples, inside of a batch, in arguments and in results."""
    value = make(x=X)
    before = state(value)
    for batch in (value, [value], {"x": value}):
        with pytest.raises(BatchMetadataError, match="does not say"):
            active_modalities(batch, KNOWN)
        may_contain_metadata(batch, KNOWN)
    assert active_modalities({"T1": value}, KNOWN) == ("T1",)
    assert not is_data(value)
    with pytest.raises(TypeError, match="must return a tensor"):
        find_loss(value)
    assert state(value) == before


@pytest.mark.parametrize("make", ITEMS + ATTRIBUTES)
def test_real_fields_are_read(make: Callable[..., Any]) -> None:
    loss = torch.ones(())
    assert find_loss(make(loss=loss))[1] is loss
    assert active_modalities(make(modality="T1"), KNOWN) == ("T1",)
    if make in ITEMS:
        assert active_modalities([make(T1=X, dMRI=None)], KNOWN) == ("T1",)


def test_a_property_may_raise() -> None:
    class Lazy(Raising):
        @property
        def modality(self) -> str:
            raise ConnectionError("the disk is gone")

    with pytest.raises(ConnectionError, match="the disk is gone"):
        attribute(Lazy(), "modality")


def test_a_callable_whose_attributes_raise_is_no_batch() -> None:
    class Call(Raising):
        def __call__(self) -> None:
            """A loss function may get another function."""

    assert is_data(Call())
