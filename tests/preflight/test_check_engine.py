"""What preflight says of engines and of graphs happens, and stops with the remedy."""

import inspect
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from modaldummy import DummyLossWrapper, preflight
from tests.holding import NAMES
from tests.preflight.builders import (
    ddp,
    ddp_below,
    ddp_with_loss_inside,
    ddp_with_optimizers,
    engine,
    partitioned,
    sharded_and_held,
)
from tests.preflight.findings import codes
from tests.preflight.models import FOUR, Engine, Inside, Model, mapped, sharded, sparse_tables


def train(model: Any, wrapper: DummyLossWrapper, names: Any = NAMES) -> None:
    """Forward and backward for batches of one modality each."""
    for name in names:
        wrapper.total(model([name]), name).backward()


# --- DDP -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ddp_that_looks_for_unused_parameters_stops(scale: float | None) -> None:
    arguments = ddp(scale, find_unused_parameters=True)
    with pytest.raises(RuntimeError, match="ready only once"):
        train(arguments["model"], arguments["wrapper"])
    assert "MD101" in codes(**arguments)


@pytest.mark.usefixtures("process_group")
def test_each_remedy_for_it_works() -> None:
    for options in ({"find_unused_parameters": False}, {"static_graph": True}):
        arguments = ddp(**options)
        train(arguments["model"], arguments["wrapper"])
        assert codes(**arguments) == set()
    with pytest.warns(UserWarning, match="detect unused parameters automatically"):
        arguments = ddp(static_graph=True, find_unused_parameters=True)
    train(arguments["model"], arguments["wrapper"])
    assert codes(**arguments) == set()
    arguments = ddp_with_loss_inside(find_unused_parameters=True)
    for name in NAMES:
        arguments["model"]([name]).backward()
    assert codes(**arguments) == set()


@pytest.mark.usefixtures("process_group")
def test_a_wrapper_elsewhere_in_the_model_is_not_this_one() -> None:
    model = Inside()
    around = DistributedDataParallel(model, find_unused_parameters=True)
    assert codes(wrapper=model.model.wrapper(), model=around) == {"MD101"}


@pytest.mark.usefixtures("process_group")
def test_ddp_around_nothing_of_the_map_does_not_matter() -> None:
    model = Model()
    model.trunk = DistributedDataParallel(model.trunk, find_unused_parameters=True)
    train(model, model.wrapper())
    assert codes(wrapper=model.wrapper()) == set()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
def test_ddp_stops_at_a_sparse_table_without_a_gradient(options: dict[str, Any]) -> None:
    for scale in (None, 0.0):
        model = sparse_tables()
        around = DistributedDataParallel(model, **options)
        wrapper = mapped(model, scale)
        assert ("MD103" in codes(wrapper=wrapper, model=around)) == (scale is None)
        if scale is None:
            with pytest.raises(RuntimeError, match="Expected sparse gradient to be defined"):
                train(around, wrapper, NAMES[:1])
        else:
            train(around, wrapper, NAMES[:1])


@pytest.mark.usefixtures("process_group")
def test_static_graph_is_in_order_with_a_scale() -> None:
    assert "MD102" in codes(**ddp_below(None, static_graph=True))
    assert codes(**ddp_below(0.0, static_graph=True)) == {"MD131"}
    assert codes(**ddp_below(None)) == set()


@pytest.mark.usefixtures("process_group")
def test_without_a_gradient_ddp_leaves_zeros_for_the_scaler() -> None:
    """So an optimizer whose modality is inactive does not stop it."""
    arguments = ddp_with_optimizers()
    scaler, around = arguments["scaler"], arguments["model"]
    scaler.scale(arguments["wrapper"].total(around(["T1"]), "T1")).backward()
    for optimizer in arguments["optimizer"]:
        scaler.step(optimizer)


