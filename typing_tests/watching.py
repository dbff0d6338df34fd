"""What a type checker knows of findings, norms, handles, samplers and errors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Never, assert_type

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from modaldummy import (
    AttachHandle,
    BatchMetadataError,
    DummyLossWrapper,
    Finding,
    HistoryError,
    HoldHandle,
    MissingGradientError,
    ModalDummyError,
    ModalityBatchSampler,
    ParameterMapError,
    RankDisagreementError,
    RecordError,
    ShadowHandle,
    StepReport,
    UnknownModalityError,
    UnsupportedEngineError,
    attach_to_outputs,
    check_ranks,
    diagnose,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
    shadow_inactive,
)


def gradients(wrapper: DummyLossWrapper, reports: list[StepReport]) -> None:
    """Rows for a logger."""
    scaler = torch.amp.GradScaler("cpu")
    assert_type(gradient_norms(wrapper), dict[str, float])
    assert_type(
        gradient_norms(wrapper, label=False, prefix="g", active=reports, scaler=scaler, full=True),
        dict[str, float],
    )
    assert_type(missing_gradients(wrapper, strict=True), dict[str, tuple[str, ...]])


def findings(wrapper: DummyLossWrapper, optimizers: Sequence[Optimizer], loss: Tensor) -> None:
    """Of all three ways to get them; their severities are literals."""
    scaler = torch.amp.GradScaler("cpu")
    rows: list[dict[str, float | None]] = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    assert_type(preflight(wrapper), list[Finding])
    assert_type(preflight(wrapper, optimizers[0], nn.Linear(1, 1)), list[Finding])
    assert_type(
        preflight(wrapper, optimizers, loss=loss, scaler=scaler, max_norm=1, accumulation_steps=2),
        list[Finding],
    )
    assert_type(diagnose(rows, scale=None), list[Finding])
    assert_type(diagnose("log.csv"), list[Finding])
    assert_type(diagnose(row for row in [gradient_norms(wrapper)]), list[Finding])
    found = diagnose(Path("log.jsonl"), unrest=3.0)[0]
    assert_type(found.code, str)
    assert_type(found.severity, Literal["error", "warning", "info"])
    assert_type(found.message, str)
    assert_type(found.evidence, Mapping[str, Any])
    assert_type(found.remedy, str)
    Finding("MD999", "warning", "Something.", {"step": 1}, "Nothing.")
    Finding(code="MD999", severity="info", message="Something.")


def handles(wrapper: DummyLossWrapper, optimizer: Optimizer, model: nn.Module) -> None:
    """With `remove()`, and as context managers that are themselves."""
    group: torch.distributed.ProcessGroup | None = None
    hold = hold_inactive(wrapper, optimizer, group=group)
    assert_type(hold, HoldHandle)
    assert_type(hold.held, tuple[str, ...])
    hold.remove()
    assert_type(hold_inactive(wrapper, model), HoldHandle)  # a DeepSpeed engine
    with hold_inactive(wrapper, optimizer) as held:
        assert_type(held, HoldHandle)
    with attach_to_outputs(wrapper, model) as attached:
        assert_type(attached, AttachHandle)
        attached.remove()
    check_ranks(wrapper, {"T1": None}, model=model, group=group)
    shadow = shadow_inactive(wrapper, model, examples=[{"T1": None}, (None,)], group=group)
    assert_type(shadow, ShadowHandle)
    assert_type(shadow.shadowed, tuple[str | tuple[str, ...], ...])
    with shadow.record(), shadow.paused():
        model()
    shadow.remove()


def sampler(dataset: "Dataset[Tensor]") -> None:
    """A batch sampler, from names in any container."""
    names = ["T1", ("T1", "dMRI"), ()]
    drawn = ModalityBatchSampler(names, 2, seed=1, num_replicas=2, rank=0)
    ModalityBatchSampler(np.array(["T1", "dMRI"]), 2)
    ModalityBatchSampler([["T1"], ["dMRI"]], batch_size=4, shuffle=False, drop_last=True)
    assert_type(iter(drawn), Iterator[list[int]])
    assert_type(len(drawn), int)
    assert_type(drawn.steps, dict[str | tuple[str, ...], int])
    assert_type(drawn.epoch, int)
    assert_type(drawn.rank, int)
    assert_type(drawn.num_replicas, int)
    drawn.set_epoch(1)
    assert_type(drawn.sampler, ModalityBatchSampler)
    state = drawn.state_dict(position=3)
    assert_type(state, dict[str, Any])
    drawn.load_state_dict(state)
    DataLoader(dataset, batch_sampler=drawn)


def refused(drawn: ModalityBatchSampler) -> None:
    """A type checker knows that what follows is never reached."""
    assert_type(drawn.batch_size, Never)


def errors() -> list[type[ModalDummyError]]:
    """Each is also the builtin that a user would catch."""
    values: list[type[ValueError]] = [
        BatchMetadataError,
        HistoryError,
        ParameterMapError,
        UnknownModalityError,
    ]
    states: list[type[RuntimeError]] = [
        MissingGradientError,
        RankDisagreementError,
        RecordError,
        UnsupportedEngineError,
    ]
    assert values
    assert states
    return [
        BatchMetadataError,
        HistoryError,
        MissingGradientError,
        ParameterMapError,
        RankDisagreementError,
        RecordError,
        UnknownModalityError,
        UnsupportedEngineError,
    ]
