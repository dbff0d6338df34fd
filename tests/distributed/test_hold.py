"""Hold on two ranks: what one rank trains changes on both, what no rank trains on neither."""

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from modaldummy import DummyLossWrapper, hold_inactive
from tests.fleet import Fleet
from tests.holding import NAMES, Towers

# The modalities of each rank in each step, one micro-batch after the other.
STEPS: list[tuple[list[str], list[str]]] = [
    (["T1"], ["rsfMRI"]),
    (["T1"], ["T1"]),
    (["dMRI", "T1"], ["T1", "rsfMRI"]),
    (["rsfMRI"], ["rsfMRI"]),
]
MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, bucket views": {"gradient_as_bucket_view": True},
    "DDP, closure": {},
}


class Model(Towers):
    def forward(self, name: str) -> Tensor:
        return self.loss([name])


def towers_of(held: Iterable[str]) -> set[str]:
    return {name.split(".")[-2] for name in held}


def train(rank: int, mode: str) -> dict[str, Any]:
    """What each step held, its number of all-reduces, and the parameters after it."""
    model = Model()
    ddp = DistributedDataParallel(model, **MODES[mode])
    wrapper = DummyLossWrapper(ddp, {name: f"towers.{name}" for name in NAMES})
    optimizer = AdamW(ddp.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    held, reductions, values = [], [], []
    for batches in STEPS:

        def backward(names: list[str] = batches[rank]) -> Tensor:
            for name in names:
                ddp.require_backward_grad_sync = name is names[-1]
                total = wrapper.total(ddp(name), name)
                total.backward()
            return total

        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            if mode == "DDP, closure":
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
        optimizer.zero_grad()
        held.append(towers_of(handle.held))
        reductions.append(reduce.call_count)
        values.append([p.detach().clone() for p in model.parameters()])
    counts = {name: int(optimizer.state[model.towers[name].weight]["step"]) for name in NAMES}
    return {"held": held, "reductions": reductions, "values": values, "counts": counts}


def alone(rank: int) -> dict[str, Any]:
    """Each rank trains its own model and decides alone."""
    group = dist.new_subgroups(1)[0]
    other = dist.new_group([0])
    model = Model()
    wrapper = model.wrapper()
    optimizer = AdamW(model.parameters(), lr=0.1)
    if rank == 1:
        with pytest.raises(TypeError, match="that this rank belongs to"):
            hold_inactive(wrapper, optimizer, group=other)
    handle = hold_inactive(wrapper, optimizer, group=group)
    name = NAMES[rank]
    wrapper.total(model(name), name).backward()
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        optimizer.step()
    return {"held": handle.held, "reductions": reduce.call_count}


def half_observed(rank: int) -> tuple[str, ...]:
    """Rank 1 adds no dummy term in this step, so that only rank 0 knows what is trained."""
    model = Model()
    wrapper = model.wrapper()
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    loss = model("T1")
    (wrapper.total(loss, "T1") if rank == 0 else loss).backward()
    optimizer.step()
    return handle.held


def sharded_optimizer(rank: int) -> dict[str, Any]:
    """Each rank steps its part of the parameters and sends it to the other."""
    # The import warns. Only in the ranks, warnings are no errors.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Model()
    ddp = DistributedDataParallel(model)
    wrapper = model.wrapper()
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), AdamW, lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    name = NAMES[rank]
    wrapper.total(ddp(name), name).backward()
    optimizer.step()
    return {"held": handle.held, "values": [p.detach().clone() for p in model.parameters()]}


def sharded_parameters(scale: float | None) -> list[tuple[str, ...]]:
    """FSDP2: one step for a batch, one for two of which the first is not reduced."""
    model = Model()
    for tower in model.towers.values():
        fully_shard(tower)
    fully_shard(model)
    wrapper = model.wrapper(scale)
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    found = []
    for names in (["T1"], ["T1", "dMRI"]):
        for name in names:
            model.set_requires_gradient_sync(name is names[-1])  # type: ignore[operator]
            wrapper.total(model(name), name).backward()
        before = model.towers["rsfMRI"].weight.to_local().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.towers["rsfMRI"].weight.to_local(), before)
        found.append(handle.held)
    return found


def everything(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {mode: train(rank, mode) for mode in MODES}
    for case in (alone, half_observed, sharded_optimizer):
        found[case.__name__] = case(rank)
    for scale in (1e-7, None):
        found[f"sharded_parameters, {scale}"] = sharded_parameters(scale)
    return found


@pytest.fixture(scope="module")
def ranks(two: Fleet) -> list[dict[str, Any]]:
    return two.ask(everything)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_agree_on_what_to_hold(ranks: list[dict[str, Any]], mode: str) -> None:
    for found in ranks:
        assert found[mode]["held"] == [{"dMRI"}, {"dMRI", "rsfMRI"}, set(), {"T1", "dMRI"}]
        assert found[mode]["counts"] == {"T1": 3, "rsfMRI": 3, "dMRI": 1}


@pytest.mark.parametrize("mode", MODES)
def test_ranks_stay_identical_and_only_held_parameters_stay_unchanged(
    ranks: list[dict[str, Any]], mode: str
) -> None:
    first, second = (found[mode]["values"] for found in ranks)
    for ours, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, theirs))
    names = [name for name, _ in Model().named_parameters()]
    starts = [list(Model().parameters()), *first]
    for before, after, held in zip(starts, first, ranks[0][mode]["held"], strict=False):
        for name, old, new in zip(names, before, after, strict=True):
            assert torch.equal(old, new) == (name.split(".")[1] in held), name


def test_agreement_takes_one_small_reduction(ranks: list[dict[str, Any]]) -> None:
    """With a closure, one before it and one after it."""
    for found in ranks:
        assert found["DDP"]["reductions"] == [1] * len(STEPS)
        assert found["DDP, closure"]["reductions"] == [2] * len(STEPS)


def test_a_group_of_one_rank_decides_alone(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert towers_of(found["alone"]["held"]) == set(NAMES) - {NAMES[rank]}
        assert found["alone"]["reductions"] == 0


def test_a_rank_without_a_loss_of_the_wrapper_follows_the_others(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        assert towers_of(found["half_observed"]) == {"rsfMRI", "dMRI"}


def test_an_optimizer_that_shards_its_state_holds(ranks: list[dict[str, Any]]) -> None:
    values = [found["sharded_optimizer"]["values"] for found in ranks]
    assert all(map(torch.equal, *values))
    for (name, start), value in zip(Model().named_parameters(), values[0], strict=True):
        assert torch.equal(start, value) == ("dMRI" in name), name
    for found in ranks:
        assert towers_of(found["sharded_optimizer"]["held"]) == {"dMRI"}


@pytest.mark.parametrize("scale", [1e-7, None])
def test_sharded_parameters_are_held_also_before_their_gradients_are_reduced(
    ranks: list[dict[str, Any]], scale: float | None
) -> None:
    """FSDP2 stores gradients elsewhere until it reduces them. None does not mean cleared then."""
    for found in ranks:
        first, second = map(towers_of, found[f"sharded_parameters, {scale}"])
        assert (first, second) == ({"rsfMRI", "dMRI"}, {"rsfMRI"})
