"""Gradients under DDP are those of one process, whatever the ranks hold at each step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from tests.distributed.engines import DDPS, REFUSED, outcome
from tests.distributed.oracle import MAP, Model, batch_of, loss_of, truth
from tests.distributed.schedules import check_schedules
from tests.fleet import Fleet


@pytest.mark.parametrize("engine", [name for name in DDPS if "compiled" not in name])
def test_gradients_are_the_average_over_ranks(fleet: Fleet, engine: str) -> None:
    check_ddp(fleet, engine, num_examples=10)


@pytest.mark.parametrize("engine", [name for name in DDPS if "compiled" in name])
def test_gradients_of_compiled_ddp_are_the_average_over_ranks(two: Fleet, engine: str) -> None:
    check_ddp(two, engine, num_examples=4)


def check_ddp(fleet: Fleet, engine: str, num_examples: int) -> None:
    static = "static" in engine
    check_schedules(
        fleet,
        outcome,
        engine,
        (1e-7, 0.0) if static else (1e-7, 0.0, None),
        num_examples=num_examples,
        # DDP then leaves gradients of parameters alone that no rank used, dummy or no dummy.
        may_miss="unused" in engine,
        # Upstream limit: `no_sync` at the first step of a static graph fails an assertion of torch.
        max_micros=1 if static else 2,
    )


def refusal(rank: int, engine: str) -> str:
    with pytest.raises(UnsupportedEngineError) as caught:
        outcome(rank, engine, 1e-7, (((("T1",), ("dMRI",)),),))
    return str(caught.value)


@pytest.mark.parametrize("engine", REFUSED)
def test_ddp_that_does_not_support_the_dummy_term_is_refused(two: Fleet, engine: str) -> None:
    for message in two.ask(refusal, engine):
        assert "find_unused_parameters=False" in message


def uneven(rank: int, scale: float | None) -> float:
    """The largest error where rank 0 has three batches and rank 1 has one."""
    ddp = DistributedDataParallel(Model())
    wrapper = DummyLossWrapper(ddp, MAP, scale)
    worst = 0.0
    with ddp.join():  # what a rank that is done would have counts as zero
        for place in range(1 if rank else 3):
            active = ("T1", "dMRI")[place % 2 :]
            others = [(active,), (("rsfMRI",),)] if place == 0 else [(active,)]
            ddp.zero_grad()
            batch = batch_of(active if rank == 0 else ("rsfMRI",), place, 0, rank)
            wrapper.total(loss_of(ddp(batch)), [n for n in batch if n != "text"]).backward()
            values = {name: p.double() for name, p in ddp.module.named_parameters()}
            step = (tuple(sets[0] for sets in others),)
            right = truth(Model(), values, scale, step, place)
            for name, parameter in ddp.module.named_parameters():
                assert parameter.grad is not None
                error = parameter.grad.double() - right[name].gradient * len(others) / 2
                worst = max(worst, float(error.abs().max()))
    return worst


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ranks_that_have_run_out_of_batches_join(two: Fleet, scale: float | None) -> None:
    assert max(two.ask(uneven, scale)) < 1e-6


class Tables(nn.Module):
    """An embedding with sparse gradients for each of two modalities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = ("T1", "dMRI")
        self.tables = nn.ModuleDict({name: nn.Embedding(5, 2, sparse=True) for name in names})

    def forward(self, names: Sequence[str]) -> Tensor:
        rows = torch.tensor([1, 3])
        return torch.stack([self.tables[name](rows).square().sum() for name in names]).sum()


def sparse(rank: int, scale: float, steps: Any) -> float:
    """The largest error of a sparse gradient, whose dummy is empty."""
    ddp = DistributedDataParallel(Tables())
    wrapper = DummyLossWrapper(ddp, {"T1": "tables.T1", "dMRI": "tables.dMRI"}, scale)
    worst = 0.0
    for ranks in steps:
        ddp.zero_grad()
        wrapper.total(ddp(ranks[rank]), ranks[rank]).backward()
        single = Tables()
        torch.stack([single(names) for names in ranks]).mean().backward()
        for ours, right in zip(ddp.parameters(), single.parameters(), strict=True):
            assert ours.grad is not None
            assert ours.grad.is_sparse
            expected = torch.zeros(5, 2) if right.grad is None else right.grad.to_dense()
            worst = max(worst, float((ours.grad.to_dense() - expected).abs().max()))
    return worst


@pytest.mark.parametrize("scale", [1e-7, 0.0])
def test_sparse_gradients_are_averaged(two: Fleet, scale: float) -> None:
    steps = ((("T1",), ("dMRI",)), (("T1",), ("T1",)), (("T1", "dMRI"), ("dMRI",)))
    assert max(two.ask(sparse, scale, steps)) < 1e-6
