"""Gradients for the parameters of inactive modalities, for any PyTorch training loop.

If a batch contains no dMRI scans, the dMRI tower gets no gradient, and distributed engines stop or
compute wrong results. Wrap the loss, and every parameter gets one::

    from modaldummy import DummyLossWrapper, hold_inactive

    wrapper = DummyLossWrapper(model, {"T1": "encoders.T1", "dMRI": "encoders.dMRI"})
    hold_inactive(wrapper, optimizer)           # the optimizer skips what no batch has trained
    for batch in loader:
        loss = criterion(model(batch), batch["target"])
        wrapper.total(loss, batch).backward()   # real loss plus dummy term
"""

from typing import TYPE_CHECKING, Any

from modaldummy._core import DummyLossWrapper, StepReport, active_modalities
from modaldummy._errors import (
    BatchMetadataError,
    HistoryError,
    MissingGradientError,
    ModalDummyError,
    ParameterMapError,
    RankDisagreementError,
    RecordError,
    UnknownModalityError,
    UnsupportedEngineError,
)
from modaldummy._findings import Finding
from modaldummy._hold import HoldHandle, hold_inactive
from modaldummy._monitor import gradient_norms, missing_gradients
from modaldummy._ranks import AttachHandle, attach_to_outputs, check_ranks
from modaldummy._sampler import ModalityBatchSampler
from modaldummy._shadow import ShadowHandle, shadow_inactive

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
    "RecordError",
    "ShadowHandle",
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
    "shadow_inactive",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: this takes a third of the import time, and training needs neither.
    if name == "diagnose":
        from modaldummy._diagnose import diagnose

        return diagnose
    if name == "preflight":
        from modaldummy._preflight import preflight

        return preflight
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
