"""What preflight says of optimizers is what they then do."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, RAdam

from modaldummy import hold_inactive, preflight
from tests.holding import NAMES, Towers, train
from tests.preflight.builders import left_out, one_optimizer, optimizer_for_each_tower
from tests.preflight.findings import codes
from tests.preflight.models import Around, Model, mapped, partition, sparse_tables


def test_what_no_optimizer_has_does_not_move() -> None:
    arguments = left_out()
    wrapper, optimizer = arguments["wrapper"], arguments["optimizer"]
    model = wrapper.parameters.model
    (finding,) = preflight(**arguments)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in NAMES:
        wrapper.total(model([name]), name).backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert finding.evidence["parameters"] == still == ["trunk.0.weight", "trunk.0.bias"]
    optimizer.add_param_group({"params": list(model.trunk[0].parameters())})
    assert preflight(**arguments) == []


def test_a_tower_that_no_optimizer_has_is_named_until_it_is_frozen() -> None:
    model = Model()
    optimizer = SGD([*model.towers["T1"].parameters(), *model.trunk.parameters()], lr=0.1)
    model.towers["dMRI"].requires_grad_(False)
    (finding, info) = preflight(model.wrapper(), optimizer)
    assert finding.evidence["parameters"] == ["towers.rsfMRI.weight", "towers.rsfMRI.bias"]
    assert info.code == "MD113"


@pytest.mark.parametrize("kind", [AdamW, RAdam])
def test_the_drift_is_what_happens_without_a_hold(kind: Any) -> None:
    model = Towers()
    optimizer = kind(model.parameters(), lr=0.01)
    wrapper = model.wrapper()
    (finding,) = preflight(wrapper, optimizer)
    assert finding.code == "MD141"
    start = model.towers["dMRI"].weight.detach().clone()
    train(model, optimizer, wrapper, [["T1"]] * finding.evidence["steps"])
    moved = (model.towers["dMRI"].weight - start).square().mean().sqrt().item()
    rate = moved / finding.evidence["steps"] / 0.01
    assert finding.evidence["rates"]["dMRI"] == pytest.approx(rate, rel=0.05)
    assert rate >= finding.evidence["limit"] == 0.01


def test_with_the_hold_nothing_moves() -> None:
    model = Towers()
    optimizer = AdamW(model.parameters(), lr=0.01)
    wrapper = model.wrapper()
    handle = hold_inactive(wrapper, optimizer)
    assert preflight(wrapper, optimizer) == []
    start = model.towers["dMRI"].weight.detach().clone()
    train(model, optimizer, wrapper, [["T1"]] * 3)
    assert torch.equal(model.towers["dMRI"].weight, start)
    handle.remove()
    assert codes(wrapper, optimizer) == {"MD141"}


def test_a_parameter_that_is_zero_has_no_relative_drift() -> None:
    """It would be infinite, which JSON cannot say."""
    model = Model()
    nn.init.zeros_(model.towers["T1"].bias)
    (finding,) = preflight(model.wrapper(), AdamW(model.parameters(), lr=0.1))
    assert finding.evidence["relative"]["T1"] is None
    assert finding.evidence["relative"]["dMRI"] > 0


def test_only_modalities_that_move_are_named() -> None:
    """A table with sparse gradients does not, and an optimizer of the trunk alone has none."""
    model = sparse_tables()
    kept = [model.towers["dMRI"].weight, *model.trunk.parameters()]
    fast = [*model.towers["T1"].parameters(), *model.towers["rsfMRI"].parameters()]
    found = preflight(mapped(model), [AdamW(fast, lr=0.1), SGD(kept, lr=0.1)])
    assert [finding.code for finding in found] == ["MD141", "MD119"]
    assert found[0].evidence["rates"].keys() == {"T1", "rsfMRI"}
    model = Model()
    optimizers = [SGD(model.towers.parameters(), lr=0.1), LBFGS(model.trunk.parameters())]
    assert preflight(model.wrapper(), optimizers) == []


def test_the_error_of_an_optimizer_is_in_the_evidence() -> None:
    """It is the error of its step without a closure. Other optimizers are checked all the same."""
    model = Model()
    optimizers = [LBFGS(model.towers["T1"].parameters()), AdamW(model.towers["dMRI"].parameters())]
    with pytest.raises(TypeError) as error:
        optimizers[0].step()
    found = {finding.code: finding for finding in preflight(model.wrapper(), optimizers)}
    assert found.keys() == {"MD112", "MD141", "MD142"}
    assert found["MD142"].evidence == {"optimizer": "LBFGS", "error": f"TypeError: {error.value}"}


def test_an_optimizer_that_wraps_several_cannot_be_checked() -> None:
    model = Model()
    around: Any = Around(AdamW(model.parameters(), lr=0.1))
    assert codes(model.wrapper(), around) == {"MD141"}
    around.other = SGD(model.parameters(), lr=0.1)
    (finding,) = preflight(model.wrapper(), around)
    assert finding.code == "MD142"
    assert "steps another optimizer" in finding.evidence["error"]
    around.param_groups[0]["params"] = list(model.trunk.parameters())
    assert codes(model.wrapper(), [around, SGD(model.towers.parameters(), lr=0.1)]) == set()


def test_a_scaler_stops_at_an_optimizer_without_gradients() -> None:
    """And not with the remedies: exact zeros, or one optimizer for all."""
    for arguments in (optimizer_for_each_tower(None), optimizer_for_each_tower(0.0)):
        wrapper, scaler = arguments["wrapper"], arguments["scaler"]
        first, second, *_ = arguments["optimizer"]
        scaler.scale(wrapper.total(wrapper.parameters.model(["T1"]), "T1")).backward()
        scaler.step(first)
        found = [f for f in preflight(**arguments) if f.code == "MD143"]
        if wrapper.scale is None:
            assert [f.evidence["active"] for f in found] == [["rsfMRI"], ["T1"], ["T1"]]
            with pytest.raises(AssertionError, match="No inf checks were recorded"):
                scaler.step(second)
        else:
            assert found == []
            scaler.step(second)
    assert preflight(**one_optimizer(None)) == []


def test_without_a_scaler_an_optimizer_may_be_without_gradients() -> None:
    arguments = optimizer_for_each_tower(None)
    for scaler in (None, 2.0**16, torch.amp.GradScaler("cpu", enabled=False)):
        assert preflight(**arguments | {"scaler": scaler}) == []


def test_a_batch_without_a_modality_counts_where_the_trunk_can_learn_from_it() -> None:
    """An optimizer of all towers is without gradients only then."""
    arguments = optimizer_for_each_tower(None)
    model = arguments["wrapper"].parameters.model
    optimizers = [SGD(part.parameters(), lr=0.1) for part in (model.towers, model.trunk)]
    (finding,) = preflight(**arguments | {"optimizer": optimizers})
    assert (finding.code, finding.evidence["active"]) == ("MD143", [])
    model.trunk.requires_grad_(False)
    assert preflight(**arguments | {"optimizer": optimizers}) == []


@pytest.mark.parametrize("attribute", ["_hp_mapping", "ds_id"])
def test_parameters_that_deepspeed_copies_may_be_in_no_optimizer(attribute: str) -> None:
    model = Model()
    optimizer = SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert "MD112" in codes(wrapper=mapped(model), optimizer=optimizer)
    partition(model, attribute)
    assert "MD112" not in codes(wrapper=mapped(model), optimizer=optimizer)
