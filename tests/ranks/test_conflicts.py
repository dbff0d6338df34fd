"""Which engines support divergent ranks, and which parameters do not under the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper
from tests.fake_ranks import check, refusal
from tests.holding import NAMES
from tests.preflight.models import Engine, Model, mapped, partition, sharded

needs_zeros = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="this torch cannot reduce zeros for what got no gradient",
)


def in_towers(*names: str) -> list[str]:
    return [f"towers.{name}" for name in names]


# --- DeepSpeed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "overlap", "scale", "part"),
    [
        (0, False, 1e-7, ""),
        (0, False, None, ""),
        (0, True, 1e-7, ""),
        (1, False, 1e-7, ""),
        (1, False, 0.0, ""),
        (1, False, None, "ZeRO-1 leaves inactive parameters out of its buckets"),
        (1, True, 1e-7, "in the order in which gradients arrive"),
        (1, True, None, "stops at the first inactive"),
        (2, False, 1e-7, "in the order in which gradients arrive"),
        (2, False, None, "stops at the first inactive"),
        (3, False, 1e-7, "ZeRO-3 gathers each parameter when forward needs it"),
        (3, True, None, "ZeRO-3 gathers each parameter when forward needs it"),
    ],
)
def test_stages_of_zero(stage: int, overlap: bool, scale: float | None, part: str) -> None:
    """Whether the engine is passed, or the wrapper was made with it."""
    model = Model()
    engine = Engine(model, stage, overlap)
    paths = dict(zip(NAMES, in_towers(*NAMES), strict=True))
    outer = DummyLossWrapper(engine, paths, scale)
    for wrapper, given in ((mapped(model, scale), engine), (outer, None), (outer, model)):
        check(wrapper, NAMES, NAMES, model=given)
        if part:
            assert part in refusal(wrapper, NAMES, [], model=given)
        else:
            check(wrapper, NAMES, [], model=given)


@pytest.mark.parametrize("stage", [1, 2])
def test_where_deepspeed_reduces_once_ranks_may_differ(stage: int) -> None:
    """With a scale that is a number, and inside of `coalesce_grad_reduction()` alone."""
    model = Model()
    engine: Any = Engine(model, stage, overlap=True)
    engine.optimizer = SimpleNamespace(_coalesce_grad_reduction=True)
    check(mapped(model), ["T1"], ["dMRI"], model=engine)
    check(mapped(model, None), ["T1"], ["T1"], model=engine)
    assert "leaves inactive" in refusal(mapped(model, None), ["T1"], ["dMRI"], model=engine)
    engine.optimizer._coalesce_grad_reduction = False
    assert "gradients arrive" in refusal(mapped(model), ["T1"], ["dMRI"], model=engine)


def test_an_engine_that_does_not_say_whether_it_overlaps_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(Engine, "zero_overlap_comm")
    model = Model()
    check(mapped(model), ["T1"], ["dMRI"], model=Engine(model, 1))


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_are_gathered_but_not_reduced(stage: int) -> None:
    model = Model()
    model.towers["dMRI"].requires_grad_(False)
    wrapper, engine = mapped(model), Engine(model, stage)
    if stage == 3:
        assert "This concerns dMRI (" in refusal(wrapper, ["dMRI"], [], model=engine)
    else:
        check(wrapper, ["dMRI"], [], model=engine)
    assert "This concerns T1 (" in refusal(wrapper, ["T1"], [], model=engine)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [("ds_id", "ZeRO-3 gathers each"), ("_hp_mapping", "Pass `model=engine`.")],
)
def test_without_its_engine_parameters_show_that_deepspeed_has_them(
    attribute: str, part: str
) -> None:
    """They do not show whether it is ZeRO-1 or ZeRO-2; the engine does."""
    model = Model()
    wrapper = mapped(model)
    partition(model, attribute)
    check(wrapper, ["T1"], ["T1"])
    assert part in refusal(wrapper, ["T1"], ["dMRI"])
    check(wrapper, ["T1"], ["dMRI"], model=Engine(model, 1))
    model.requires_grad_(False)
    if attribute == "ds_id":
        assert part in refusal(wrapper, ["T1"], ["dMRI"])
    else:
        check(wrapper, ["T1"], ["dMRI"])


# --- FSDP2 and DTensors --------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
def test_ranks_may_differ_where_nothing_is_sharded() -> None:
    model = Model()
    model.register_module("nothing", None)
    check(mapped(model), ["T1"], ["dMRI"])
    check(mapped(model), ["T1"], ["dMRI"], model=DistributedDataParallel(model))


TOWER_UNIT = "These parameters are in their own FSDP2 unit."
RESHARDED = "FSDP2 has resharded these parameters before the dummy term"
SCALE_NONE = "With scale=None, FSDP2 leaves inactive parameters out of its reduce-scatter."

# Parts that are sharded one after the other, options for the whole, the scale: what is refused.
LAYOUTS: list[tuple[list[str], dict[str, Any], float | None, str]] = [
    ([""], {}, 1e-7, ""),
    ([""], {}, 0.0, ""),
    ([""], {}, None, SCALE_NONE),
    ([""], {"reshard_after_forward": False}, 1e-7, ""),
    ([""], {"reshard_after_forward": True}, 1e-7, RESHARDED),
    ([""], {"reshard_after_forward": True}, None, RESHARDED),
    (["trunk", ""], {}, 1e-7, ""),
    (["trunk"], {}, None, ""),
    ([*in_towers(*NAMES), ""], {}, 1e-7, TOWER_UNIT),
    (in_towers(*NAMES), {}, 0.0, TOWER_UNIT),
]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zeros", [False, pytest.param(True, marks=needs_zeros)])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("parts", "options", "scale", "part"), LAYOUTS, ids=str)
def test_layouts_of_fsdp2(
    parts: list[str],
    options: dict[str, Any],
    scale: float | None,
    part: str,
    early: bool,
    zeros: bool,
) -> None:
    """Before the first forward pass, between forward and backward, and after it.

    With zeros for what had no gradient, ranks may differ wherever they gather alike.
    """
    model = Model()
    wrapper = mapped(model, scale)
    if early:
        check(wrapper, ["T1"], ["dMRI"])
    mesh = init_device_mesh("cpu", (1,))
    for path in parts:
        unit: Any = model.get_submodule(path)
        fully_shard(unit, mesh=mesh, **(options if not path else {}))
        if zeros:
            unit.set_reduce_scatter_unused_params(True)
    if not early:
        wrapper = mapped(model, scale)
    for step in range(3):
        check(wrapper, ["T1"], ["T1"])
        if part and not (zeros and part != TOWER_UNIT):
            assert part in refusal(wrapper, ["T1"], ["dMRI"])
        else:
            check(wrapper, ["T1"], ["dMRI"])
        if step == 0:
            loss = model.total(wrapper, "T1")
        elif step == 1:
            loss.backward()


@pytest.mark.usefixtures("process_group")
def test_only_keys_with_sharded_parameters_have_to_agree() -> None:
    wrapper = mapped(sharded("towers.dMRI", ""))
    check(wrapper, ["T1"], ["rsfMRI"])
    check(wrapper, ["T1", "dMRI"], ["dMRI"])
    text = refusal(wrapper, ["T1"], ["dMRI"])
    assert "rank 0: T1; rank 1: dMRI." in text
    assert "This concerns dMRI (towers.dMRI.bias, towers.dMRI.weight)." in text


@pytest.mark.usefixtures("process_group")
def test_keys_agree_where_names_do_not() -> None:
    """A fusion module that only some combination runs is gathered on no rank without it."""
    paths: dict[Any, str] = {"T1": "towers.T1", "dMRI": "towers.dMRI"}
    wrapper = DummyLossWrapper(
        sharded("towers.rsfMRI", ""), {**paths, ("T1", "dMRI"): "towers.rsfMRI"}
    )
    check(wrapper, ["T1"], ["dMRI"])
    text = refusal(wrapper, ["T1"], ["dMRI", "T1"])
    assert "This concerns T1-dMRI (" in text


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("scale", [1e-7, None])
def test_frozen_towers_are_gathered_as_well(scale: float | None) -> None:
    """But in the unit of the whole model nothing depends on them."""
    for parts, options in ((in_towers("T1"), {}), ([""], {"reshard_after_forward": True})):
        model = sharded(*parts, **options)
        model.towers["T1"].requires_grad_(False)
        if parts == [""]:
            check(mapped(model, scale), ["T1"], [])
        else:
            assert TOWER_UNIT in refusal(mapped(model, scale), ["T1"], [])


@pytest.mark.usefixtures("process_group")
def test_one_tower_beside_a_trunk_that_is_not_sharded() -> None:
    """The only key of the map: all there is of modalities, but no rank without it gathers it."""
    wrapper = DummyLossWrapper(sharded("towers.T1"), {"T1": "towers.T1"})
    assert TOWER_UNIT in refusal(wrapper, ["T1"], [])


class Encoder(nn.Module):
    """Towers with a forward of their own, which `fully_shard` asks for, and perhaps a bias."""

    def __init__(self, towers: nn.ModuleDict, with_bias: bool) -> None:
        super().__init__()
        self._modules.update(towers._modules)
        self.bias = nn.Parameter(torch.ones(4)) if with_bias else None


def with_encoder_unit(*, with_bias: bool = True, reshard: bool = False) -> Model:
    """A model whose towers are one FSDP2 unit together."""
    model = Model()
    model.towers = Encoder(model.towers, with_bias)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.towers, mesh=mesh, reshard_after_forward=reshard)
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("with_bias", "reshard", "part"),
    [(True, False, ""), (True, True, RESHARDED), (False, False, TOWER_UNIT)],
)
def test_a_unit_around_all_modalities(with_bias: bool, reshard: bool, part: str) -> None:
    """If it contains nothing else it need not run; otherwise it is like the whole model."""
    model = with_encoder_unit(with_bias=with_bias, reshard=reshard)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    if part:
        assert part in refusal(mapped(model), ["T1"], [])
    else:
        check(mapped(model), ["T1"], [])


@pytest.mark.usefixtures("process_group")
def test_a_unit_around_some_modalities_and_something_else() -> None:
    """It need not run where only the others are there."""
    model = with_encoder_unit()
    model.other = nn.Linear(3, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    paths = {"T1": "towers.T1", "rsfMRI": "towers.rsfMRI", "dMRI": "other"}
    wrapper = DummyLossWrapper(model, paths)
    check(wrapper, ["T1"], ["T1", "dMRI"])
    assert TOWER_UNIT in refusal(wrapper, ["T1"], ["dMRI"])


@pytest.mark.usefixtures("process_group")
def test_without_private_attributes_the_default_is_assumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of a unit in another one is to reshard, and that of the outermost is not to."""
    model = with_encoder_unit()
    unit_class = type(model.towers)
    with monkeypatch.context() as patch:
        patch.delattr(FSDPModule, "_get_fsdp_state")
        check(mapped(model), ["T1"], [])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    check(mapped(model), ["T1"], [])
    monkeypatch.setattr(unit_class, "_get_fsdp_state", lambda _: None)
    assert RESHARDED in refusal(mapped(model), ["T1"], [])


@pytest.mark.usefixtures("process_group")
def test_the_wrapper_may_know_a_part_of_what_is_sharded() -> None:
    """Then `model=` has to say what is around it; otherwise the shards could be anyone's."""
    whole = sharded("")
    part = nn.Sequential()
    part.add_module("towers", whole.towers)
    wrapper = mapped(part)
    check(wrapper, ["T1"], ["dMRI"], model=whole)
    assert "pass that module as `model=`" in refusal(wrapper, ["T1"], ["dMRI"])


@pytest.mark.usefixtures("process_group")
def test_ranks_that_share_a_dtensor_have_to_agree() -> None:
    model = Model()
    tower = model.towers["dMRI"]
    mesh = init_device_mesh("cpu", (1,))
    tower.weight = nn.Parameter(distribute_tensor(tower.weight, mesh, [Replicate()]))
    wrapper = mapped(model)
    check(wrapper, ["T1"], ["rsfMRI"])
    text = refusal(wrapper, ["T1"], ["dMRI"])
    assert "This concerns dMRI (towers.dMRI.weight). " in text
    assert "`group=`" in text
