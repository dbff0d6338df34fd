"""Gradients under FSDP are those of one process, where ranks may differ and where they agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import AdamW

from modaldummy import (
    ModalDummyError,
    UnsupportedEngineError,
    check_ranks,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)
from tests.distributed.engines import AGREEING, FSDPS, needs_averages, outcome
from tests.distributed.oracle import NAMES
from tests.distributed.schedules import check_schedules
from tests.fleet import Fleet
from tests.preflight.models import Model, mapped

pytestmark = needs_averages


@pytest.mark.parametrize("engine", FSDPS)
def test_gradients_are_the_average_over_ranks(fleet: Fleet, engine: str) -> None:
    # Without zeros, FSDP2 reduces other parameters on ranks where None leaves some out.
    scales = (1e-7, 0.0) if "root" in engine and "zeros" not in engine else (1e-7, 0.0, None)
    check_schedules(fleet, outcome, engine, scales, num_examples=6, may_miss=True)


@pytest.mark.parametrize("engine", AGREEING)
def test_gradients_are_the_average_over_ranks_that_agree(fleet: Fleet, engine: str) -> None:
    scales = (1e-7, 0.0, None)
    check_schedules(fleet, outcome, engine, scales, num_examples=6, may_miss=True, agreeing=True)


def moves_what_no_rank_trained(rank: int) -> bool:
    model = Model()
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    wrapper, optimizer = mapped(model, None), AdamW(model.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    weight = model.towers["rsfMRI"].weight
    before = weight.full_tensor().clone()
    model.total(wrapper, NAMES[2 * rank]).backward()
    optimizer.step()
    return not torch.equal(weight.full_tensor(), before)


def test_a_parameter_whose_gradient_fsdp2_filled_with_zeros_is_held(two: Fleet) -> None:
    assert not any(two.ask(moves_what_no_rank_trained))


# --- FSDP1 ---------------------------------------------------------------------------------------


def fsdp1(*parts: str, use_orig_params: bool = True) -> Any:
    """`FullyShardedDataParallel` around parts of a model, and around the whole."""
    model: nn.Module = Model()
    options: dict[str, Any] = {
        "use_orig_params": use_orig_params,
        "device_id": torch.device("cpu"),
    }
    for part in parts:
        model.set_submodule(part, FullyShardedDataParallel(model.get_submodule(part), **options))
    return FullyShardedDataParallel(model, **options)


def add_ons_under_fsdp1(rank: int) -> dict[str, Any]:
    """What each add-on says of the whole model in one unit, while ranks differ."""
    model = fsdp1()
    wrapper, optimizer = mapped(model), AdamW(model.parameters(), lr=0.1)
    found: dict[str, Any] = {"codes": [f.code for f in preflight(wrapper, optimizer, model)]}
    handle = hold_inactive(wrapper, optimizer)
    name = NAMES[rank]
    check_ranks(wrapper, name)
    total = wrapper.total(model([name]), name)
    found["codes of the total"] = [f.code for f in preflight(wrapper, loss=total)]
    total.backward()
    found["missing"] = missing_gradients(wrapper, strict=True)
    try:
        gradient_norms(wrapper, full=True)
    except UnsupportedEngineError as error:
        found["full"] = str(error)
    with model.summon_full_params(model, with_grads=True):
        found["norms"] = gradient_norms(wrapper, label=False)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    with model.summon_full_params(model):
        found["moved"] = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    return found | {"held": handle.held}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.usefixtures("process_group")
def test_add_ons_under_fsdp1(two: Fleet) -> None:
    alone = add_ons_under_fsdp1(0)
    assert {name.split(".")[-2] for name in alone["held"]} == {"rsfMRI", "dMRI"}
    for found in two.ask(add_ons_under_fsdp1):
        assert found["missing"] == alone["missing"] == {}
        assert found["full"] == alone["full"]
        assert found["codes"] == ["MD141"]
        assert found["codes of the total"] == []
        assert "summon_full_params" in found["full"]
        assert found["norms"]["grad/dMRI/towers.dMRI.weight"] == 0
        assert found["norms"]["grad/T1/towers.T1.weight"] > 0.01
        assert {name.split(".")[-2] for name in found["held"]} == {"dMRI"}
        assert len(found["moved"]) == 6
        assert not any("dMRI" in name for name in found["moved"])


def refusals_under_fsdp1(rank: int) -> dict[str, str]:
    towers = fsdp1(*[f"towers.{name}" for name in NAMES])
    flat = fsdp1(use_orig_params=False)
    before = Model()
    wrapper = mapped(before)
    FullyShardedDataParallel(before, use_orig_params=False, device_id=torch.device("cpu"))
    found = {finding.code: finding.message for finding in preflight(mapped(towers))}
    calls: dict[str, Callable[[], Any]] = {
        "ranks": lambda: check_ranks(mapped(towers), NAMES[rank]),
        "flat": lambda: mapped(flat),
        "flat towers": lambda: mapped(fsdp1("towers.T1", use_orig_params=False)),
        "flat later": lambda: wrapper.total(torch.tensor(1.0), "T1"),
    }
    for name, call in calls.items():
        try:
            call()
        except ModalDummyError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.usefixtures("process_group")
def test_refusals_under_fsdp1(two: Fleet) -> None:
    first, second = two.ask(refusals_under_fsdp1)
    alone = refusals_under_fsdp1(0)  # there are no ranks that could differ
    assert first == second == alone | {"ranks": first["ranks"]}
    assert "in their own FSDP1 unit" in first["MD104"]
    assert "RankDisagreementError: Ranks have different modalities: rank 0: T1" in first["ranks"]
    assert "wrap only the whole model in `FullyShardedDataParallel`" in first["ranks"]
    for name in ("flat", "flat towers", "flat later"):
        assert first[name].startswith("ParameterMapError: ")
        assert "Pass `use_orig_params=True` to `FullyShardedDataParallel`." in first[name]
