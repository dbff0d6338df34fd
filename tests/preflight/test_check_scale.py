"""What preflight says about a scale is what then becomes of dummy gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

from modaldummy import DummyLossWrapper, preflight
from tests.asserts import gradients_of
from tests.holding import Towers
from tests.preflight.cases import with_gradients
from tests.preflight.models import Model, mapped, with_towers


def evidence(wrapper: DummyLossWrapper, code: str, **arguments: Any) -> Any:
    """Evidence of the only finding, which must have this code."""
    (finding,) = preflight(wrapper, **arguments)
    assert finding.code == code
    return finding.evidence


def dummy_gradients(model: nn.Module, scale: float) -> list[Tensor]:
    """Those of dMRI, after backward from a total without it."""
    wrapper = mapped(model, scale)
    wrapper.total(torch.tensor(1.0), "T1").backward()
    return gradients_of(wrapper.named_parameters("dMRI"))


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [
        (torch.float16, 2.0**-24),
        (torch.bfloat16, 2.0**-126),
        (torch.float32, 2.0**-126),
        (torch.complex64, 2.0**-126),
        (torch.float64, 2.0**-1022),
    ],
    ids=str,
)
def test_a_scale_below_the_dtype_is_raised_to_its_smallest_number(
    dtype: torch.dtype, smallest: float
) -> None:
    """Only the dtypes that are too narrow are named."""
    model = with_towers(lambda: nn.Linear(3, 4, dtype=dtype))
    model.towers["T1"].double()
    scale = smallest * 0.9
    name = str(dtype).removeprefix("torch.")
    assert evidence(mapped(model, scale), "MD133") == {
        "scale": scale,
        "gradients": {name: smallest},
    }
    for gradient in dummy_gradients(model, scale):
        assert (gradient == smallest).all()
    assert preflight(mapped(model, smallest)) == []


# --- what comes between backward and step --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.2, 0.3, 1e-5, 5e-33])
def test_clipping_rounds_as_it_says(dtype: torch.dtype, max_norm: float) -> None:
    """The gradients that are there have a norm, and what torch leaves of the dummy decides."""
    model = Model().to(dtype)
    dummy_gradients(model, 1e-7)
    for parameter in [*model.towers["T1"].parameters(), *model.trunk.parameters()]:
        parameter.grad = torch.full_like(parameter, 0.3)
    found = [finding.code for finding in preflight(mapped(model), max_norm=max_norm)]
    clip_grad_norm_(model.parameters(), max_norm)
    gone = not any(p.grad.any() for p in model.towers["dMRI"].parameters())
    assert found == (["MD135"] if gone else [])


def test_accumulation_counts_for_clipping() -> None:
    """The dummy gradient of a part of the loss is smaller."""
    wrapper = mapped(Model().half(), 1e-6)
    assert preflight(wrapper, max_norm=0.1) == []
    assert evidence(wrapper, "MD135", max_norm=0.1, accumulation_steps=8)["total_norm"] == 1.0


@pytest.mark.parametrize(
    ("value", "source"), [(0.0, "assumed"), (torch.nan, "assumed"), (60_000.0, "gradients")]
)
def test_gradients_that_say_nothing_are_passed_over(value: float, source: str) -> None:
    """A norm of 1 is assumed. The norm of float16 gradients may be too large for float16."""
    wrapper = with_gradients(value)["wrapper"]
    for parameter in wrapper.parameters.model.trunk.parameters():
        parameter.grad = torch.ones_like(parameter).to_sparse()
    found = evidence(wrapper, "MD135", max_norm=1e-3)
    assert found["total_norm_from"] == source
    assert source == "assumed" or found["total_norm"] > 65_504


def test_a_scaler_skips_the_step_when_the_dummy_gradient_overflows() -> None:
    model = Towers()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrapper = model.wrapper(1e30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    assert "MD136" in {finding.code for finding in preflight(wrapper, scaler=scaler)}
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(wrapper.total(model.loss(["T1"]), "T1")).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    off = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=False)
    for smaller in (torch.amp.GradScaler("cpu", init_scale=2.0**20), 2.0**20, off):
        assert "MD136" not in {finding.code for finding in preflight(wrapper, scaler=smaller)}
    narrow = mapped(Model().half(), 1e30)
    assert "MD136" not in {finding.code for finding in preflight(narrow)}, "without a scaler"


def test_the_factor_of_a_scaler_saves_gradients_from_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are multiplied before they are averaged, over all ranks where there is no DDP."""
    wrapper = mapped(Model().half())
    assert preflight(wrapper) == []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 4)
    found = evidence(wrapper, "MD137")
    assert (found["ranks"], found["if_reduced_once"]) == (4, {"float16": 0.0})
    assert preflight(wrapper, scaler=2.0**10) == []
    found = evidence(wrapper, "MD137", scaler=2.0**10, accumulation_steps=2**12)
    assert found["accumulation_steps"] == 2**12
    assert found["if_reduced_once"] == {"float16": 2.0**-12}
