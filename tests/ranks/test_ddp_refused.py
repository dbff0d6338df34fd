"""A wrapper around DDP that cannot bear it is refused when it is made."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from tests.holding import NAMES
from tests.preflight.models import Model

MAP = {name: f"towers.{name}" for name in NAMES}

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ddp_that_looks_for_unused_parameters_is_refused(scale: float | None) -> None:
    ddp = DistributedDataParallel(Model(), find_unused_parameters=True)
    with pytest.raises(UnsupportedEngineError) as caught:
        DummyLossWrapper(ddp, MAP, scale)
    for remedy in (
        "find_unused_parameters=False",
        "static_graph=True",
        "inside of the module that DDP wraps",
        "`attach_to_outputs(wrapper, ddp)`",
    ):
        assert remedy in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_so_is_one_below_torch_compile() -> None:
    ddp = DistributedDataParallel(Model(), find_unused_parameters=True)
    with pytest.raises(UnsupportedEngineError, match="ready only once"):
        DummyLossWrapper(torch.compile(ddp), MAP)  # type: ignore[arg-type]


def test_a_static_graph_without_gradients_is_refused() -> None:
    ddp = DistributedDataParallel(Model(), static_graph=True)
    with pytest.raises(UnsupportedEngineError, match=r"never reduces.*Use scale=0\.0\."):
        DummyLossWrapper(ddp, MAP, None)
    DummyLossWrapper(ddp, MAP, 0.0)


def test_what_ddp_bears_is_not() -> None:
    DummyLossWrapper(DistributedDataParallel(Model()), MAP)
    DummyLossWrapper(DistributedDataParallel(Model()), MAP, None)
    DummyLossWrapper(DistributedDataParallel(Model(), static_graph=True), MAP)
    with pytest.warns(UserWarning, match="detect unused parameters automatically"):
        ddp = DistributedDataParallel(Model(), static_graph=True, find_unused_parameters=True)
    DummyLossWrapper(ddp, MAP)


def test_ddp_around_nothing_of_the_map_does_not_matter() -> None:
    model = Model()
    model.trunk = DistributedDataParallel(model.trunk, find_unused_parameters=True)
    DummyLossWrapper(model, MAP)
