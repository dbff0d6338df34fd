"""The expected drift is what the optimizer then does."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adam, AdamW, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from modaldummy._engines import zero_elements
from modaldummy._preflight.drift import expected_drift, expected_zero_drift
from tests.holding import NAMES, Towers, train
from tests.optimizers import OPTIMIZERS
from tests.zero_engine import Zero3, Zero12, ZeroEngine
from tests.zoo import brain

EPS = (1e-7, 1e-8)


@pytest.mark.parametrize("scale", [1e-7, 0.0])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_expected_is_what_happens(kind: str, warm: bool, scale: float) -> None:
    """For parameters that were never active, and for those that were trained before."""
    model = Towers()
    optimizer = OPTIMIZERS[kind](list(model.parameters()), 0.01)
    wrapper = model.wrapper(scale)
    train(model, optimizer, wrapper, [NAMES] * 3 if warm else [])
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    tower = [p for p in model.towers["dMRI"].parameters() if p in owned]
    starts = [p.detach().clone() for p in tower]
    drift = expected_drift(wrapper, optimizer, 10)["dMRI"]
    train(model, optimizer, wrapper, [["T1"]] * 10)
    moved = [rms(p - start) / 10 for p, start in zip(tower, starts, strict=True)]
    assert drift == pytest.approx(max(moved) / 0.01, rel=1e-6)


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("small", [2**12, 0], ids=["all", "a sample"])
def test_of_a_tower_of_several_kinds_the_largest_counts(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay moves the gain of a norm, which is 1; Adafactor goes by the shape."""
    monkeypatch.setattr("modaldummy._preflight.drift._MAX_SAMPLE_ELEMENTS", small)
    gain = nn.LayerNorm(3, bias=False)
    tower = nn.Sequential(nn.Linear(8, 4), gain, nn.Linear(4, 16), nn.Linear(16, 4))
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "dMRI": tower})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    for kind in ("SGD, momentum 0.9, decay 0.01", "Adafactor", "AdamW", "Lion"):
        optimizer = OPTIMIZERS[kind](list(model.parameters()), 0.01)
        drift = expected_drift(wrapper, optimizer, 10)["dMRI"]
        starts = [p.detach().clone() for p in tower.parameters()]
        for _ in range(10):
            wrapper.total(model["T1"](torch.ones(2)).sum(), "T1").backward()
            optimizer.step()
            optimizer.zero_grad()
        after = zip(tower.parameters(), starts, strict=True)
        moved = max(rms(p - start) for p, start in after) / 10 / 0.01
        assert drift == pytest.approx(moved, rel=1e-6 if small else 0.2), kind


def test_an_optimizer_that_cannot_be_copied_is_refused() -> None:
    """A copy of one that wraps others would step the optimizers that it wraps."""
    model = Towers()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.optim = AdamW(model.parameters())  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedEngineError, match=r"SGD.*steps other optimizers"):
        expected_drift(model.wrapper(), optimizer, 10)
    del optimizer.optim, optimizer.param_groups[0]["lr"]  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedEngineError, match="has no `lr`"):
        expected_drift(model.wrapper(), optimizer, 10)


@pytest.mark.parametrize("rate", [1e-4, 0.0])
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize(("kind", "rates"), [(Adam, 1 / 1.1), (SGD, 1e-7)])
def test_drift_is_in_units_of_the_learning_rate(
    kind: Any, rates: float, rate: float, warm_up: bool
) -> None:
    """Adam divides a gradient by its own size, plus an eps of 1e-8; SGD does not."""
    model = Towers().double()
    optimizer = kind(model.parameters(), lr=rate)
    if warm_up:  # it begins with a rate of 0
        LambdaLR(optimizer, lambda epoch: epoch / 10)
    drift = expected_drift(model.wrapper(), optimizer, 10)["T1"]
    assert drift == pytest.approx(rates, rel=1e-3)


