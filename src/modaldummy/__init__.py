"""Gradients for the parameters of inactive modalities, for any PyTorch training loop.

A batch without dMRI scans gives the dMRI tower no gradient, at which distributed engines stop or
go wrong. Wrap the loss, and every parameter gets one::

    from modaldummy import DummyLossWrapper, hold_inactive

    wrapper = DummyLossWrapper(model, {"T1": "encoders.T1", "dMRI": "encoders.dMRI"})
    hold_inactive(wrapper, optimizer)           # the optimizer skips what no batch has trained
    for batch in loader:
        loss = criterion(model(batch), batch["target"])
        wrapper.total(loss, batch).backward()   # real loss plus dummy term
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modaldummy._core import DummyLossWrapper, StepReport, active_modalities
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
from modaldummy._findings import Finding
from modaldummy._hold import HoldHandle, hold_inactive
from modaldummy._monitor import gradient_norms, missing_gradients
from modaldummy._ranks import AttachHandle, attach_to_outputs, check_ranks
from modaldummy._sampler import ModalityBatchSampler

if TYPE_CHECKING:
    from modaldummy._diagnose import diagnose
    from modaldummy._preflight import preflight

__version__ = "0.1.0"
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
# Imported at first use: they take a third of the import time and serve before or after training.
_LAZY = {"diagnose": "_diagnose", "preflight": "_preflight"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals() | _LAZY)
