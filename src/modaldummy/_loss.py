"""The loss inside whatever a loss function returns."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from modaldummy._containers import with_item
from modaldummy._errors import describe

Result = TypeVar("Result")  # what a loss function returns


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
        f"or object with `loss`; got {describe(result)}. For a loss of any other kind use "
        "`wrapper.total(real, batch)`."
    )


def replace_loss(result: Any, total: Tensor) -> Any:
    """A result of the same kind with `total` as its loss; `result` itself is left as it is.

    Raises:
        TypeError: `result` cannot be copied, or its loss cannot be set.
    """
    if isinstance(result, Tensor):
        return total
    try:
        return with_item(result, _place_of_loss(result), total)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"The loss in {describe(result)}, which `loss_fn` returned, cannot be replaced on a "
            f"copy: {error}. Return a tensor, tuple, dict or plain object instead."
        ) from error


def _place_of_loss(result: Any) -> str | int:
    if isinstance(result, tuple) and hasattr(result, "_fields"):  # a named tuple
        return result._fields.index("loss") if hasattr(result, "loss") else 0
    return "loss" if hasattr(result, "loss") or isinstance(result, Mapping) else 0
