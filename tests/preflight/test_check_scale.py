"""What preflight says of a scale is what then becomes of dummy gradients and of the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

from modaldummy import DummyLossWrapper, preflight
from tests.asserts import gradients_of
from tests.holding import NAMES, Towers
from tests.preflight.builders import after_a_step, with_gains, with_gradients
from tests.preflight.findings import codes, evidence
from tests.preflight.models import Model, mapped, with_towers


def dummies(model: nn.Module, scale: float, upstream: float = 1.0) -> list[Tensor]:
    """Dummy gradients of dMRI for the default scale."""
    model.zero_grad()
    wrapper = mapped(model, scale)
    (wrapper.total(torch.tensor(1.0), "T1") * upstream).backward()
    return gradients_of(wrapper.named_parameters("dMRI"))


def test_a_scale_of_zero_shows_as_zero_in_charts() -> None:
    assert not any(gradient.any() for gradient in dummies(Model(), 0.0))


@pytest.mark.parametrize("scale", [9e-4, 1e-3])
def test_a_large_scale_moves_parameters_as_real_gradients_do(scale: float) -> None:
    model = Model()
    expected = {"MD132"} if scale == 1e-3 else set()
    assert codes(wrapper=mapped(model, scale, max_fraction=None)) == expected
    before = model.towers["dMRI"].bias.detach().clone()
    dummies(model, scale)
    SGD(model.parameters(), lr=1.0).step()
    assert torch.allclose(before - model.towers["dMRI"].bias, torch.full((4,), scale), atol=1e-6)


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
def test_a_scale_below_the_dtype_is_raised_to_what_it_holds(
    dtype: torch.dtype, smallest: float
) -> None:
    model = with_towers(lambda: nn.Linear(3, 4, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    found = evidence(mapped(model, smallest * 0.9), "MD133")
    assert found == {"scale": smallest * 0.9, "gradients": {name: smallest}}
    for gradient in dummies(model, smallest * 0.9):
        assert (gradient == smallest).all()
    assert preflight(mapped(model, smallest)) == []


def test_only_the_narrow_dtypes_are_named() -> None:
    model = Model()
    model.towers["dMRI"].half()
    assert evidence(mapped(model, 1e-9), "MD133")["gradients"].keys() == {"float16"}


# --- the cap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_the_fraction_is_that_of_the_worst_batch(given: bool) -> None:
    """Of one modality: the largest that the report then shows."""
    model: Any = with_gains(600)["wrapper"].parameters.model
    nn.init.constant_(model.towers["rsfMRI"][0].weight, -3.0)
    wrapper = mapped(model)
    fractions = {}
    for name in NAMES:
        wrapper.total(torch.tensor(0.5), name)
        assert wrapper.last is not None
        fractions[name] = abs(wrapper.last.uncapped.item()) / 0.5
        assert wrapper.last.fraction <= 1e-4
    loss = wrapper.total(model.trunk(torch.ones(1, 4)).sum() * 0 + 0.5, []) if given else None
    found = evidence(wrapper, "MD134", loss=loss)
    worst = max(fractions, key=lambda name: fractions[name])
    assert found["active"] == worst
    assert found["fraction"] == pytest.approx(fractions[worst], rel=1e-3)
    assert found["loss"] == pytest.approx(0.5, rel=1e-3)
    assert found["loss_from"] == ("loss" if given else "wrapper.last")
    assert found["max_fraction"] == 1e-4


def test_what_is_not_capped_or_not_read_is_not_talked_about() -> None:
    model = with_gains(600)["wrapper"].parameters.model
    assert codes(wrapper=mapped(model)) == {"MD134"}
    for options in ({"max_fraction": None}, {"gradient_only": True}, {"scale": None}):
        assert preflight(mapped(model, **options)) == []
    assert evidence(mapped(model, max_fraction=1.1e-4), "MD134")["max_fraction"] == 1.1e-4
    assert preflight(mapped(model, max_fraction=1.3e-4)) == []


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_loss_that_says_nothing_is_passed_over(value: float) -> None:
    """For the last one, and then for an assumed one."""
    wrapper = with_gains(600)["wrapper"]
    trunk = wrapper.parameters.model.trunk
    loss = wrapper.total(trunk(torch.ones(1, 4)).sum() * 0 + value, NAMES)
    (found,) = (f.evidence for f in preflight(wrapper, loss=loss) if f.code == "MD134")
    assert (found["loss"], found["loss_from"]) == (1.0, "assumed")
    wrapper = after_a_step(0.25)["wrapper"]
    assert evidence(wrapper, "MD134")["loss"] == 0.25


def test_a_batch_of_a_fusion_leaves_the_others_inactive() -> None:
    """Sums are those of what is inactive together, tuples and shared parameters included."""
    model = with_gains(600)["wrapper"].parameters.model
    paths: dict[Any, Any] = {
        "T1": "towers.T1.1",
        "dMRI": ["towers.dMRI.1", "towers.T1.1.bias"],
        ("T1", "dMRI"): ["towers.T1.0", "towers.dMRI.0"],
        "PET": "towers.rsfMRI.1",
    }
    wrapper = DummyLossWrapper(model, paths)
    found = next(f for f in preflight(wrapper) if f.code == "MD134").evidence
    wrapper.total(torch.tensor(1.0), found["active"])
    assert wrapper.last is not None
    assert found["fraction"] == pytest.approx(abs(wrapper.last.uncapped.item()), rel=1e-4)


def test_a_sum_that_is_not_finite_counts_as_nothing() -> None:
    """As it does in the loss."""
    model = with_gains(600)["wrapper"].parameters.model
    for name, value in (("T1", torch.inf), ("dMRI", torch.nan)):
        nn.init.constant_(model.towers[name][0].bias, value)
    wrapper = mapped(model)
    for name in NAMES:
        wrapper.total(torch.tensor(1.0), name)
        assert wrapper.last is not None
        assert wrapper.last.dummy == 0
    assert codes(wrapper=wrapper) == {"MD114"}


# --- what comes between backward and step --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.2, 0.3, 1e-5, 5e-33])
def test_clipping_rounds_as_it_says(dtype: torch.dtype, max_norm: float) -> None:
    """For gradients that are there; what torch leaves of the dummy is the judge."""
    model = with_gradients(0.1)["wrapper"].parameters.model.to(dtype)
    dummies(model, 1e-7)
    nn.init.ones_(model.trunk.weight)
    for parameter in model.trunk.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    found = codes(wrapper=mapped(model), max_norm=max_norm)
    clip_grad_norm_(model.parameters(), max_norm)
    gone = not any(p.grad.any() for p in model.towers["dMRI"].parameters())
    assert found == ({"MD135"} if gone else set())
    assert preflight(mapped(model)) == []


def test_the_norm_of_float16_gradients_may_be_beyond_float16() -> None:
    model = with_gradients(60_000.0)["wrapper"].parameters.model
    found = evidence(mapped(model), "MD135", max_norm=0.3)
    assert found["total_norm_from"] == "gradients"
    assert found["total_norm"] > 65_504


def test_accumulation_counts_for_clipping() -> None:
    """A dummy of a part of the loss is smaller; without gradients a norm of 1 is assumed."""
    model = Model().half()
    wrapper = mapped(model, 1e-6)
    assert preflight(wrapper, max_norm=0.1) == []
    found = evidence(wrapper, "MD135", max_norm=0.1, accumulation_steps=8)
    assert (found["total_norm"], found["total_norm_from"]) == (1.0, "assumed")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).to_sparse()
    assert evidence(wrapper, "MD135", max_norm=1e-3)["total_norm_from"] == "assumed"
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert evidence(wrapper, "MD135", max_norm=1e-3)["total_norm_from"] == "assumed"


def test_a_scaler_skips_the_step_when_the_dummy_overflows() -> None:
    model = Towers()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrapper = model.wrapper(1e30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    assert "MD136" in codes(wrapper=wrapper, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(wrapper.total(model.loss(["T1"]), "T1")).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    for smaller in (torch.amp.GradScaler("cpu", init_scale=2.0**20), 2.0**20, None):
        assert "MD136" not in codes(wrapper=wrapper, scaler=smaller)
    off = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=False)
    assert "MD136" not in codes(wrapper=wrapper, scaler=off)


def test_the_factor_of_a_scaler_saves_gradients_from_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are multiplied before they are averaged, over all ranks where there is no DDP."""
    wrapper = mapped(Model().half())
    assert preflight(wrapper) == []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    assert evidence(wrapper, "MD137")["ranks"] == 4
    assert preflight(wrapper, scaler=2.0**10) == []
    found = evidence(wrapper, "MD137", scaler=2.0**10, accumulation_steps=2**12)
    assert found["accumulation_steps"] == 2**12
    assert found["if_reduced_once"] == {"float16": 2.0**-12}
    assert evidence(wrapper, "MD137")["if_reduced_once"] == {"float16": 0.0}
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    assert preflight(wrapper) == []
