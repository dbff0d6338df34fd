"""Every number and flag that a user passes is checked here; callers only name their argument."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from modaldummy._numbers import check_bool, check_int, check_number, check_number_or_none

NUMBERS = [0, 1, 1e-7, 5e-324, Fraction(1, 4), np.float32(0.5), np.float64(2), np.int64(3)]
# Of the right type, but outside of every range that is asked for.
OUT_OF_RANGE = [-1, -1e-7, math.inf, -math.inf, math.nan, np.float32("inf"), 10**5000, -(10**400)]
NO_NUMBERS = [True, np.bool_(True), "1e-7", None, [1.0], 1j, torch.tensor(1.0), np.array([1.0])]

check_size = partial(check_int, minimum=1)
REFUSED: dict[str, tuple[Callable[[str, Any], object], list[Any], type[Exception], str]] = {
    "no number": (check_number, NO_NUMBERS, TypeError, "a finite number >= 0, got "),
    "out of range": (check_number, OUT_OF_RANGE, ValueError, "a finite number >= 0, got "),
    "zero": (
        partial(check_number_or_none, positive=True),
        [0, 0.0, -0.0],
        ValueError,
        "a finite number above 0 or None, got ",
    ),
    "no int": (check_size, [True, 1.0, "1", None, np.int64(1)], TypeError, "an int, got "),
    "too small": (check_size, [0, -1, -(10**5000)], ValueError, "1 or more, got "),
    "no bool": (check_bool, [0, 1, "no", None, np.bool_(True)], TypeError, "a bool, got "),
}


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_a_number_becomes_a_float(value: Any) -> None:
    number = check_number("x", value)
    assert type(number) is float
    assert number == value
    assert check_number_or_none("x", value) == value


def test_none_is_a_number_only_where_it_is_accepted() -> None:
    assert check_number_or_none("x", None) is None


def test_an_int_or_a_bool_is_returned_as_it_is() -> None:
    assert check_int("x", 1, 1) == 1
    assert check_int("x", 10**400, 0) == 10**400
    assert check_bool("x", True) is True
    assert check_bool("x", False) is False


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_by_name(
    case: tuple[Callable[[str, Any], object], list[Any], type[Exception], str],
) -> None:
    """The type of the error says whether the type or the value is wrong."""
    check, values, kind, expected = case
    for value in values:
        with pytest.raises(kind, match=f"^`x` must be {expected}") as error:
            check("x", value)
        assert len(str(error.value)) < 200  # not all digits of a huge number
