"""With a shadow, ranks with different modalities are right under engines that need the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from modaldummy import (
    DummyLossWrapper,
    RecordError,
    hold_inactive,
    preflight,
    shadow_inactive,
)
from modaldummy._core.paths import strip_wrappers
from modaldummy._engines import local_shard
from tests.distributed.engines import (
    AGREEING,
    DDPS,
    FSDP,
    FSDP1,
    FSDPS,
    TOWERS,
    Checkpointed,
    LateFSDP,
    LateFSDP1,
    fsdp,
    fsdp1,
    needs_averages,
    shadowed,
)
from tests.distributed.oracle import (
    MAP,
    NAMES,
    Active,
    Late,
    Make,
    Model,
    Outcome,
    Run,
    Schedule,
    batch_of,
    held_against_truth,
    loss_of,
)
from tests.distributed.schedules import check_schedules
from tests.fleet import Fleet
from tests.optimizers import OPTIMIZERS


class Compiled(Model):
    """Each tower and each layer of the trunk is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        for part in (*self.towers.values(), self.fusion, *self.trunk):
            part.compile(backend="aot_eager")


PARTS = [*TOWERS, "fusion", "trunk.0", "trunk.1"]
ENGINES: dict[str, Make] = {
    **AGREEING,
    "FSDP2, all parts": fsdp(*PARTS),
    "FSDP2, all parts, compiled one by one": fsdp(*PARTS, model=Compiled),
    "FSDP2, all parts, checkpoints": fsdp(*PARTS, model=lambda: Checkpointed(False)),
    "FSDP2, towers last": fsdp(*TOWERS, "fusion", model=Late, kind=LateFSDP),
    "FSDP2, root": FSDPS["FSDP2, root"],
    "FSDP1, towers": fsdp1(*TOWERS, "fusion", kind=FSDP1),
    "FSDP1, towers last": fsdp1(*TOWERS, "fusion", model=Late, kind=LateFSDP1),
    "FSDP1, root": fsdp1(kind=FSDP1),
    "DDP, several buckets": DDPS["DDP, several buckets"],
    "DDP, checkpoints": DDPS["DDP, checkpoints"],
}


def outcome(
    rank: int, engine: str, scale: float | None, schedule: Schedule, agree: bool = False
) -> Outcome:
    return held_against_truth(rank, shadowed(ENGINES[engine]), scale, schedule, agree)


@needs_averages
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_the_average_over_ranks(two: Fleet, engine: str) -> None:
    """And `check_ranks` is silent before each forward pass."""
    check_schedules(two, outcome, engine, (1e-7, 0.0, None), num_examples=6, agree=True)


@pytest.mark.long
@needs_averages
def test_gradients_are_the_average_over_four_ranks(fleets: Any) -> None:
    check_schedules(fleets(4), outcome, "FSDP2, towers", (1e-7,), num_examples=6, agree=True)


def wrapped_by_fsdp1(model: Model) -> nn.Module:
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for part in (*TOWERS, "trunk"):
        unit = FullyShardedDataParallel(model.get_submodule(part), **options)
        nn.Module.set_submodule(model, part, unit)
    return FullyShardedDataParallel(model, **options)


def sharded_by_fsdp2(model: Model) -> Any:
    for part in (*TOWERS, "trunk"):
        fully_shard(model.get_submodule(part))
    return fully_shard(model)


# What the ranks record: the same, or parts that only together say everything.
RECORDED: dict[str, tuple[Active, Active]] = {
    "all": (NAMES, NAMES),
    "parts": (("T1", "dMRI"), ("rsfMRI",)),
}


def recorded_before(
    rank: int, kind: type[Run], shard: Callable[[Any], Any], recorded: str, schedule: Schedule
) -> Any:
    def make(scale: float | None) -> Run:
        model = kind.reference().to(kind.dtype)
        wrapper = DummyLossWrapper(model, MAP, scale)
        with shadow_inactive(wrapper, model).record():
            model(batch_of(RECORDED[recorded][rank], 99, dtype=kind.dtype))
        engine = shard(model)
        return kind(engine, engine, wrapper)

    return held_against_truth(rank, make, 1e-7, schedule)


@needs_averages
@pytest.mark.parametrize("recorded", RECORDED)
@pytest.mark.parametrize(
    ("kind", "shard"),
    [
        (FSDP1, wrapped_by_fsdp1),
        (LateFSDP1, wrapped_by_fsdp1),
        (FSDP, sharded_by_fsdp2),
        (LateFSDP, sharded_by_fsdp2),
    ],
    ids=["FSDP1", "FSDP1, towers last", "FSDP2", "FSDP2, towers last"],
)
def test_a_record_from_before_the_engine(two: Fleet, kind: Any, shard: Any, recorded: str) -> None:
    schedule = ((("T1",), ("dMRI",)),), (((), ("T1", "dMRI")),)
    for found in two.ask(recorded_before, kind, shard, recorded, schedule):
        assert found.worst <= 1, found


