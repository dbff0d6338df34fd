"""Exceptions of the library, each also the builtin that a user would catch, and their words."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn


class ModalDummyError(Exception):
    """Base class of the library's own exceptions; mere wrong arguments raise builtin ones."""


class UnknownModalityError(ModalDummyError, ValueError):
    """A batch or a call names a modality that the parameter map does not have."""


class BatchMetadataError(ModalDummyError, ValueError):
    """A batch does not say, in any form that is understood, which modalities it holds."""


class ParameterMapError(ModalDummyError, ValueError):
    """A ``modality_param_map`` does not fit the model, or what it selects can get no gradient."""


class MissingGradientError(ModalDummyError, RuntimeError):
    """After a backward pass, parameters of the map have no gradient that an optimizer can use."""


class RankDisagreementError(ModalDummyError, RuntimeError):
    """Ranks hold different modalities where their engine cannot bear it, or one does not answer."""


class HistoryError(ModalDummyError, ValueError):
    """Logged metrics cannot be read, or say nothing that has a meaning here."""


class UnsupportedEngineError(ModalDummyError, RuntimeError):
    """An optimizer or a training engine works in a way that does not allow what was asked for."""


def unknown_modality(name: object, known: Sequence[str], where: str) -> UnknownModalityError:
    """Error for `name`, found at `where`, that lists the `known` modalities and close matches."""
    match = close_match(name, known)
    hint = f"; did you mean {match!r}?" if match else "."
    return UnknownModalityError(
        f"{where} names the modality {describe(name)}, which `modality_param_map` does not have"
        f"{hint} Known modalities: {', '.join(map(repr, known))}. Names that own no "
        "parameters have to be left out, for instance by a `resolver` of the wrapper."
    )


def close_match(word: object, options: Sequence[str]) -> str | None:
    """The one of `options` that looks like `word`, in any case of letters, or None."""
    folded = {option.lower(): option for option in reversed(options)}
    text = word if isinstance(word, str) else describe(word)
    close = difflib.get_close_matches(text.lower(), folded, n=1) if text else []
    return folded[close[0]] if close else None


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
        return f"a {type(value).__name__} with the keys {_short(list(value.keys()))}"
    return f"{_short(value)} ({type(value).__name__})"


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except (ValueError, TypeError):  # thousands of digits; a class that is called `list`
        return "something that cannot be printed"
