"""Gradients for the parameters of absent modalities: connect, bound, hold."""

from modaldummy._batch import active_modalities
from modaldummy._diagnose.diagnose import diagnose
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
from modaldummy._hold.hold import HoldHandle, hold_inactive
from modaldummy._monitor.missing import missing_gradients
from modaldummy._monitor.norms import gradient_norms
from modaldummy._preflight.preflight import preflight
from modaldummy._ranks.attach import AttachHandle, attach_to_outputs
from modaldummy._ranks.check import check_ranks
from modaldummy._ranks.sampler import ModalityBatchSampler
from modaldummy._report import StepReport
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