# --- FSDP2 and DeepSpeed -------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("parts", "options", "names"),
    [
        (["towers.dMRI", ""], {}, ["towers.dMRI.weight", "towers.dMRI.bias"]),
        (["towers.T1"], {}, ["towers.T1.weight", "towers.T1.bias"]),
        ([""], {"reshard_after_forward": True}, None),
        (["trunk", ""], {}, []),
        ([""], {"reshard_after_forward": False}, []),
        ([""], {}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("after_forward", [False, True])
def test_what_fsdp2_leaves_in_shards_is_named(
    parts: list[str], options: dict[str, Any], names: list[str] | None, after_forward: bool
) -> None:
    """As it is after the forward pass of another modality, before and after it."""
    model = sharded(*parts, **options)
    wrapper = mapped(model)
    towers = {n: p for n, p in model.named_parameters() if n.startswith("towers")}
    if after_forward:
        model(["rsfMRI"])
        towers = {n: p for n, p in model.named_parameters() if n.startswith("towers")}
        shards = [name for name, p in towers.items() if hasattr(p, "to_local")]
        assert shards == (list(towers) if names is None else names)
    found = [finding.evidence["parameters"] for finding in preflight(wrapper)]
    assert found == ([list(towers)] if names is None else [names] if names else [])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("scale", [1e-7, None])
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": True}], ids=str)
def test_with_zeros_for_what_got_no_gradient_the_whole_is_in_order(
    options: dict[str, Any], scale: float | None
) -> None:
    """A tower that is sharded by itself is not."""
    whole: Any = sharded("", **options)
    if not hasattr(whole, "set_reduce_scatter_unused_params"):
        pytest.skip("this torch cannot reduce zeros")
    whole.set_reduce_scatter_unused_params(True)
    assert codes(wrapper=mapped(whole, scale)) == set()
    parts: Any = sharded("towers.dMRI", "", **options)
    parts.set_reduce_scatter_unused_params(True)
    (finding,) = preflight(mapped(parts, scale))
    assert finding.evidence["parameters"] == ["towers.dMRI.weight", "towers.dMRI.bias"]


@pytest.mark.usefixtures("process_group")
def test_frozen_towers_are_gathered_too() -> None:
    model = sharded("towers.T1", "")
    model.towers["T1"].requires_grad_(False)
    assert codes(wrapper=mapped(model)) == {"MD104", "MD113"}


@pytest.mark.usefixtures("process_group")
def test_dtensors_of_others_are_for_their_ranks_to_agree_on() -> None:
    """Those of a mesh see the same batch, as a rule; `check_ranks` can tell, preflight cannot."""
    model = Model()
    tower = model.towers["dMRI"]
    mesh = init_device_mesh("cpu", (1,))
    tower.weight = nn.Parameter(distribute_tensor(tower.weight, mesh, [Replicate()]))
    assert codes(wrapper=mapped(model)) == set()


@pytest.mark.usefixtures("process_group")
def test_set_reshard_after_forward_is_seen() -> None:
    model = sharded("")
    model.set_reshard_after_forward(True)  # type: ignore[operator]
    assert codes(wrapper=mapped(model)) == {"MD104"}


@pytest.mark.usefixtures("process_group")
def test_without_private_attributes_the_default_is_assumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of torch 2.8, of 2.13, and where there are none."""
    model = sharded("", reshard_after_forward=True)
    wrapper = mapped(model)

    class State:
        _auto_reshard_after_forward = False

    class Group:
        post_forward_mesh_info = "mesh"

    for name, value, expected in (
        ("_fsdp_param_group", Group(), {"MD104"}),
        ("_fsdp_param_groups", [Group()], {"MD104"}),
        ("_nothing", None, set()),
    ):
        state = State()
        setattr(state, name, value)
        monkeypatch.setattr(type(model), "_get_fsdp_state", lambda _, state=state: state)
        assert codes(wrapper=wrapper) == expected
    monkeypatch.setattr(type(model), "_get_fsdp_state", lambda _: None)
    assert codes(wrapper=wrapper) == set()


@pytest.mark.usefixtures("process_group")
def test_while_parameters_are_gathered_optimizers_are_not_judged() -> None:
    """Their parameters are the shards, which the model does not have at that moment."""
    arguments = sharded_and_held(forward=True)
    assert codes(**arguments) == {"MD142"}
    arguments.pop("loss").backward()
    assert codes(**arguments) == set()


@pytest.mark.usefixtures("process_group")
def test_an_optimizer_made_before_sharding_moves_nothing() -> None:
    """All of its parameters are gone from the model; one made afterwards has them."""
    model = Model()
    early = SGD(model.parameters(), lr=0.1)
    fully_shard(model)
    wrapper = mapped(model)
    (finding,) = preflight(wrapper, early)
    assert finding.evidence["parameters"] == [name for name, _ in model.named_parameters()]
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    model.total(wrapper, "T1").backward()
    early.step()
    after = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, before, after))
    assert codes(wrapper=wrapper, optimizer=SGD(model.parameters(), lr=0.1)) == set()


@pytest.mark.parametrize("stage", [0, 1])
def test_other_stages_of_zero_are_in_order(stage: int) -> None:
    assert codes(**engine(stage)) == set()
    assert codes(**engine(0, None, overlap=True)) == set()


@pytest.mark.parametrize(
    ("arguments", "severity"),
    [
        (engine(1, None), "warning"),
        (engine(1, overlap=True), "warning"),
        (engine(1, None, overlap=True), "error"),
        (engine(2), "warning"),
        (engine(2, None), "error"),
        (engine(3), "error"),
        (partitioned("_hp_mapping"), "warning"),
        (partitioned("ds_id"), "error"),
    ],
)
def test_what_stops_in_any_case_is_an_error(arguments: dict[str, Any], severity: str) -> None:
    """ZeRO-2 and ZeRO-3 with some scales; otherwise it takes ranks that differ."""
    (finding,) = preflight(**arguments)
    assert finding.severity == severity
    assert finding.evidence["parameters"][0] == "towers.T1.weight"


def test_the_engine_tells_more_than_what_it_left_on_parameters() -> None:
    arguments = partitioned("_hp_mapping")
    for stage, expected in ((0, set()), (1, set()), (2, {"MD105"})):
        model = Engine(arguments["wrapper"].parameters.model, stage)
        assert codes(**arguments, model=model) == expected


# --- torch.compile -------------------------------------------------------------------------------

all_sets = [active for count in range(1, 5) for active in combinations(FOUR, count)]


@pytest.mark.parametrize("in_place", [False, True])
def test_dynamo_gives_up_after_as_many_graphs(in_place: bool) -> None:
    """And goes on with the limit that the remedy names."""
    for limit in (8, len(all_sets)):
        torch._dynamo.reset()
        model: Any = Model(FOUR)
        wrapper = mapped(model)
        called: Any = model if in_place else torch.compile(model, backend="eager", fullgraph=True)
        if in_place:
            model.compile(backend="eager", fullgraph=True)
        with dynamo_config.patch(recompile_limit=limit):
            findings = preflight(wrapper, model=called)
            if limit == 8:
                assert f"recompile_limit = {len(all_sets)}" in findings[0].remedy
                with pytest.raises(FailOnRecompileLimitHit):
                    run(called, wrapper)
            else:
                assert findings == []
                run(called, wrapper)


def run(model: Any, wrapper: DummyLossWrapper) -> None:
    for active in all_sets:
        wrapper.total(model(active), active).backward()


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="this torch.compile takes no limit",
)
def test_a_limit_of_its_own_counts() -> None:
    model = Model(FOUR)
    for limit, expected in ((15, set()), (14, {"MD107"})):
        options: dict[str, Any] = {"recompile_limit": limit}
        compiled: Any = torch.compile(model, backend="eager", **options)
        assert codes(wrapper=mapped(model), model=compiled) == expected


def test_compiled_towers_have_a_graph_each() -> None:
    torch._dynamo.reset()
    model = Model(FOUR)
    for name in FOUR:
        model.towers[name] = nn.Sequential(nn.Linear(3, 4))
        model.towers[name].compile(backend="eager")
    run(model, mapped(model))
    assert codes(wrapper=mapped(model)) == set()


def test_members_of_tuples_count_as_modalities() -> None:
    model = Model(("T1", "dMRI"))
    paths: dict[Any, str] = {("T1", "dMRI"): "towers.T1", ("PET", "CT"): "towers.dMRI"}
    compiled: Any = torch.compile(model, backend="eager")
    (finding,) = preflight(DummyLossWrapper(compiled, paths))
    assert finding.evidence == {"modalities": 4, "active_sets": 15, "recompile_limit": 8}
