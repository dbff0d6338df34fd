"""The expected drift is what the optimizer then does, and measuring it changes nothing."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import DummyLossWrapper, UnsupportedEngineError, hold_inactive
from modaldummy._preflight.drift import expected_drift
from tests.holding import NAMES, Towers, assert_same_state, train
from tests.optimizers import OPTIMIZERS
from tests.zoo import brain


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
    drift = expected_drift(wrapper, optimizer, steps=10)["dMRI"]
    train(model, optimizer, wrapper, [["T1"]] * 10)
    moved = [rms(p - start) / 10 for p, start in zip(tower, starts, strict=True)]
    assert drift.rates == pytest.approx(max(moved) / 0.01, rel=1e-6)
    relative = [one / rms(start) for one, start in zip(moved, starts, strict=True)]
    assert drift.relative == pytest.approx(max(relative), rel=1e-6)


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
        drift = expected_drift(wrapper, optimizer, steps=10)["dMRI"]
        starts = [p.detach().clone() for p in tower.parameters()]
        for _ in range(10):
            wrapper.total(model["T1"](torch.ones(2)).sum(), "T1").backward()
            optimizer.step()
            optimizer.zero_grad()
        after = zip(tower.parameters(), starts, strict=True)
        moved = max(rms(p - start) for p, start in after) / 10 / 0.01
        assert drift.rates == pytest.approx(moved, rel=1e-6 if small else 0.2), kind


def test_a_large_matrix_is_carried_out_beside_a_small_vector() -> None:
    """Weight decay moves a matrix, and leaves a bias of zeros alone."""
    tower = nn.Linear(80, 80)
    nn.init.zeros_(tower.bias)
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "dMRI": tower})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    drift = expected_drift(wrapper, optimizer, steps=1)["dMRI"]
    assert drift.rates == pytest.approx(0.1 * rms(tower.weight.detach()), rel=1e-3)


def test_an_optimizer_around_another_is_refused() -> None:
    """A copy of it would step the optimizer that it wraps."""
    model = Towers()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.optim = AdamW(model.parameters())  # type: ignore[attr-defined]
    with pytest.raises(
        UnsupportedEngineError, match=r"SGD.*steps another optimizer\. Pass its `optim`"
    ):
        expected_drift(model.wrapper(), optimizer)
    del optimizer.optim, optimizer.param_groups[0]["lr"]  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedEngineError, match="has no `lr`"):
        expected_drift(model.wrapper(), optimizer)


def test_the_figures_that_everybody_should_know() -> None:
    """Adam divides the gradient by its own size, plus an eps of 1e-8; SGD does not."""
    model = Towers().double()
    wrapper = model.wrapper()
    adam = AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    assert expected_drift(wrapper, adam)["T1"].rates == pytest.approx(1 / 1.1, rel=1e-3)
    sgd = SGD(model.parameters(), lr=1e-4)
    assert expected_drift(wrapper, sgd)["T1"].rates == pytest.approx(1e-7)


def test_measuring_changes_nothing() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda epoch: min(epoch / 10, 1.0))
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    train(model, optimizer, wrapper, [NAMES, ["T1"]])
    wrapper.total(model.loss(["T1"]), "T1").backward()
    before = copy.deepcopy([optimizer.state_dict(), model.state_dict(), handle.held])
    gradients = [p.grad for p in model.parameters()]
    drift = expected_drift(wrapper, optimizer)
    assert drift.keys() == set(NAMES)
    for found, kept in zip([optimizer.state_dict(), model.state_dict()], before[:2], strict=True):
        assert_same_state(found, kept, "state")
    assert handle.held == before[2]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    schedule.step()
    assert schedule.last_epoch == 1


def test_a_rate_of_zero_is_that_before_a_warm_up() -> None:
    model = Towers()
    wrapper = model.wrapper()
    optimizer = AdamW(model.parameters(), lr=0.5, weight_decay=0)
    LambdaLR(optimizer, lambda epoch: epoch / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert expected_drift(wrapper, optimizer)["T1"].rates == pytest.approx(1 / 1.1, rel=1e-3)
    unknown = AdamW(model.parameters(), lr=0.0, weight_decay=0)
    assert expected_drift(wrapper, unknown)["T1"].rates == pytest.approx(1 / 1.1, rel=1e-3)


def test_each_key_and_group_has_a_figure_and_the_largest_counts() -> None:
    case = brain()
    model = case.model
    towers = model.get_submodule("vision_tower")
    optimizer = AdamW(
        [
            {"params": [towers.get_parameter("T1_patch_embed.weight")], "eps": 1e-3},
            {"params": [towers.get_parameter("T1_patch_embed.bias")], "eps": 1e-8},
            {"params": model.get_submodule("fusion").parameters(), "eps": 1e-7},
        ],
        lr=0.1,
        weight_decay=0,
    )
    towers.get_submodule("dMRI_patch_embed").requires_grad_(False)
    drift = expected_drift(case.wrapper(), optimizer)
    assert drift.keys() == {"T1", ("T1", "dMRI")}
    assert drift["T1"].rates == pytest.approx(1 / 1.1, rel=1e-3)
    assert drift["T1", "dMRI"].rates == pytest.approx(1 / 2, rel=1e-3)


def test_without_a_gradient_or_without_a_value() -> None:
    """`scale=None` moves nothing; of parameters that are zero, any movement is infinitely much."""
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.1)
    assert expected_drift(model.wrapper(None), optimizer)["T1"] == (0, 0)
    nn.init.zeros_(model.towers["T1"].weight)
    nn.init.zeros_(model.towers["T1"].bias)
    assert expected_drift(model.wrapper(None), optimizer)["T1"] == (0, 0)
    assert expected_drift(model.wrapper(), optimizer)["T1"].relative == float("inf")


def test_what_gets_no_dummy_gradient_of_its_size_is_left_out() -> None:
    model = nn.ModuleDict({"T1": nn.Embedding(3, 2, sparse=True), "dMRI": nn.Linear(2, 2)})
    model["dMRI"].requires_grad_(False)
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    assert expected_drift(wrapper, SparseAdam(list(model["T1"].parameters()))) == {}
    assert expected_drift(wrapper, SGD(model["dMRI"].parameters(), lr=0.1)) == {}


@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(torch.float16, 2.0**-24), (torch.bfloat16, 1e-12), (torch.complex64, 1e-12)],
    ids=str,
)
def test_the_gradient_is_that_of_the_dummy_in_its_dtype(
    dtype: torch.dtype, gradient: float
) -> None:
    """In float16 it is never below the smallest positive number."""
    model = nn.ModuleDict({"T1": nn.Linear(2, 2, dtype=dtype)})
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    wrapper = DummyLossWrapper(model, {"T1": "T1"}, 1e-12)
    drift = expected_drift(wrapper, SGD(model.parameters(), lr=1.0), steps=1)
    assert drift["T1"].rates == pytest.approx(gradient, rel=1e-2)


def test_of_many_parameters_a_hundred_are_enough() -> None:
    """A large map takes no longer, and says the same."""
    tower = nn.ModuleList(nn.Linear(1, 1) for _ in range(1000))
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "dMRI": tower})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = AdamW(model.parameters(), lr=0.01)
    with patch.object(AdamW, "step", autospec=True, side_effect=AdamW.step) as step:
        drift = expected_drift(wrapper, optimizer, steps=5)["dMRI"]
    sizes = {len(call.args[0].param_groups[0]["params"]) for call in step.call_args_list}
    assert max(sizes) <= 102
    assert drift.rates == pytest.approx(0.91, abs=0.01)
