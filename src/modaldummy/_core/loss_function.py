"""A wrapped loss function: where a call says what its batch contains, and where the loss is."""

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping
from numbers import Number
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modaldummy._core.batch import EXPLICIT_KEYS, BatchReader
from modaldummy._core.batch_values import MAX_NESTING, attribute, is_collection, is_missing, unbox
from modaldummy._errors import BatchMetadataError, describe

Result = TypeVar("Result")  # what a loss function returns

_KEYWORD = "modalities"
# What a resolver written for one kind of batch may raise when it gets another argument.
_RESOLVER_ERRORS = (BatchMetadataError, LookupError, TypeError, AttributeError)


class WrappedLoss(Generic[Result]):
    """A loss function whose loss includes the dummy term.

    A copy of a model copies the loss functions in it with their wrappers.

    Args:
        loss_fn: The loss function, whose name, documentation and signature this object shows.
        wrapper: Has the `reader` for the arguments, and `add`, which makes a total of a loss.

    Attributes:
        wrapper: As given.
    """

    def __init__(self, loss_fn: Callable[..., Result], wrapper: Any) -> None:
        # Without the `__dict__` of a module, this object shows none of its parameters.
        updated = ("__dict__",) if inspect.isroutine(loss_fn) else ()
        functools.update_wrapper(self, loss_fn, updated=updated)
        self.wrapper = wrapper
        self._loss_fn = loss_fn
        self._call_reader = CallReader(loss_fn, wrapper.reader)

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        given = self._call_reader.pop_keyword(kwargs)
        if not torch.is_grad_enabled():
            return self._loss_fn(*args, **kwargs)
        active = self._call_reader.active(args, kwargs, given)
        result = self._loss_fn(*args, **kwargs)
        place, loss = find_loss(result)
        total = self.wrapper.add(loss, active)
        return result if total is loss else replace_loss(result, place, total)

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Result]:
        # As a method of a class it gets `self`, like a function.
        return self if instance is None else types.MethodType(self, instance)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WrappedLoss[Result]":
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # A decorated function of a module is pickled by name, like any function.
        name = getattr(self, "__qualname__", "")
        is_global = getattr(sys.modules.get(self.__module__), name, None) is self
        return name if is_global else super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"<{describe(self._loss_fn)}, wrapped by a DummyLossWrapper>"


