"""What a type checker has to refuse; an ignore that is not needed is an error itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modaldummy import (
    DummyLossWrapper,
    Finding,
    ModalityBatchSampler,
    active_modalities,
    diagnose,
    gradient_norms,
    hold_inactive,
    missing_gradients,
)


def construction(model: nn.Module) -> None:
    """Wrong types, and options by position."""
    DummyLossWrapper(model)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    DummyLossWrapper("model", {"T1": "T1"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    DummyLossWrapper(model, ["T1"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    DummyLossWrapper(model, {"T1": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    DummyLossWrapper(model, {"T1": "T1"}, "1e-7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    DummyLossWrapper(model, {"T1": "T1"}, 1e-7, 1e-4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    DummyLossWrapper(model, {"T1": "T1"}, gradients=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def use(wrapper: DummyLossWrapper, loss: Tensor) -> None:
    """A batch is needed, a loss is a tensor, and the last report may not be there."""
    wrapper.total(loss)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    wrapper.total(2.0, ["T1"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    wrapper.named_parameters(["T1"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    wrapper(loss)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    wrapper.last.fraction  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]  # noqa: B018
    wrapper.modalities = ("T1",)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def results(wrapper: DummyLossWrapper, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """What a wrapped function returns is no other type than before."""
    number: float = wrapper(loss_fn)(x)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    wrapper(loss_fn)(x).item(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert number


def functions(wrapper: DummyLossWrapper, model: nn.Module, optimizer: Optimizer) -> None:
    """Keywords stay keywords, and wrappers and optimizers are not mistaken for each other."""
    hold_inactive(optimizer, wrapper)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    hold_inactive(wrapper, optimizer, None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    gradient_norms(model)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    missing_gradients(wrapper, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    active_modalities(["T1"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    diagnose(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    diagnose([], unrest="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ModalityBatchSampler(["T1"], "2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Finding("MD999", "fatal", "Something.")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def frozen(wrapper: DummyLossWrapper, finding: Finding) -> None:
    """Reports and findings are not changed."""
    finding.code = "MD998"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert wrapper.last is not None
    wrapper.last.dummy = torch.zeros(())  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
