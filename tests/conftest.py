"""Hypothesis profiles, quick while developing and larger in CI, and shared fixtures."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from tests.fleet import Fleet

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores

if not torch.cuda.is_available():
    # Triton's own functions look at it too, so it must be there before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("tests.asserts")

# A first example may pay for torch's lazy start, which says nothing about the code under test.
settings.register_profile("dev", max_examples=40, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("mutants", max_examples=10, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no GPU, and keep together what shares a fixture."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            ranks = {"fleet", "fleets", "two"} & set(getattr(item, "fixturenames", ()))
            group = f"ranks {fleet_of(getattr(item, 'module', None))}" if ranks else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A gloo group of this one process, without a network."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in the stubs
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are faster so, and do not wait for a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fleets() -> Iterator[Callable[..., Fleet]]:
    """So many ranks, perhaps under a name of their own; those of one test serve the next."""
    made: dict[tuple[int, str], Fleet] = {}

    def of(num_ranks: int, name: str = "") -> Fleet:
        return made.setdefault((num_ranks, name), Fleet(num_ranks))

    yield of
    for fleet in made.values():
        fleet.close()


def fleet_of(module: Any) -> str:
    """The name of the ranks of a test module, its `FLEET`: DeepSpeed changes torch in theirs."""
    return getattr(module, "FLEET", "")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def fleet(fleets: Callable[..., Fleet], request: pytest.FixtureRequest) -> Fleet:
    return fleets(request.param, fleet_of(request.module))


@pytest.fixture(scope="module")
def two(fleets: Callable[..., Fleet], request: pytest.FixtureRequest) -> Fleet:
    return fleets(2, fleet_of(request.module))
