"""The exceptions of the library, and how error messages describe values.

Each exception is also of the builtin type that a user would catch.
"""

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn


class ModalDummyError(Exception):
    """Base class of the library's own exceptions; wrong arguments raise builtin ones."""


class UnknownModalityError(ModalDummyError, ValueError):
    """A batch or a call names a modality that is not in the parameter map."""


class BatchMetadataError(ModalDummyError, ValueError):
    """A batch does not say, in any form that is understood, which modalities it contains."""


class ParameterMapError(ModalDummyError, ValueError):
    """A ``modality_param_map`` does not fit the model, or its parameters can get no gradient."""


class MissingGradientError(ModalDummyError, RuntimeError):
    """After a backward pass, parameters of the map have no gradient that an optimizer can use."""


class RankDisagreementError(ModalDummyError, RuntimeError):
    """Ranks differ in modalities where the engine does not support it, or a rank is missing."""


class RecordError(ModalDummyError, RuntimeError):
    """A forward pass does not fit what a shadow has recorded."""


class HistoryError(ModalDummyError, ValueError):
    """Logged metrics cannot be read, or contain no key that this library knows."""


class UnsupportedEngineError(ModalDummyError, RuntimeError):
    """An optimizer or a training engine does not support what was asked for."""


@contextmanager
def packages_needed(packages: str) -> Iterator[None]:
    """Say which optional packages to install if an import in the `with` block does not find one."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}. Install it: pip install {packages}") from error


def unknown_modality(name: object, known: Sequence[str], where: str) -> UnknownModalityError:
    """Error for `name`, found at `where`, that lists the `known` modalities and close matches."""
    match = close_match(name, known)
    hint = f"; did you mean {match!r}?" if match else "."
    spelt = f"{match!r}, not {describe(name)}"
    if match and not spelt.isascii():  # they may print alike
        hint = f"{hint} That is {spelt.encode('ascii', 'backslashreplace').decode()}."
    return UnknownModalityError(
        f"{where} names the modality {describe(name)}, which is not in `modality_param_map`"
        f"{hint} Known modalities: {first_few(map(repr, known), 20)}. Leave out names that own no "
        "parameters, for instance with a `resolver` of the wrapper."
    )


def close_match(word: object, options: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The one of `options` that is spelt most like `word`, or None.

    Upper case and the Unicode normal form do not matter. A `cutoff` near 1 allows few other slips.
    """
    folded = {_folded(option): option for option in reversed(options)}
    text = word if isinstance(word, str) else describe(word)
    close = difflib.get_close_matches(_folded(text), folded, n=1, cutoff=cutoff) if text else []
    return folded[close[0]] if close else None


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def first_few(words: Iterable[str], number: int = 6, separator: str = ", ") -> str:
    """The first words of a list, and how many more there are."""
    listed = list(words)
    more = [f"and {len(listed) - number} more"] if len(listed) > number else []
    return separator.join(listed[:number] + more)


def describe(value: object) -> str:
    """Short description of a value for an error message; large data are never printed."""
    if isinstance(value, str):
        return reprlib.repr(value)
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__} module"
    if isinstance(value, Tensor) and value.is_nested:  # it may have no shape
        return f"a nested {type(value).__name__} of dtype {value.dtype}"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {_repr(list(value.keys()))}"
    return f"{_repr(value)} ({type(value).__name__})"


def _repr(value: object) -> str:
    try:
        return " ".join(line.strip() for line in reprlib.repr(value).splitlines())
    except (ValueError, TypeError):  # thousands of digits; a class that is called `list`
        return "something that cannot be printed"