def test_each_key_and_group_has_a_figure_and_the_largest_counts() -> None:
    case = brain()
    model = case.model
    towers = model.get_submodule("vision_tower")
    groups = [
        {"params": [towers.get_parameter("T1_patch_embed.weight")], "eps": 1e-3},
        {"params": [towers.get_parameter("T1_patch_embed.bias")], "eps": 1e-8},
        {"params": model.get_submodule("fusion").parameters(), "eps": 1e-7},
    ]
    optimizer = Adam(groups, lr=0.1)
    towers.get_submodule("dMRI_patch_embed").requires_grad_(False)
    drift = expected_drift(case.wrapper(), optimizer, 10)
    assert drift.keys() == {"T1", ("T1", "dMRI")}
    assert drift["T1"] == pytest.approx(1 / 1.1, rel=1e-3)
    assert drift["T1", "dMRI"] == pytest.approx(1 / 2, rel=1e-3)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, 3])
def test_under_zero_the_figures_are_those_of_each_parameter_group(stage: int) -> None:
    """Groups have an eps of their own, by which Adam's drift differs."""
    model = Towers()
    groups = [list(model.towers[name].parameters()) for name in ("T1", "dMRI")]
    made: list[Adam] = []

    def make(flats: Any) -> Adam:
        made.append(Adam([flat | {"eps": eps} for flat, eps in zip(flats, EPS, strict=True)]))
        return made[0]

    zero = Zero12(groups, make, None) if stage == 1 else Zero3(groups, make)
    engine = ZeroEngine(model, stage, zero)
    drift = expected_zero_drift(model.wrapper(), engine, 10)
    assert drift == {
        "T1": pytest.approx(1 / 2, rel=1e-3),
        "dMRI": pytest.approx(1 / 1.1, rel=1e-3),
    }
    assert made[0].state == {}


@pytest.mark.parametrize(("rank", "elements"), [(0, [0.0, 1.0, 2.0]), (1, [3.0, 4.0]), (2, [])])
def test_the_padding_of_zero3_is_no_part_of_a_parameter(
    rank: int, elements: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has three elements of five; what follows the fifth was never set."""
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    whole = torch.cat([torch.arange(5.0), torch.full((4,), torch.nan)])
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_tensor = whole[3 * rank : 3 * rank + 3]
    parameter.ds_numel, parameter.ds_process_group = 5, None
    assert zero_elements(parameter).tolist() == elements


def test_without_a_gradient_nothing_moves() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    assert expected_drift(model.wrapper(None), optimizer, 10)["T1"] == 0


def test_what_gets_no_dummy_gradient_of_its_size_is_left_out() -> None:
    model = nn.ModuleDict({"T1": nn.Embedding(3, 2, sparse=True), "dMRI": nn.Linear(2, 2)})
    model["dMRI"].requires_grad_(False)
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    assert expected_drift(wrapper, SparseAdam(list(model["T1"].parameters())), 1) == {}
    assert expected_drift(wrapper, SGD(model["dMRI"].parameters(), lr=0.1), 1) == {}


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float16, 2.0**-24), (torch.cfloat, 1e-12)])
def test_the_gradient_is_that_of_the_dummy_term(dtype: torch.dtype, gradient: float) -> None:
    """In float16 it is never below the smallest positive number."""
    model = nn.ModuleDict({"T1": nn.Linear(2, 2, bias=False, dtype=dtype)})
    nn.init.zeros_(model.get_parameter("T1.weight"))
    wrapper = DummyLossWrapper(model, {"T1": "T1"}, 1e-12)
    drift = expected_drift(wrapper, SGD(model.parameters(), lr=1.0), 1)
    assert drift["T1"] == pytest.approx(gradient, rel=1e-2)


def test_of_many_parameters_a_hundred_are_enough() -> None:
    """A large map takes no longer, and says the same."""
    tower = nn.ModuleList(nn.Linear(1, 1) for _ in range(1000))
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "dMRI": tower})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.01)
    with patch.object(AdamW, "step", autospec=True, side_effect=AdamW.step) as step:
        drift = expected_drift(wrapper, optimizer, 5)["dMRI"]
    sizes = {len(call.args[0].param_groups[0]["params"]) for call in step.call_args_list}
    assert max(sizes) <= 102
    assert drift == pytest.approx(0.91, abs=0.01)
