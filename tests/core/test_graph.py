"""The graph of a loss, walked without backward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modaldummy import attach_to_outputs
from modaldummy._core.graph import reached_leaves
from tests.holding import NAMES
from tests.preflight.models import Model


def test_a_graph_is_walked_to_its_leaves() -> None:
    """Of any depth, each node once, and no further."""
    leaves = [torch.ones(2, requires_grad=True) for _ in range(3)]
    value = leaves[0] * leaves[1] + leaves[2].detach()
    for _ in range(3000):
        value = value + value
    assert reached_leaves(value.sum()) == {id(leaves[0]), id(leaves[1])}
    assert reached_leaves(leaves[2]) == {id(leaves[2])}
    assert reached_leaves(torch.ones(2)) == set()


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_the_dummy_is_part_of_the_graph(names: tuple[str, ...]) -> None:
    model = Model()
    total = model.total(model.wrapper(), *names)
    assert reached_leaves(total) == {id(parameter) for parameter in model.parameters()}


def test_the_dummy_is_left_out_where_asked() -> None:
    """Also the edges by which an output is tied to all parameters."""
    model = Model()
    wrapper = model.wrapper()
    real = model(["T1"])
    reached = {id(p) for part in (model.towers["T1"], model.trunk) for p in part.parameters()}
    assert reached_leaves(wrapper.total(real, "T1"), follow_dummies=False) == reached
    with attach_to_outputs(wrapper, model):
        tied = model(["T1"])
        assert reached_leaves(tied) == {id(parameter) for parameter in model.parameters()}
        assert reached_leaves(tied, follow_dummies=False) == reached


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reentrant_checkpoint_hides_what_is_in_it(reentrant: bool) -> None:
    model = Model()
    hidden = model.towers["T1"](torch.ones(2, 3))
    loss = checkpoint(model.trunk, hidden, use_reentrant=reentrant).sum()
    parameters = [*model.towers["T1"].parameters(), *model.trunk.parameters()]
    assert reached_leaves(loss) == (None if reentrant else set(map(id, parameters)))
