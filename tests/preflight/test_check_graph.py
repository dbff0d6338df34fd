"""What preflight says about the graph of a loss is what backward then does."""

import pytest
import torch

from modaldummy import DummyLossWrapper, preflight
from modaldummy._preflight import check_graph
from tests.holding import NAMES
from tests.preflight.cases import ddp, zero
from tests.preflight.models import Model, mapped, sharded, with_extra, with_head


def test_what_the_loss_does_not_reach_gets_no_gradient() -> None:
    model = with_head()
    wrapper = mapped(model)
    loss = model.total(wrapper, "T1")
    (finding,) = preflight(wrapper, loss=loss)
    loss.backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None]
    assert finding.evidence["parameters"] == missed == ["head.weight", "head.bias"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("remedy", ["", "mapped", "frozen"])
def test_ddp_stops_at_it_unless_it_is_mapped_or_frozen(remedy: str) -> None:
    model = with_head()
    model.head.requires_grad_(remedy != "frozen")
    around = ddp(model=model)["model"]
    paths = {name: f"towers.{name}" for name in NAMES}
    wrapper = DummyLossWrapper(model, paths | ({"PET": "head"} if remedy == "mapped" else {}))
    loss = wrapper.total(around(["T1"]), "T1")
    findings = preflight(wrapper, model=around, loss=loss)
    assert [finding.code for finding in findings] == ([] if remedy else ["MD111"])
    loss.backward()
    if remedy:
        around(["T1"])
    else:
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            around(["T1"])


@pytest.mark.usefixtures("process_group")
@pytest.mark.usefixtures("process_group")
def test_ranks_of_zero_would_differ_in_what_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_graph, "num_ranks", lambda group: 2)
    (finding,) = preflight(**zero(model=with_extra(), active=["T1"], has_groups=True))
    assert (finding.code, finding.severity) == ("MD121", "error")
    assert "so that ZeRO adds up gradients of different parameters" in finding.message
    assert finding.evidence["parameters"] == ["towers.T1.extra.weight", "towers.T1.extra.bias"]


def test_the_graph_does_not_show_sharded_parameters() -> None:
    """FSDP2 has resharded them after forward, and backward reaches them all the same."""
    model = sharded("", reshard_after_forward=True)
    wrapper = mapped(model)
    loss = model.total(wrapper, *NAMES)
    assert [finding.code for finding in preflight(wrapper, loss=loss)] == ["MD104"]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("has_graph", [False, True])
def test_a_graph_that_reaches_nothing_trains_nothing(has_graph: bool) -> None:
    model = Model()
    loss = torch.ones(2, requires_grad=has_graph).sum()
    assert [finding.code for finding in preflight(mapped(model), loss=loss)] == ["MD120"]
    if has_graph:
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())