class CallReader:
    """Finds the active modalities in the arguments of calls to one loss function.

    Args:
        loss_fn: The loss function.
        reader: Reads the modalities from an argument.
    """

    def __init__(self, loss_fn: Callable[..., Any], reader: BatchReader) -> None:
        self._reader = reader
        self._bound: tuple[Any, ...] = ()
        self._bound_keywords: dict[str, Any] = {}
        if isinstance(loss_fn, functools.partial):
            # Bound values are arguments like any other, but not in the signature of the partial.
            self._bound, self._bound_keywords = loss_fn.args, loss_fn.keywords
            loss_fn = loss_fn.func
        self._signature: inspect.Signature | None = None
        self._accepts_keyword = False
        with contextlib.suppress(ValueError):  # some builtins have no signature
            self._signature = inspect.signature(loss_fn)
            self._accepts_keyword = _KEYWORD in self._signature.parameters
        if isinstance(loss_fn, nn.Module):  # its `__call__` passes everything to `forward`
            self._accepts_keyword |= _KEYWORD in inspect.signature(loss_fn.forward).parameters

    def pop_keyword(self, kwargs: dict[str, Any]) -> Any:
        """Remove `modalities=` from `kwargs` unless the loss function itself has that parameter."""
        return None if self._accepts_keyword else kwargs.pop(_KEYWORD, None)

    def active(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Any) -> set[str]:
        """Active modalities of a call; `given` is what `pop_keyword` returned.

        Raises:
            BatchMetadataError: No argument says which modalities the batch contains.
        """
        if given is not None:
            return self._reader.read_value(given, f"`{_KEYWORD}=`", explicit=True)
        arguments = self._arguments(args, kwargs)
        for key in EXPLICIT_KEYS:
            if arguments.get(key) is not None:
                return self._reader.read_value(arguments[key], f"`{key}=`", explicit=True)
        reasons = {}
        for name in sorted(arguments, key=lambda name: is_text(arguments[name])):
            active, reasons[name] = self._ask(arguments[name], name)
            if active is not None:
                return active
        # Described only now: printing a model or a tensor at each step would take time.
        lines = (f"\n  - {name}: {describe(arguments[name])}{reasons[name]}" for name in arguments)
        raise BatchMetadataError(
            "No argument of the loss function says which modalities its batch contains. "
            f"Arguments:{''.join(lines) or ' none.'}\n{self._reader.remedy()}"
        )

    def _ask(self, argument: Any, name: str) -> tuple[set[str] | None, str]:
        """The modalities that `argument` names, or None and why it could not be read."""
        resolver, known = self._reader.resolver, self._reader.known_names
        if is_data(argument) or (resolver is None and not may_contain_metadata(argument, known)):
            return None, " (not asked)"
        if resolver is None:
            return self._reader.try_read(argument, f"argument `{name}`"), ""
        try:
            names = resolver(argument)
        except _RESOLVER_ERRORS as error:
            return None, f"; `resolver` raised {type(error).__name__}: {error}"
        if names is None:
            return None, "; `resolver` returned None"
        return self._reader.read_resolver_result(names), ""

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, in signature order; `*args` and `**kwargs` item by item."""
        args, kwargs = self._bound + args, {**self._bound_keywords, **kwargs}
        if self._signature is None:
            return {f"argument {index}": value for index, value in enumerate(args)} | kwargs
        arguments: dict[str, Any] = {}
        bound = self._signature.bind(*args, **kwargs).arguments
        for index, (name, value) in enumerate(bound.items()):
            kind = self._signature.parameters[name].kind
            if index == 0 and name in ("self", "cls"):
                continue
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments |= {f"*{name}[{i}]": item for i, item in enumerate(value)}
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= {f"**{name}": value} | value
            else:
                arguments[name] = value
        return arguments


def is_data(argument: object) -> bool:
    """Whether an argument has a type that never contains the metadata of a batch.

    These are tensors, arrays, numbers, strings, modules, callables without keys, and None.
    """
    never = (Tensor, np.ndarray, Number, np.generic, str, bytes, nn.Module, type)
    if is_missing(argument) or isinstance(argument, never):
        return True
    # A batch that can be called, such as PyG's `Data`, has keys.
    return callable(argument) and not hasattr(type(argument), "keys")


def is_text(argument: Any, depth: int = 0) -> bool:
    """Whether an argument contains only strings: captions, perhaps, so that others go first."""
    if depth > MAX_NESTING or not is_collection(argument):
        return isinstance(argument, str)
    return all(is_text(item, depth + 1) for item in argument)


def may_contain_metadata(argument: Any, modalities: Collection[str], depth: int = 0) -> bool:
    """Whether an argument of a loss function may contain the modalities of its batch.

    Data does not. A collection may, if an item is the name of a modality, a mapping or an object;
    a list of captions, boxes or tensors does not.
    """
    argument = unbox(argument)
    if not is_collection(argument):
        return not is_data(argument)
    return depth <= MAX_NESTING and any(
        item in modalities
        if isinstance(item, str)
        else may_contain_metadata(item, modalities, depth + 1)
        for item in argument
    )


def check_loss(loss: object, where: str) -> Tensor:
    """`loss` if it is a real-valued tensor.

    Raises:
        TypeError: It is not; the text begins with `where`.
    """
    if not isinstance(loss, Tensor):
        is_number = isinstance(loss, (Number, np.generic, np.ndarray))
        hint = " Drop `.item()`, `float()` or `.numpy()`." if is_number else ""
        raise TypeError(f"{where} must be a tensor, got {describe(loss)}.{hint}")
    if loss.is_complex():
        raise TypeError(
            f"{where} must be real-valued, got {describe(loss)}. Take `.real` or `.abs()` first."
        )
    return loss


def find_loss(result: Any) -> tuple[str | int | None, Tensor]:
    """Where the loss is in what a loss function returned, and the loss.

    It is the item or attribute `loss`, the first item of a tuple or list, or `result` itself; then
    the place is None.

    Raises:
        TypeError: `result` contains no loss.
    """
    if isinstance(result, (Tensor, Number, np.generic, np.ndarray)):
        return None, check_loss(result, "The return value of `loss_fn`")
    if isinstance(result, Mapping) and "loss" in result:
        return "loss", check_loss(result["loss"], "`loss_fn(...)['loss']`")
    if (loss := attribute(result, "loss", result)) is not result:
        fields = getattr(type(result), "_fields", ())  # of a named tuple
        place = fields.index("loss") if "loss" in fields else "loss"
        return place, check_loss(loss, "`loss_fn(...).loss`")
    if isinstance(result, (tuple, list)) and result:
        return 0, check_loss(result[0], "`loss_fn(...)[0]`")
    raise TypeError(
        "`loss_fn` must return a tensor, a tuple or list that starts with the loss, or a mapping "
        f"or object with `loss`; got {describe(result)}. For any other result use "
        "`wrapper.total(loss, batch)`."
    )


def replace_loss(result: Any, place: str | int | None, total: Tensor) -> Any:
    """A result of the same type with `total` at `place`; `result` itself is not changed.

    Raises:
        TypeError: `result` cannot be copied, or its loss cannot be set.
    """
    if place is None:
        return total
    try:
        return with_item(result, place, total)
    except Exception as error:  # `copy` runs code of the result
        raise TypeError(
            f"The loss in {describe(result)}, which `loss_fn` returned, cannot be replaced on a "
            f"copy: {error}. Return a tensor, tuple, dict or plain object instead."
        ) from error


def with_item(container: Any, place: Any, item: Any) -> Any:
    """A shallow copy of `container` with `item` at `place`.

    Args:
        container: A tuple, list, mapping or any other object.
        place: An index, a key of a mapping, or the name of an attribute.
        item: What to put there.
    """
    if isinstance(container, tuple) and isinstance(place, int):
        items = [*container[:place], item, *container[place + 1 :]]
        # A named tuple takes its items one by one.
        return container._make(items) if hasattr(container, "_make") else tuple(items)
    changed = copy.copy(container)
    if isinstance(place, int) or (isinstance(container, Mapping) and place in container):
        changed[place] = item
        # An attribute dictionary with `self.__dict__ = self` has it as an attribute too.
        if attribute(container, "__dict__", {}).get(place) is not container[place]:
            return changed
    # Frozen dataclasses refuse setattr, also on a copy that no one else has seen.
    object.__setattr__(changed, place, item)
    return changed
