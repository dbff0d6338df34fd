"""DDP that does not support the dummy term is refused when a wrapper is made with it."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, UnsupportedEngineError, attach_to_outputs
from tests.holding import NAMES
from tests.preflight.models import Model

MAP = {name: f"towers.{name}" for name in NAMES}

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ddp_that_looks_for_unused_parameters_is_refused(
    scale: float | None, compiled: bool
) -> None:
    ddp = DistributedDataParallel(Model(), find_unused_parameters=True)
    with pytest.raises(UnsupportedEngineError, match="ready only once") as caught:
        DummyLossWrapper(torch.compile(ddp) if compiled else ddp, MAP, scale)  # type: ignore[arg-type]
    for remedy in (
        "find_unused_parameters=False",
        "static_graph=True",
        "inside of the module that DDP wraps",
        "`attach_to_outputs(wrapper, ddp)`",
    ):
        assert remedy in str(caught.value)


def test_a_static_graph_without_gradients_is_refused() -> None:
    """Also if the output of the model is connected later."""
    model = Model()
    ddp = DistributedDataParallel(model, static_graph=True)
    with pytest.raises(UnsupportedEngineError, match=r"never reduces.*Use scale=0\.0\."):
        DummyLossWrapper(ddp, MAP, None)
    with pytest.raises(UnsupportedEngineError, match=r"never reduces.*Use scale=0\.0\."):
        attach_to_outputs(DummyLossWrapper(model, MAP, None), ddp)
    attach_to_outputs(DummyLossWrapper(model, MAP, 0.0), ddp)


@pytest.mark.filterwarnings("ignore:.*detect unused parameters automatically:UserWarning")
@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1e-7),
        ({}, None),
        ({"static_graph": True}, 0.0),
        ({"static_graph": True, "find_unused_parameters": True}, 1e-7),
    ],
    ids=str,
)
def test_other_options_of_ddp_are_not_refused(options: dict[str, bool], scale: float) -> None:
    DummyLossWrapper(DistributedDataParallel(Model(), **options), MAP, scale)  # type: ignore[arg-type]


def test_ddp_around_no_parameter_of_the_map_is_not_refused() -> None:
    model = Model()
    model.trunk = DistributedDataParallel(model.trunk, find_unused_parameters=True)
    DummyLossWrapper(model, MAP)
