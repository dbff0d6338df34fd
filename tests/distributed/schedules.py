"""What ranks hold at each step, for Hypothesis."""

from hypothesis import strategies as st

from tests.distributed.oracle import NAMES, Active, Schedule


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
