"""Exceptions of the library, each also the builtin that a user would catch."""

import difflib
from collections.abc import Sequence


class ModalDummyError(Exception):
    """Base class of every exception that modaldummy raises on purpose."""


class UnknownModalityError(ModalDummyError, ValueError):
    """A batch or a call names a modality that the parameter map does not have."""


class BatchMetadataError(ModalDummyError, ValueError):
    """A batch does not say, in any form that is understood, which modalities it holds."""


class ParameterMapError(ModalDummyError, ValueError):
    """A `modality_param_map` does not fit the model."""


def unknown_modality(name: object, known: Sequence[str], where: str) -> UnknownModalityError:
    """Error for `name`, found at `where`, that lists the `known` modalities and close matches."""
    close = difflib.get_close_matches(str(name).lower(), [k.lower() for k in known], n=1)
    match = next((k for k in known if close and k.lower() == close[0]), None)
    hint = f"; did you mean {match!r}?" if match else "."
    return UnknownModalityError(
        f"{where} names the modality {name!r}, which `modality_param_map` does not have{hint} "
        f"Known modalities: {', '.join(map(repr, known))}."
    )
