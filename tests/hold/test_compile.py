"""Hold with compiled losses and steps: the same parameters, and no additional graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import AdamW

from tests.holding import NAMES, Towers, Training, towers

# What torch's own compiler warns of while it traces.
_WORDS = (
    "should not be instantiated|torch.jit.script_method|attribute of a Tensor that is not a leaf"
)
pytestmark = pytest.mark.filterwarnings(f"ignore:.*({_WORDS})")


@pytest.mark.parametrize("what", ["total", "optimizer.step"])
def test_compiled_code_holds_too(what: str) -> None:
    torch.compiler.reset()
    training, plain = Training(), Towers()
    model, optimizer = training.model, training.optimizer
    step: Callable[[], Any] = optimizer.step
    total: Callable[..., Tensor] = training.total
    if what == "total":
        total = torch.compile(total, backend="aot_eager", fullgraph=True)
    else:
        step = torch.compile(step, backend="aot_eager")
    other = AdamW(plain.parameters(), lr=0.1)
    for active in (["T1"], ["dMRI"], ["dMRI"], NAMES, ["T1"]):
        plain.loss(active).backward()
        other.step()
        other.zero_grad()
        total(*active).backward()
        step()
        optimizer.zero_grad()
        assert towers(training.handle) == set(NAMES) - set(active)
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin)


def test_accumulation_needs_no_additional_graphs() -> None:
    """One graph for each active set, whatever earlier micro-batches contained."""
    torch.compiler.reset()
    training = Training()
    counter = CompileCounterWithBackend("eager")
    total = torch.compile(training.wrapper.total, backend=counter, fullgraph=True)
    steps = [["T1"], ["dMRI", "T1"], ["T1", "dMRI", "rsfMRI"], ["rsfMRI", "T1"], ["dMRI"]]
    for names in steps:
        for name in names:
            total(training.model.loss([name]), name).backward()
        assert training.step() == set(NAMES) - set(names)
    assert counter.frame_count == len(NAMES)


def test_compiled_and_eager_losses_share_a_backward_pass() -> None:
    torch.compiler.reset()
    training = Training()
    compiled = torch.compile(training.wrapper.total, backend="aot_eager")
    for _ in range(2):
        first = compiled(training.model.loss(["T1"]), "T1")
        (first + training.total("dMRI")).backward()
        assert training.step() == {"rsfMRI"}
