"""Gradients for the parameters of absent modalities: connect, bound, hold."""

from modaldummy._attach import AttachHandle, attach_to_outputs
from modaldummy._batch import active_modalities
from modaldummy._diagnose import diagnose
from modaldummy._errors import (
    BatchMetadataError,
    HistoryError,
    MissingGradientError,
    ModalDummyError,
    ParameterMapError,
    RankDisagreementError,
    UnknownModalityError,
    UnsupportedEngineError,
)
from modaldummy._finding import Finding
from modaldummy._hold import HoldHandle, hold_inactive
from modaldummy._missing import missing_gradients
from modaldummy._monitor import gradient_norms
from modaldummy._preflight import preflight
from modaldummy._ranks import check_ranks
from modaldummy._report import StepReport
from modaldummy._sampler import ModalityBatchSampler
from modaldummy._wrapper import DummyLossWrapper

__all__ = [
    "AttachHandle",
    "BatchMetadataError",
    "DummyLossWrapper",
    "Finding",
    "HistoryError",
    "HoldHandle",
    "MissingGradientError",
    "ModalDummyError",
    "ModalityBatchSampler",
    "ParameterMapError",
    "RankDisagreementError",
    "StepReport",
    "UnknownModalityError",
    "UnsupportedEngineError",
    "active_modalities",
    "attach_to_outputs",
    "check_ranks",
    "diagnose",
    "gradient_norms",
    "hold_inactive",
    "missing_gradients",
    "preflight",
]