def different_records(rank: int) -> tuple[list[str], list[str], str]:
    """What preflight says without a shadow and with one, and the first forward pass."""
    run = fsdp(*TOWERS, model=lambda: Checkpointed(False) if rank else Model())(1e-7)
    before = [finding.code for finding in preflight(run.wrapper)]
    with shadow_inactive(run.wrapper, run.call).record():
        run.call(batch_of(NAMES, 99, dtype=run.dtype))
    after = [finding.code for finding in preflight(run.wrapper)]
    try:
        run.call(batch_of((), 0, dtype=run.dtype))
    except RecordError as error:
        return before, after, str(error)
    return before, after, ""


def test_ranks_with_different_models_are_refused(two: Fleet) -> None:
    for before, after, text in two.ask(different_records):
        assert (before, after) == (["MD104"], [])
        assert "was recorded in two ways: inside a checkpoint and outside of one" in text


def raised_in_a_tower(rank: int) -> None:
    """Only the first rank runs the tower on its data, where it raises."""
    run = shadowed(fsdp(*TOWERS))(1e-7)

    def fail(*_: Any) -> None:
        if rank == 0:
            raise ValueError("no such scan")

    run.bare.get_submodule("towers.T1").register_forward_hook(fail)
    loss = loss_of(run.call(batch_of(("T1",) if rank == 0 else (), 0, dtype=run.dtype)))
    run.wrapper.total(loss, ("T1",) if rank == 0 else ()).backward()


@pytest.mark.long
def test_an_error_in_one_rank_ends_the_others_within_the_timeout() -> None:
    with Fleet(2, timeout=5, limit=60, quiet=True) as fleet:
        first, second = fleet.answers(raised_in_a_tower)
    assert first.message == "no such scan"
    assert second.kind != "hangs"


HELD_ENGINES: dict[str, Make] = {
    "FSDP2": fsdp(*TOWERS, "fusion"),
    "FSDP1": fsdp1(*TOWERS, "fusion", kind=FSDP1),
}


def held(rank: int, engine: str, optimizer_name: str) -> list[list[str]]:
    """Towers of which a step moves values or optimizer state, with a shadow and a hold."""
    run = shadowed(HELD_ENGINES[engine])(1e-7)
    optimizer = OPTIMIZERS[optimizer_name](list(run.bare.parameters()), 0.1)
    hold_inactive(run.wrapper, optimizer)
    moved = []
    for place, ranks in enumerate(
        [(NAMES, NAMES), (("T1",), ()), (("dMRI",), ("dMRI",)), ((), ("rsfMRI",)), ((), ())]
    ):
        before = values_and_state(run, optimizer)
        loss = loss_of(run.call(batch_of(ranks[rank], place, rank, dtype=run.dtype)))
        run.wrapper.total(loss, ranks[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = values_and_state(run, optimizer)
        changed = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
        moved.append([name for name in NAMES if any(f"towers.{name}." in each for each in changed)])
    return moved


def values_and_state(run: Run, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole parameters, and what this rank has of their optimizer state."""
    state = {
        f"{strip_wrappers(name)}: {kind}": local_shard(tensor).clone()
        for name, parameter in run.bare.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor)
    }
    return run.values() | state


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "SGD, momentum 0.9, decay 0.01"])
@pytest.mark.parametrize("engine", HELD_ENGINES)
def test_a_hold_lets_go_of_what_any_rank_trains(two: Fleet, engine: str, optimizer: str) -> None:
    for moved in two.ask(held, engine, optimizer):
        assert moved == [list(NAMES), ["T1"], ["dMRI"], ["rsfMRI"], []]


class Frozen(nn.Module):
    """A unit with parameters of its own, which uses the output of a tower if it gets one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, hidden: Tensor, *, states: Tensor | None = None) -> Tensor:
        hidden = hidden * self.factor
        return hidden if states is None else hidden + states


class FrozenTrunk(nn.Module):
    """Without the tower nothing before the loss needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.trunk, self.head = nn.Linear(4, 4), Frozen(), nn.Linear(4, 2)
        self.requires_grad_(False)
        self.tower = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        states = None if image is None else self.tower(image)
        return loss_of(self.head(self.trunk(self.text(text), states=states)))


def frozen_trunk(rank: int) -> dict[str, float]:
    """Errors of the gradients of the tower, which only the second rank runs on data."""
    plain, model = FrozenTrunk(), FrozenTrunk()
    for part in (model.text, *model.tower, model.trunk, model.head, model):
        fully_shard(part)
    run = FSDP(model, model, DummyLossWrapper(model, {"image": "tower"}, 1e-3))
    inputs = torch.ones(2, 4), torch.ones(2, 3)
    shadow_inactive(run.wrapper, model, examples=[inputs])
    run.learn(model(*inputs[: rank + 1]), ("image",) * rank, 1)
    plain(*inputs).backward()
    actual = run.gradients()
    errors = {}
    for name, parameter in plain.tower.named_parameters(prefix="tower"):
        gradient, real = actual[name], parameter.grad
        assert gradient is not None
        assert real is not None
        errors[name] = float((gradient - (real + 1e-3) / 2).abs().max())
    return errors


@needs_averages
def test_backward_runs_a_frozen_module_that_gets_the_tower_as_an_option(two: Fleet) -> None:
    for errors in two.ask(frozen_trunk):
        assert max(errors.values()) < 1e-6
