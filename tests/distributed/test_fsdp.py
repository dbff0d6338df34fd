"""Gradients under FSDP2 are those of one process, where ranks may differ and where they agree."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from modaldummy import hold_inactive
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
