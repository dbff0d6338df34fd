"""Checks of numbers and flags that users pass as arguments."""

import math
from numbers import Real

from modaldummy._errors import describe


def check_number(
    name: str, value: object, *, positive: bool = False, alternative: str = ""
) -> float:
    """`value` as a float: a finite number of at least 0, or above 0 if `positive`.

    Args:
        name: Name of the argument.
        value: What was passed.
        positive: Whether 0 is refused.
        alternative: What else the caller accepts, for the message, such as ``" or None"``.

    Raises:
        TypeError: It is not a number.
        ValueError: It is a number outside of this range.
    """
    expected = f"`{name}` must be a finite number {'above' if positive else '>='} 0{alternative}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{expected}, got {describe(value)}.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not 0 <= number < math.inf or (positive and number == 0):
        raise ValueError(f"{expected}, got {describe(value)}.")
    return number


def check_number_or_none(name: str, value: object, *, positive: bool = False) -> float | None:
    """None if `value` is None, otherwise what `check_number` returns."""
    if value is None:
        return None
    return check_number(name, value, positive=positive, alternative=" or None")


def check_int(name: str, value: object, minimum: int) -> int:
    """`value` itself, if it is an int of at least `minimum`.

    Raises:
        TypeError: It is not an int.
        ValueError: It is below `minimum`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {describe(value)}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be {minimum} or more, got {describe(value)}.")
    return value


def check_bool(name: str, value: object) -> bool:
    """`value` itself, if it is True or False.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool, got {describe(value)}.")
    return value
