"""Gradients for the parameters of absent modalities: connect, bound, hold."""

from modaldummy._batch import active_modalities
from modaldummy._errors import (
    BatchMetadataError,
    ModalDummyError,
    ParameterMapError,
    UnknownModalityError,
)
from modaldummy._report import StepReport
from modaldummy._wrapper import DummyLossWrapper

__all__ = [
    "BatchMetadataError",
    "DummyLossWrapper",
    "ModalDummyError",
    "ParameterMapError",
    "StepReport",
    "UnknownModalityError",
    "active_modalities",
]
