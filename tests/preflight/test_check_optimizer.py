"""What preflight says about optimizers is what they then do."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, RAdam

from modaldummy import preflight
from tests.holding import NAMES, Towers, train
from tests.preflight.cases import held, left_out, optimizer_for_each_tower
from tests.preflight.models import Model, mapped, partition, sparse_table


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
    model.trunk[0].weight.requires_grad_(False)
    optimizer.add_param_group({"params": [model.trunk[0].bias]})
    assert preflight(**arguments) == []


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


def test_only_modalities_that_move_are_named() -> None:
    """A table with sparse gradients does not, and an optimizer of the trunk alone has none."""
    model = sparse_table()
    kept = [model.towers["dMRI"].weight, *model.trunk.parameters()]
    fast = [*model.towers["T1"].parameters(), *model.towers["rsfMRI"].parameters()]
    (finding,) = preflight(mapped(model), [AdamW(fast, lr=0.1), SGD(kept, lr=0.1)])
    assert finding.evidence["rates"].keys() == {"T1", "rsfMRI"}
    model = Model()
    optimizers = [SGD(model.towers.parameters(), lr=0.1), LBFGS(model.trunk.parameters())]
    assert preflight(model.wrapper(), optimizers) == []


def test_parameters_that_fsdp1_has_gathered_are_not_compared_with_shards() -> None:
    """Between forward and backward they are views of the flat parameter."""
    arguments = held(Model())
    trunk = arguments["wrapper"].parameters.model.trunk
    trunk._parameters["weight"] = trunk.weight.clone()
    assert [finding.code for finding in preflight(**arguments)] == ["MD142"]


def test_the_error_of_an_optimizer_is_in_the_evidence() -> None:
    """It is the error of its step without a closure. Other optimizers are checked all the same."""
    model = Model()
    optimizers = [LBFGS(model.towers["T1"].parameters()), AdamW(model.towers["dMRI"].parameters())]
    with pytest.raises(TypeError) as error:
        optimizers[0].step()
    found = {finding.code: finding for finding in preflight(model.wrapper(), optimizers)}
    assert found.keys() == {"MD112", "MD141", "MD142"}
    assert found["MD142"].evidence == {"optimizer": "LBFGS", "error": f"TypeError: {error.value}"}


@pytest.mark.parametrize("scale", [None, 0.0])
def test_a_scaler_stops_at_an_optimizer_without_gradients(scale: float | None) -> None:
    """It does not with exact zeros."""
    arguments = optimizer_for_each_tower(scale)
    wrapper, scaler = arguments["wrapper"], arguments["scaler"]
    first, second, *_ = arguments["optimizer"]
    scaler.scale(wrapper.total(wrapper.parameters.model(["T1"]), "T1")).backward()
    scaler.step(first)
    active = [finding.evidence["active"] for finding in preflight(**arguments)]
    if scale is None:
        assert active == [["rsfMRI"], ["T1"], ["T1"]]
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(second)
    else:
        assert active == []
        scaler.step(second)


def test_without_a_scaler_an_optimizer_may_be_without_gradients() -> None:
    arguments = optimizer_for_each_tower(None)
    for scaler in (None, 2.0**16, torch.amp.GradScaler("cpu", enabled=False)):
        assert preflight(**arguments | {"scaler": scaler}) == []


def test_a_batch_without_a_modality_counts_where_the_trunk_can_learn_from_it() -> None:
    """An optimizer of all towers is without gradients only then."""
    arguments = optimizer_for_each_tower(None)
    model = arguments["wrapper"].parameters.model
    arguments["optimizer"] = [SGD(m.parameters(), lr=0.1) for m in (model.towers, model.trunk)]
    (finding,) = preflight(**arguments)
    assert (finding.code, finding.evidence["active"]) == ("MD143", [])
    model.trunk.requires_grad_(False)
    assert preflight(**arguments) == []


@pytest.mark.parametrize("attribute", ["_hp_mapping", "ds_id"])
def test_parameters_that_deepspeed_copies_may_be_in_no_optimizer(attribute: str) -> None:
    model = Model()
    partition(model, attribute)
    findings = preflight(mapped(model), SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    assert "MD112" not in {finding.code for finding in findings}
