"""What preflight says about engines happens, and does not happen with the remedy."""

import inspect
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit

from modaldummy import DummyLossWrapper, preflight
from tests.holding import NAMES
from tests.preflight.cases import ddp, ddp_with_loss_inside, held, optimizer_for_each_tower
from tests.preflight.models import FOUR, Model, mapped, sharded, sparse_table


def train(model: Any, wrapper: DummyLossWrapper) -> None:
    """Forward and backward for batches of one modality each."""
    for name in NAMES:
        wrapper.total(model([name]), name).backward()


# --- DDP -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ddp_that_looks_for_unused_parameters_stops(scale: float | None) -> None:
    arguments = ddp(scale, find_unused_parameters=True)
    with pytest.raises(RuntimeError, match="ready only once"):
        train(arguments["model"], arguments["wrapper"])
    assert [finding.code for finding in preflight(**arguments)] == ["MD101"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*detect unused parameters automatically:UserWarning")
def test_each_remedy_for_it_works() -> None:
    both: dict[str, Any] = {"static_graph": True, "find_unused_parameters": True}
    for options in ({}, both):
        arguments = ddp(**options)
        train(arguments["model"], arguments["wrapper"])
        assert preflight(**arguments) == []
    around = ddp_with_loss_inside(own_wrapper=True)["model"]
    for name in NAMES:
        around([name]).backward()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp_stops_at_a_sparse_table_without_a_gradient(static_graph: bool) -> None:
    for scale in (None, 0.0):
        arguments = ddp(scale, sparse_table(), static_graph=static_graph)
        found = {finding.code for finding in preflight(**arguments)}
        assert ("MD103" in found) == (scale is None)
        total = arguments["wrapper"].total(arguments["model"](["T1"]), "T1")
        if scale is None:
            with pytest.raises(RuntimeError, match="Expected sparse gradient to be defined"):
                total.backward()
        else:
            total.backward()


@pytest.mark.usefixtures("process_group")
def test_ddp_leaves_zeros_for_the_scaler() -> None:
    """So it does not stop at an optimizer whose modality is inactive, even with scale=None."""
    arguments = optimizer_for_each_tower(None, in_ddp=True)
    scaler, around = arguments["scaler"], arguments["model"]
    scaler.scale(arguments["wrapper"].total(around(["T1"]), "T1")).backward()
    for optimizer in arguments["optimizer"]:
        scaler.step(optimizer)


# --- FSDP2 and DeepSpeed: tests/ranks/test_conflicts.py has more layouts --------------------------


@pytest.mark.usefixtures("process_group")
def test_without_private_attributes_the_default_is_assumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The attributes of torch 2.8, of 2.13, and none."""
    model = sharded("", reshard_after_forward=True)
    group = SimpleNamespace(post_forward_mesh_info="mesh")
    for attributes, expected in (
        ({"_fsdp_param_group": group}, ["MD104"]),
        ({"_fsdp_param_groups": [group]}, ["MD104"]),
        ({}, []),
    ):
        state = SimpleNamespace(_auto_reshard_after_forward=False, **attributes)
        monkeypatch.setattr(type(model), "_get_fsdp_state", lambda _, state=state: state)
        assert [finding.code for finding in preflight(mapped(model))] == expected


@pytest.mark.usefixtures("process_group")
def test_optimizers_are_checked_again_after_backward() -> None:
    """FSDP2 then puts the shards, which the optimizer has, back into the model."""
    arguments = held(sharded(""), ["T1"])
    assert [finding.code for finding in preflight(**arguments)] == ["MD142"]
    arguments.pop("loss").backward()
    assert preflight(**arguments) == []


# --- torch.compile -------------------------------------------------------------------------------


def test_dynamo_gives_up_after_as_many_graphs() -> None:
    """It goes on with the limit that the remedy names."""
    all_sets = [active for count in range(1, 5) for active in combinations(FOUR, count)]
    for limit in (8, len(all_sets)):
        torch._dynamo.reset()
        model = Model(FOUR)
        wrapper = mapped(model)
        called: Any = torch.compile(model, backend="eager", fullgraph=True)
        stops = pytest.raises(FailOnRecompileLimitHit) if limit == 8 else nullcontext()
        with dynamo_config.patch(recompile_limit=limit):
            remedies = [finding.remedy for finding in preflight(wrapper, model=called)]
            assert ["recompile_limit = 15" in remedy for remedy in remedies] == [True] * (
                limit == 8
            )
            with stops:
                for active in all_sets:
                    wrapper.total(called(active), active).backward()


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="this torch.compile takes no limit",
)
@pytest.mark.parametrize(("limit", "expected"), [(15, []), (14, ["MD107"])])
def test_a_limit_of_its_own_counts(limit: int, expected: list[str]) -> None:
    model = Model(FOUR)
    options: dict[str, Any] = {"recompile_limit": limit}
    compiled: Any = torch.compile(model, backend="eager", **options)
    findings = preflight(mapped(model), model=compiled)
    assert [finding.code for finding in findings] == expected


def test_members_of_tuples_count_as_modalities() -> None:
    model = Model(("T1", "dMRI"))
    paths: dict[Any, str] = {("T1", "dMRI"): "towers.T1", ("PET", "CT"): "towers.dMRI"}
    compiled: Any = torch.compile(model, backend="eager")
    (finding,) = preflight(DummyLossWrapper(compiled, paths))
    assert finding.evidence == {"modalities": 4, "active_sets": 15, "recompile_limit": 8}
