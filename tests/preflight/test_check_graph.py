"""What preflight says of the graph of a loss is what backward then does."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, preflight
from tests.holding import NAMES
from tests.preflight.findings import codes
from tests.preflight.models import Model, mapped, sharded


def train(model: nn.Module, wrapper: DummyLossWrapper) -> None:
    for name in NAMES:
        wrapper.total(model([name]), name).backward()


class WithHead(Model):
    """A head that no batch reaches, unless there is PET."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


def test_what_the_loss_does_not_reach_gets_no_gradient() -> None:
    model = WithHead()
    wrapper = mapped(model)
    loss = model.total(wrapper, "T1")
    (finding,) = preflight(wrapper, loss=loss)
    loss.backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None]
    assert finding.evidence["parameters"] == missed == ["head.weight", "head.bias"]


@pytest.mark.usefixtures("process_group")
def test_ddp_stops_at_it_unless_it_is_mapped_or_frozen() -> None:
    """A warning where DDP itself looks for what is unused."""
    model = WithHead()
    paths = {name: f"towers.{name}" for name in NAMES}
    around = DistributedDataParallel(model)
    wrapper = DummyLossWrapper(model, paths)
    (finding,) = preflight(wrapper, model=around, loss=wrapper.total(around(["T1"]), "T1"))
    assert (finding.code, finding.severity) == ("MD111", "error")
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        train(around, wrapper)
    static = DistributedDataParallel(model, static_graph=True)
    (finding,) = preflight(wrapper, model=static, loss=wrapper.total(static(["T1"]), "T1"))
    assert (finding.code, finding.severity) == ("MD111", "warning")

    for remedy in ("mapped", "frozen"):
        model = WithHead()
        model.head.requires_grad_(remedy == "mapped")
        around = DistributedDataParallel(model)
        wrapper = DummyLossWrapper(model, {**paths, "PET": "head"})
        train(around, wrapper)
        loss = wrapper.total(around(["T1"]), "T1")
        assert codes(wrapper=wrapper, model=around, loss=loss) <= {"MD113"}


@pytest.mark.usefixtures("process_group")
def test_of_sharded_parameters_the_graph_does_not_tell() -> None:
    """FSDP2 has put them back into shards after forward; backward reaches them all the same."""
    model = sharded("", reshard_after_forward=True)
    wrapper = mapped(model)
    loss = model.total(wrapper, *NAMES)
    assert codes(wrapper=wrapper, loss=loss) == {"MD104"}
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backward_of_a_loss_without_a_graph_fails() -> None:
    model = Model()
    wrapper = model.wrapper()
    with torch.no_grad():
        loss = model.total(wrapper, *NAMES)
    assert codes(wrapper=wrapper, loss=loss) == {"MD120"}
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


def test_a_graph_that_reaches_nothing_leaves_everything_without_a_gradient() -> None:
    model = Model()
    loss = model.wrapper().total(torch.ones(2, requires_grad=True).sum(), NAMES)
    assert codes(wrapper=model.wrapper(), loss=loss) == {"MD120"}
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
