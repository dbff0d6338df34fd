"""Gradients under FSDP2 are those of one process, where ranks may differ and where they agree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.engines import AGREEING, FSDPS, needs_averages, outcome
from tests.distributed.oracle import Schedule
from tests.distributed.schedules import schedules
from tests.fleet import Fleet

pytestmark = needs_averages


@pytest.mark.parametrize("engine", FSDPS)
def test_gradients_are_the_average_over_ranks(fleet: Fleet, engine: str) -> None:
    # Without zeros, FSDP2 reduces other parameters on ranks where None leaves some out.
    check_schedules(
        fleet,
        engine,
        (1e-7, 0.0) if "root" in engine and "zeros" not in engine else (1e-7, 0.0, None),
    )


@pytest.mark.parametrize("engine", AGREEING)
def test_gradients_are_the_average_over_ranks_that_agree(fleet: Fleet, engine: str) -> None:
    check_schedules(fleet, engine, (1e-7, 0.0, None), agreeing=True)


def check_schedules(
    fleet: Fleet, engine: str, scales: tuple[float | None, ...], agreeing: bool = False
) -> None:
    @settings(max_examples=6)
    @given(schedules(fleet.num_ranks, agreeing=agreeing), st.sampled_from(scales))
    def check(schedule: Schedule, scale: float | None) -> None:
        for found in fleet.ask(outcome, engine, scale, schedule):
            assert found.worst <= 1, found
            assert scale is None or not found.missing, found

    check()
