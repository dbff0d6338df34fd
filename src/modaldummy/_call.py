"""Which argument of a call to a loss function says what its batch holds."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor, nn

from modaldummy._batch import EXPLICIT_KEYS, Reader
from modaldummy._errors import BatchMetadataError, describe
from modaldummy._values import MAX_NESTING, is_plain_collection

Resolver = Callable[[Any], Iterable[str]]

_KEYWORD = "modalities"
# What a resolver written for one kind of batch raises when it is asked about another argument.
_CANNOT_READ = (BatchMetadataError, LookupError, TypeError, AttributeError)


class CallReader:
    """Finds the active modalities in the arguments of calls to one loss function.

    Args:
        loss_fn: The loss function.
        reader: Reads what stands under an explicit name, and everything if there is no `resolver`.
        resolver: The user's own reader of batches.
    """

    def __init__(
        self, loss_fn: Callable[..., Any], reader: Reader, resolver: Resolver | None
    ) -> None:
        self._reader = reader
        self._resolver = resolver
        self._bound: tuple[Any, ...] = ()
        self._bound_keywords: dict[str, Any] = {}
        if isinstance(loss_fn, functools.partial):
            # What it binds is an argument like any other, but no part of its own signature.
            self._bound, self._bound_keywords = loss_fn.args, loss_fn.keywords
            loss_fn = loss_fn.func
        self._signature = _signature(loss_fn)
        self._names_keyword = self._signature is not None and _KEYWORD in self._signature.parameters

    def take_keyword(self, kwargs: dict[str, Any]) -> Any:
        """Remove `modalities=` from `kwargs` unless the loss function itself names it."""
        if self._names_keyword:
            return None
        return kwargs.pop(_KEYWORD, None)

    def active(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Any) -> set[str]:
        """Active modalities of a call; `given` is what `take_keyword` took off it."""
        if given is not None:
            return self._reader.read(given, f"`{_KEYWORD}=`", explicit=True)
        arguments = self._arguments(args, kwargs)
        for key in EXPLICIT_KEYS:
            if arguments.get(key) is not None:
                return self._reader.read(arguments[key], f"`{key}=`", explicit=True)
        reasons = {}
        for name, argument in arguments.items():
            if not self._is_worth_asking(argument):
                reasons[name] = " (not asked)"
                continue
            found, reasons[name] = self._ask(argument, name)
            if found is not None:
                return found
        # Described only now: to print a model or a tensor takes time at each step.
        lines = (f"\n  - {name}: {describe(arguments[name])}{reasons[name]}" for name in reasons)
        raise BatchMetadataError(
            "No argument of the loss function says which modalities its batch holds. "
            f"Arguments:{''.join(lines) or ' none.'}\n{self._reader.fixes()}"
        )

    def _is_worth_asking(self, argument: Any) -> bool:
        if self._resolver is not None:
            return not is_data(argument)
        return may_hold_metadata(argument, self._reader.modalities)

    def _ask(self, argument: Any, name: str) -> tuple[set[str] | None, str]:
        """The modalities that `argument` holds, or None and why it could not be read."""
        where = f"argument `{name}`"
        if self._resolver is None:
            return self._reader.probe(argument, where), ""
        try:
            names = self._resolver(argument)
        except _CANNOT_READ as error:
            return None, f"; `resolver` raised {type(error).__name__}: {error}"
        if names is None:
            return None, "; `resolver` returned None"
        return check_names(names, self._reader), ""

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, in signature order; `*args` and `**kwargs` are taken apart."""
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
    """Whether an argument is of a type that never holds the metadata of a batch.

    Such are tensors, arrays, numbers, strings, modules, callables without keys, and None.
    """
    never = (Tensor, np.ndarray, Number, np.generic, str, bytes, nn.Module, type)
    if argument is None or isinstance(argument, never):
        return True
    # A batch that can be called, such as PyG's `Data`, has keys.
    return callable(argument) and not hasattr(argument, "keys")


def may_hold_metadata(argument: object, modalities: Sequence[str], depth: int = 0) -> bool:
    """Whether an argument of a loss function is worth asking for the modalities of its batch.

    Data is not, nor is a collection without any known modality, mapping or object in it, such as a
    list of captions, boxes or tensors.
    """
    if not is_plain_collection(argument):
        return not is_data(argument)
    items: Collection[Any] = argument  # type: ignore[assignment]  # which was just established
    return depth <= MAX_NESTING and any(
        item in modalities
        if isinstance(item, str)
        else may_hold_metadata(item, modalities, depth + 1)
        for item in items
    )


def check_names(names: Any, reader: Reader) -> set[str]:
    """What a user's resolver returned, in any form that can stand under an explicit key."""
    if isinstance(names, Iterator):
        names = list(names)
    return reader.read(names, "The result of `resolver`", explicit=True)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except ValueError:  # some builtins have none
        return None
