"""What the page on alternatives says of DDP and FSDP2 without a dummy happens on two ranks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper, hold_inactive
from tests.fleet import Fleet
from tests.holding import NAMES, Towers

ZEROS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


class Checkpointed(Towers):
    """Runs towers again during backward."""

    def loss(self, active: Iterable[str]) -> Tensor:
        data = torch.ones(2, 3, requires_grad=True)
        outputs = [checkpoint(self.towers[name], data, use_reentrant=True) for name in active]
        loss: Tensor = self.trunk(torch.stack(outputs)).square().mean()
        return loss


def stepped(model: Towers, call: Any, steps: Any, rank: int) -> list[dict[str, float | None]]:
    """By step and tower: how wrong its gradient is, None where there is none."""
    found = []
    for held in steps:
        model.zero_grad()
        call(held[rank]).backward()
        single = Towers()
        torch.stack([single.loss(names) for names in held]).mean().backward()
        errors: dict[str, float | None] = {}
        for name in NAMES:
            gradient, right = (m.towers[name].weight.grad for m in (model, single))
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            right = torch.zeros(4, 3) if right is None else right
            errors[name] = None if whole is None else float((whole - right).abs().max())
        found.append(errors)
    return found


class Called(nn.Module):
    """What DDP and FSDP2 call: the loss itself."""

    def __init__(self, model: Towers) -> None:
        super().__init__()
        self.model = model

    def forward(self, names: Sequence[str]) -> Tensor:
        return self.model.loss(names)


T1, DMRI, BOTH = ["T1"], ["dMRI"], ["T1", "dMRI"]
DIFFER = [(T1, DMRI), (T1, T1), (["rsfMRI"], DMRI)]
# Name, steps (what each rank holds), the model, and options of DDP.
DDPS: dict[str, tuple[Any, type[Towers], dict[str, Any]]] = {
    "unused": (DIFFER, Towers, {"find_unused_parameters": True}),
    "static, the same": ([(T1, DMRI)] * 3, Towers, {"static_graph": True}),
    "static, more": ([(T1, T1), (DMRI, DMRI)], Towers, {"static_graph": True}),
    "static, less": ([(BOTH, BOTH), (T1, T1), (T1, T1)], Towers, {"static_graph": True}),
    "unused, reentrant": ([(T1, DMRI)] * 2, Checkpointed, {"find_unused_parameters": True}),
}


def under_ddp(rank: int, case: str) -> list[dict[str, float | None]] | str:
    """What `stepped` finds, or the beginning of what DDP says."""
    steps, kind, options = DDPS[case]
    model = kind()
    try:
        return stepped(model, DistributedDataParallel(Called(model), **options), steps, rank)
    except RuntimeError as error:
        return str(error)


def penalised(rank: int) -> str:
    """What DDP says to a penalty that uses weights of an absent tower outside of what it calls."""
    model = Towers()
    ddp = DistributedDataParallel(Called(model), find_unused_parameters=True)
    with pytest.raises(RuntimeError) as caught:
        (ddp(T1) + model.towers["dMRI"].weight.square().sum()).backward()
    return str(caught.value)


def under_fsdp(rank: int, resharding: bool) -> list[dict[str, float | None]]:
    model = Towers()
    called: Any = Called(model)
    fully_shard(called, reshard_after_forward=resharding)
    called.set_reduce_scatter_unused_params(True)
    return stepped(model, called, DIFFER, rank)


@pytest.fixture(scope="module")
def own() -> Iterator[Fleet]:
    """Ranks that no other test needs afterwards: DDP stops in the midst of a step."""
    with Fleet(2, quiet=True) as fleet:
        yield fleet


def assert_right(found: list[dict[str, float | None]], missing: list[set[str]]) -> None:
    """Gradients are the average over ranks; `missing` have none at each step."""
    assert [{n for n, error in step.items() if error is None} for step in found] == missing
    assert max(error or 0.0 for step in found for error in step.values()) < 1e-6


def test_find_unused_parameters_is_right_and_leaves_none_what_no_rank_holds(own: Fleet) -> None:
    for found in own.ask(under_ddp, "unused"):
        assert_right(found, [{"rsfMRI"}, {"rsfMRI", "dMRI"}, {"T1"}])


def test_a_static_graph_is_right_where_each_rank_always_holds_the_same(own: Fleet) -> None:
    for found in own.ask(under_ddp, "static, the same"):
        assert_right(found, [{"rsfMRI"}] * 3)


@pytest.mark.parametrize("case", ["static, more", "static, less"])
def test_a_static_graph_stops_where_what_ranks_hold_changes(own: Fleet, case: str) -> None:
    for message in own.ask(under_ddp, case):
        assert "your training graph has changed in this iteration" in message.lower()


def test_find_unused_parameters_stops_at_a_reentrant_checkpoint_and_outside(own: Fleet) -> None:
    for message in own.ask(under_ddp, "unused, reentrant") + own.ask(penalised):
        assert message.startswith("Expected to mark a variable ready only once")


@pytest.mark.skipif(not ZEROS, reason="torch 2.8 cannot reduce zeros")
@pytest.mark.parametrize("resharding", [False, True])
def test_fsdp2_that_reduces_zeros_is_right_without_a_dummy(own: Fleet, resharding: bool) -> None:
    """For the whole model; what no rank holds ends with a gradient of zero."""
    for found in own.ask(under_fsdp, resharding):
        assert_right(found, [set()] * 3)


def held_under_fsdp(rank: int) -> bool:
    """Whether AdamW leaves alone what no rank holds, although its gradient is zero."""
    model = Towers()
    called: Any = Called(model)
    fully_shard(called)
    called.set_reduce_scatter_unused_params(True)
    wrapper = DummyLossWrapper(called, {name: f"model.towers.{name}" for name in NAMES}, None)
    optimizer = torch.optim.AdamW(called.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    before = model.towers["rsfMRI"].weight.full_tensor().clone()
    names = (T1, DMRI)[rank]
    wrapper.total(called(names), names).backward()
    optimizer.step()
    return torch.equal(model.towers["rsfMRI"].weight.full_tensor(), before)


@pytest.mark.skipif(not ZEROS, reason="torch 2.8 cannot reduce zeros")
def test_zeros_of_fsdp2_can_be_held(own: Fleet) -> None:
    assert all(own.ask(held_under_fsdp))
