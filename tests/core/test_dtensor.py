"""Sharded parameters, as one of four ranks sees them: no collective may be needed."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from modaldummy.testing import assert_every_parameter_has_gradient
from tests.asserts import assert_same_bits, last_report
from tests.zoo import Pair, holder

pytestmark = pytest.mark.usefixtures("four_ranks")


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[None]:
    """Rank 0 of 4 whose collectives do nothing but can be counted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def distributed(local: Tensor, placement: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", (4,))
    return DTensor.from_local(local, mesh, [placement], run_check=False)


@pytest.mark.parametrize("local", [torch.full((2, 2), 3.0), torch.empty(0, 2)], ids=["2", "0"])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_a_dtensor_is_reached_through_its_local_shard(
    local: Tensor, placement: Placement, scale: float | None
) -> None:
    """Its gradient is placed as it is, and no rank waits for another."""
    model = Pair(holder(weight=distributed(local, placement)))
    wrapper = model.wrapper(scale)
    for _ in range(2):
        real = model()
        with CommDebugMode() as communication:
            wrapper.total(real, "a").backward()
        assert communication.get_total_counts() == 0
    gradient = model.b.weight.grad
    if scale is None:
        assert gradient is None
        return
    assert isinstance(gradient, DTensor)
    assert gradient.placements == (placement,)
    assert_same_bits(gradient.to_local(), torch.full_like(local, 2 * scale), "gradient")
    assert last_report(wrapper).uncapped.item() == pytest.approx(local.sum().item() * scale)


def test_the_assertions_of_the_kit_need_no_other_rank() -> None:
    """They look at the local shard alone."""
    model = Pair(holder(weight=distributed(torch.ones(2, 2), Shard(0))))
    wrapper = model.wrapper()
    model.step(wrapper)
    gradient = model.b.weight.grad
    with CommDebugMode() as communication:
        assert_every_parameter_has_gradient(model, wrapper)
        assert_same_bits(gradient, gradient, "gradient")
    assert communication.get_total_counts() == 0
