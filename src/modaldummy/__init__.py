"""Gradients for the parameters of absent modalities: connect, bound, hold."""

from modaldummy._batch import active_modalities
from modaldummy._errors import (
    BatchMetadataError,
    ModalDummyError,
    ParameterMapError,
    UnknownModalityError,
    UnsupportedEngineError,
)
from modaldummy._hold import HoldHandle, hold_inactive
from modaldummy._report import StepReport
from modaldummy._wrapper import DummyLossWrapper

__all__ = [
    "BatchMetadataError",
    "DummyLossWrapper",
    "HoldHandle",
    "ModalDummyError",
    "ParameterMapError",
    "StepReport",
    "UnknownModalityError",
    "UnsupportedEngineError",
    "active_modalities",
    "hold_inactive",
]
