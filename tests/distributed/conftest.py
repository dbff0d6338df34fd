from collections.abc import Callable, Iterator

import pytest

from tests.distributed.fleet import Fleet


@pytest.fixture(scope="session")
def fleets() -> Iterator[Callable[[int], Fleet]]:
    """Two or four ranks; those of one test serve the next."""
    made: dict[int, Fleet] = {}

    def fleet(world_size: int) -> Fleet:
        return made.setdefault(world_size, Fleet(world_size))

    yield fleet
    for fleet_made in made.values():
        fleet_made.close()


@pytest.fixture(scope="session", params=[2, 4], ids=["2 ranks", "4 ranks"])
def fleet(fleets: Callable[[int], Fleet], request: pytest.FixtureRequest) -> Fleet:
    return fleets(request.param)


@pytest.fixture(scope="session")
def two(fleets: Callable[[int], Fleet]) -> Fleet:
    return fleets(2)
