"""Who else has a parameter decides whether it may be held: keys of the map, and the trunk."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from modaldummy import DummyLossWrapper, hold_inactive
from tests.zoo import brain, tied_across


def test_a_fusion_module_is_trained_only_by_batches_that_contain_all_of_it() -> None:
    """T1 in one micro-batch and dMRI in another never ran it."""
    case = brain()
    wrapper = case.wrapper()
    optimizer = Adam(case.model.parameters())
    handle = hold_inactive(wrapper, optimizer)
    for actives, held in (
        ([{"T1"}, {"dMRI"}], {"fusion.weight", "fusion.bias"}),
        ([{"T1", "dMRI"}], set()),
    ):
        for active in actives:
            wrapper.total(case.real(active), active).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {name for name in handle.held if "rsfMRI" not in name} == held


def test_what_an_active_modality_shares_is_never_held() -> None:
    case = tied_across()
    wrapper = case.wrapper()
    optimizer = Adam(case.model.parameters())
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(case.real({"a"}), "a").backward()
    optimizer.step()
    assert handle.held == ("b.0.weight", "b.0.bias")


def test_what_the_trunk_shares_is_never_held() -> None:
    """A table that is tied to the output layer learns from each batch, whatever the map says."""
    model: Any = nn.ModuleDict({n: nn.Linear(3, 3, bias=False) for n in ("T1", "dMRI", "trunk")})
    model["trunk"].weight = model["dMRI"].weight
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    before = model["trunk"].weight.detach().clone()
    wrapper.total(model["trunk"](model["T1"](torch.ones(1, 3))).square().mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ()
    assert not torch.equal(before, model["trunk"].weight)


@pytest.mark.parametrize("first", ["trunk", "dMRI"])
def test_a_module_that_the_trunk_shares_is_never_held(first: str) -> None:
    """Whichever of its names comes first in the model."""
    norm, order = nn.LayerNorm(3), ["T1", first, "dMRI" if first == "trunk" else "trunk"]
    parts = {name: nn.Sequential(nn.Linear(3, 3), norm) for name in ("trunk", "dMRI")}
    model: Any = nn.ModuleDict({name: parts.get(name, nn.Linear(3, 3)) for name in order})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    before = norm.weight.detach().clone()
    wrapper.total(model["trunk"](model["T1"](torch.ones(1, 3))).square().mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.0.weight", "dMRI.0.bias")
    assert not torch.equal(before, norm.weight)


def test_a_module_in_two_places_of_a_tower_is_not_elsewhere() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"T1": nn.Linear(3, 3), "dMRI": nn.Sequential(layer, layer)})
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model["T1"](torch.ones(1, 3)).mean(), "T1").backward()
    optimizer.step()
    assert handle.held == ("dMRI.0.weight", "dMRI.0.bias")
