"""What batches of ranks contain at each step, for Hypothesis."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.oracle import NAMES, Active, Outcome, Schedule
from tests.fleet import Fleet


def actives() -> st.SearchStrategy[Active]:
    """Any modalities, also none."""
    return st.sets(st.sampled_from(NAMES)).map(lambda names: tuple(sorted(names)))


def schedules(
    num_ranks: int, *, min_micros: int = 1, max_micros: int = 2, agreeing: bool = False
) -> st.SearchStrategy[Schedule]:
    """Up to three steps of one or more micro-batches, each with what the ranks have."""
    own = actives().map(lambda active: (active,) * num_ranks)
    ranks = own if agreeing else st.tuples(*[actives()] * num_ranks)
    steps = st.lists(ranks, min_size=min_micros, max_size=max_micros).map(tuple)
    return st.lists(steps, min_size=1, max_size=3).map(tuple)


def check_schedules(
    fleet: Fleet,
    outcome: Callable[..., Outcome],
    engine: str,
    scales: tuple[float | None, ...],
    *,
    num_examples: int,
    may_miss: bool = False,
    agree: bool = False,
    **options: Any,
) -> None:
    """Gradients under an engine are the average over ranks, whatever the schedule.

    Args:
        fleet: The ranks.
        outcome: What the oracle says of an engine, a scale, a schedule, and `agree`.
        engine: The name of the engine.
        scales: From which to draw.
        num_examples: How many schedules to try.
        may_miss: Whether, with a scale of None, parameters may have no gradient.
        agree: Whether `check_ranks` runs before each forward.
        options: Of `schedules`.
    """

    @settings(max_examples=num_examples)
    @given(schedules(fleet.num_ranks, **options), st.sampled_from(scales))
    def check(schedule: Schedule, scale: float | None) -> None:
        for found in fleet.ask(outcome, engine, scale, schedule, agree):
            assert found.worst <= 1, found
            assert not found.missing or (may_miss and scale is None), found

    check()
