"""The loss inside whatever a loss function returns."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modaldummy._batch import describe


def check_loss(real: object, where: str) -> Tensor:
    """`real` if it is a tensor that a loss can be."""
    if not isinstance(real, Tensor):
        raise TypeError(f"{where} must be a tensor, got {describe(real)}.")
    if real.is_complex():
        raise TypeError(
            f"{where} must be real-valued, got {describe(real)}; take `.real` or `.abs()` first."
        )
    return real


def take_loss(result: Any) -> Tensor:
    """The loss in the return value of a loss function.

    It is the value itself, what it holds as `loss`, or the first item of a tuple or list.
    """
    if isinstance(result, Tensor):
        return check_loss(result, "The return value of `loss_fn`")
    if isinstance(result, Mapping) and "loss" in result:
        return check_loss(result["loss"], "`loss_fn(...)['loss']`")
    if hasattr(result, "loss"):
        return check_loss(result.loss, "`loss_fn(...).loss`")
    if isinstance(result, (tuple, list)) and result:
        return check_loss(result[0], "`loss_fn(...)[0]`")
    raise TypeError(
        "`loss_fn` must return a tensor, a tuple or list that starts with the loss, or a mapping "
        f"or object with `loss`; got {describe(result)}."
    )


def replace_loss(result: Any, total: Tensor) -> Any:
    """A result of the same kind with `total` as its loss; `result` itself is left as it is."""
    if isinstance(result, Tensor):
        return total
    changed = copy.copy(result)
    if isinstance(result, Mapping) and "loss" in result:
        changed["loss"] = total
        return changed
    if isinstance(result, tuple) and hasattr(result, "_replace"):
        first = result._fields[0]  # type: ignore[attr-defined]  # a named tuple
        return result._replace(**{"loss" if hasattr(result, "loss") else first: total})
    if hasattr(result, "loss"):
        # Frozen dataclasses refuse setattr, also on a copy that nobody else has seen.
        object.__setattr__(changed, "loss", total)
        return changed
    if isinstance(result, tuple):
        return (total, *result[1:])
    changed[0] = total
    return changed
