"""The promises as assertions, each with its definition."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, StepReport
from modaldummy._core.paths import strip_wrappers
from modaldummy.testing.compare import describe_difference


def assert_connected(parameters: Mapping[str, Tensor]) -> None:
    """Connect: every gradient exists, fits its parameter, and is nowhere zero."""
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.shape == parameter.shape, name
        assert gradient.dtype == parameter.dtype, name
        assert torch.count_nonzero(gradient) == parameter.numel(), f"{name} has a zero gradient"


def assert_bounded(report: StepReport, max_fraction: float = 1e-4) -> None:
    """Bound: |dummy| <= max_fraction |real| in exact arithmetic; zero where real is not finite."""
    real, dummy = report.real.double().item(), report.dummy.double().item()
    if torch.isfinite(report.real):
        assert abs(dummy) <= max_fraction * abs(real), f"{dummy} is too much for {real}"
    else:
        assert dummy == 0


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    """Both are None, or equal in layout, dtype, shape and every bit, NaN included."""
    difference = describe_difference(expected, actual)
    assert not difference, f"{name}: {difference}"


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """All gradients; each parameter must have one."""
    gradients = [parameter.grad for parameter in parameters.values()]
    present = [gradient for gradient in gradients if gradient is not None]
    assert len(present) == len(gradients) > 0
    return present


def last_report(wrapper: DummyLossWrapper) -> StepReport:
    """What the last step of a wrapper did; there must have been one."""
    assert wrapper.last is not None
    return wrapper.last


def connected(wrapper: DummyLossWrapper, active: Collection[str]) -> set[str]:
    """Names, without wrapper segments, of the parameters that a dummy reaches."""
    model = wrapper.parameters.model
    model.zero_grad()
    dummy = wrapper.dummy(active)
    if dummy.requires_grad:
        dummy.backward()
    named = model.named_parameters(remove_duplicate=False)
    return {strip_wrappers(name) for name, p in named if p.grad is not None}
