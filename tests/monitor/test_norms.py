"""Gradient norms: their log keys, the numbers of the plain loop, one copy to the host."""

import contextlib
import copy
import gc
import math
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from modaldummy import (
    BatchMetadataError,
    DummyLossWrapper,
    UnknownModalityError,
    UnsupportedEngineError,
    gradient_norms,
)
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._monitor.gradients import table_of
from tests.distributed.engines import needs_averages
from tests.fleet import Fleet
from tests.holding import NAMES, Towers
from tests.test_host_sync import CountSyncs
from tests.zoo import ZOO, Case, brain, is_active

T1, RSFMRI, DMRI = (f"vision_tower.{name}_patch_embed" for name in ("T1", "rsfMRI", "dMRI"))


def step(case: Case, *active: str, scale: float | None = 1e-7) -> DummyLossWrapper:
    """A wrapper after a backward pass of its total."""
    wrapper = case.wrapper(scale)
    wrapper.total(case.real(set(active)), active).backward()
    return wrapper


def plain(case: Case) -> dict[str, float]:
    """Norm of each gradient that exists, one after the other, in double precision."""
    return {
        name: torch.linalg.vector_norm(parameter.grad.to(torch.complex128)).item()
        for name, parameter in case.model.named_parameters()
        if parameter.grad is not None
    }


# --- log keys ---------------------------------------------------------------------------------


def test_log_keys_of_a_batch_with_inactive_modalities() -> None:
    assert list(gradient_norms(step(brain(), "T1"))) == [
        f"grad/[T1]/{T1}.weight",
        f"grad/[T1]/{T1}.bias",
        f"grad/[inactive]/{RSFMRI}.weight",
        f"grad/[inactive]/{RSFMRI}.bias",
        f"grad/[inactive]/{DMRI}.weight",
        f"grad/[inactive]/{DMRI}.bias",
        "grad/[inactive]/fusion.weight",
        "grad/[inactive]/fusion.bias",
        "grad_norm/T1",
        "grad_norm/rsfMRI",
        "grad_norm/dMRI",
        "grad_norm/T1-dMRI",
        "grad_ratio",
    ]


@pytest.mark.parametrize(
    ("active", "labels"),
    [
        (("T1", "dMRI"), {"[T1]", "[dMRI]", "[T1-dMRI]", "[inactive]"}),
        (("T1", "rsfMRI", "dMRI"), {"vision_tower", "fusion"}),
        ((), {"[inactive]"}),
    ],
    ids=["a fusion", "all modalities", "no modality"],
)
def test_labels_name_the_active_owner(active: tuple[str, ...], labels: set[str]) -> None:
    """Without labels if all keys are active. A ratio needs a real and a dummy norm."""
    found = gradient_norms(step(brain(), *active), prefix="train/gradient")
    beginning = "train/gradient/"
    names = [name.removeprefix(beginning) for name in found if name.startswith(beginning)]
    assert {name.partition("/")[0].partition(".")[0] for name in names} == labels
    assert all(name.startswith("train/gradient") for name in found)
    assert ("train/gradient_ratio" in found) == ("[inactive]" in labels and active != ())


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_without_labels_the_keys_are_the_same_at_each_step(scale: float | None) -> None:
    """Also where there is no gradient. They contain no character that MLflow rejects."""
    batches = [("T1",), (), ("T1", "rsfMRI", "dMRI"), ("dMRI", "T1")]
    found = [gradient_norms(step(brain(), *batch, scale=scale), label=False) for batch in batches]
    assert all(list(one) == list(found[0]) for one in found)
    assert all(set("[]+").isdisjoint(name) for name in found[0])
    assert [name for name in found[0] if name.startswith("grad/")][-2:] == [
        "grad/T1-dMRI/fusion.weight",
        "grad/T1-dMRI/fusion.bias",
    ]
    flags = [[one[f"active/{name}"] for name in ("T1", "rsfMRI", "dMRI")] for one in found]
    assert flags == [[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1]]
    missing = {name for name, value in found[0].items() if math.isnan(value)}
    counts = {name: found[0][name] for name in found[0] if name.startswith("grad_missing/")}
    assert counts == {
        f"grad_missing/{name}": 2.0 * (scale is None and name != "T1")
        for name in ("T1", "rsfMRI", "dMRI", "T1-dMRI")
    }
    names = [name for name in found[0] if name.startswith("grad") and "T1_" not in name]
    assert (
        missing
        == {
            1e-7: set(),
            0.0: {"grad_ratio"},
            None: {*names} - {"grad_norm/T1", *counts},
        }[scale]
    )


def test_names_are_those_of_the_bare_model() -> None:
    """So that runs with and without DDP or torch.compile share their charts."""
    model = nn.ModuleDict({"module": Towers()})
    wrapper = DummyLossWrapper(model, {name: f"towers.{name}" for name in NAMES})
    wrapper.dummy(NAMES[:2]).backward()
    assert list(gradient_norms(wrapper))[-3] == "grad/[inactive]/towers.dMRI.weight"


def test_a_tied_parameter_goes_to_an_active_owner() -> None:
    """In a label; a constant key has its first owner. Both norms of the towers count it."""
    case = ZOO["tied-across"]()
    wrapper = step(case, "b")
    labelled = gradient_norms(wrapper)
    assert "grad/[b]/a.0.weight" in labelled
    assert "grad/[inactive]/a.1.weight" in labelled
    assert "grad/a/a.0.weight" in gradient_norms(wrapper, label=False)
    assert labelled["grad_norm/a"] > labelled["grad/[b]/a.0.weight"]
    assert not any("b.1." in name for name in labelled)


def test_a_frozen_parameter_is_left_out_until_it_has_a_gradient() -> None:
    """Optimizers use a gradient that was left from before it was frozen."""
    case = ZOO["frozen-in-part"]()
    wrapper = step(case, "b")
    for label in (True, False):
        assert not any(n.endswith("a.weight") for n in gradient_norms(wrapper, label=label))
    weight = case.model.get_parameter("a.weight")
    weight.grad = torch.ones_like(weight)
    assert gradient_norms(wrapper)["grad/[inactive]/a.weight"] == pytest.approx(6**0.5)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
@given(data=st.data())
def test_numbers_equal_those_of_the_plain_loop(name: str, data: st.DataObject) -> None:
    case = ZOO[name]()
    names = case.wrapper().modalities
    active = data.draw(st.sets(st.sampled_from(names)))
    wrapper = step(case, *active)
    expected, found = plain(case), gradient_norms(wrapper)
    by_parameter = {n.rpartition("/")[2]: v for n, v in found.items() if n.startswith("grad/")}
    owned = {name: expected[name] for name in by_parameter}
    assert by_parameter == pytest.approx(owned, rel=1e-5)
    owners: dict[int, set[ModalityKey]] = {}
    for parameter_name, parameter in case.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).update(case.owners.get(parameter_name, ()))
    norm = {id(p): expected[n] for n, p in case.model.named_parameters() if n in expected}
    for key in case.spec:
        text = key if isinstance(key, str) else "-".join(key)
        own = [value for i, value in norm.items() if key in owners[i]]
        assert found.get(f"grad_norm/{text}") == (
            pytest.approx(math.hypot(*own), rel=1e-5) if own else None
        )
    real = [v for i, v in norm.items() if any(is_active(key, active) for key in owners[i])]
    dummy = [
        v for i, v in norm.items() if owners[i] and not any(is_active(k, active) for k in owners[i])
    ]
    ratio = math.hypot(*real) / math.hypot(*dummy) if real and any(dummy) else None
    assert found.get("grad_ratio") == (None if ratio is None else pytest.approx(ratio, rel=1e-4))


def test_nan_and_infinity_are_shown() -> None:
    case = brain()
    wrapper = step(case, "T1")
    for name, value in ((f"{T1}.bias", math.nan), (f"{RSFMRI}.bias", math.inf)):
        case.model.get_parameter(name).grad = torch.full((4,), value)
    found = gradient_norms(wrapper)
    assert math.isnan(found[f"grad/[T1]/{T1}.bias"])
    assert math.isnan(found["grad_norm/T1"])
    assert found["grad_norm/rsfMRI"] == math.inf


def test_sparse_gradients() -> None:
    """Rows that occur twice are added up first, and an empty gradient has norm 0."""
    model = nn.ModuleDict({name: nn.Embedding(4, 2, sparse=True) for name in ("a", "b")})
    wrapper = DummyLossWrapper(model, {"a": "a", "b": "b"})
    wrapper.total(model["a"](torch.tensor([1, 1, 2])).sum(), ["a"]).backward()
    found = gradient_norms(wrapper)
    assert found["grad/[a]/a.weight"] == pytest.approx(math.sqrt(2 * 2**2 + 2 * 1))
    assert found["grad/[inactive]/b.weight"] == 0


def test_active_names_what_several_batches_contained() -> None:
    case = brain()
    wrapper = case.wrapper()
    for name in ("dMRI", "T1"):
        wrapper.total(case.real({name}), name).backward()
    assert f"grad/[inactive]/{DMRI}.bias" in gradient_norms(wrapper)
    for active in (["T1", "dMRI"], {"dMRI", "T1"}, {"modality": ["dMRI", "T1"]}):
        found = gradient_norms(wrapper, active=active)
        assert f"grad/[dMRI]/{DMRI}.bias" in found
        assert f"grad/[inactive]/{RSFMRI}.bias" in found


def test_reports_say_which_batches_had_what_together() -> None:
    """If T1 and dMRI are in different batches, their fusion is not active."""
    parts = {"T1": nn.Linear(2, 1), "dMRI": nn.Linear(2, 1), "both": nn.Linear(2, 1)}
    model = nn.ModuleDict(parts)
    paths: Any = {"T1": "T1", "dMRI": "dMRI", ("T1", "dMRI"): "both"}
    wrapper = DummyLossWrapper(model, paths)
    seen = []
    for name in ("T1", "dMRI"):
        wrapper.total(parts[name](torch.ones(2)).sum(), name).backward()
        assert wrapper.last is not None
        seen.append(wrapper.last)
    found = gradient_norms(wrapper, active=seen)
    labels = {key.split("/")[1] for key in found if key.startswith("grad/")}
    assert labels == {"[T1]", "[dMRI]", "[inactive]"}
    assert "grad/[inactive]/both.weight" in found
    assert "grad/both.weight" in gradient_norms(wrapper, active=["T1", "dMRI"])
    assert gradient_norms(wrapper, active=seen[-1]) == gradient_norms(wrapper)


# --- loss scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scaler", "number", "disabled"])
def test_scaled_gradients(kind: str) -> None:
    """The norms are those without a scaler, bit for bit: the factor is a power of two."""
    scaler = torch.amp.GradScaler("cpu", enabled=kind != "disabled")
    case, other = brain(), brain()
    other.model.load_state_dict(case.model.state_dict())
    wrapper = case.wrapper()
    scaler.scale(wrapper.total(case.real({"T1"}), "T1")).backward()
    given_scaler = 2**16 if kind == "number" else scaler
    assert gradient_norms(wrapper, scaler=given_scaler) == gradient_norms(step(other, "T1"))


def test_a_factor_may_be_small_and_become_zero() -> None:
    """As that of a scaler that skipped every step: what is divided by it is infinite, or NaN."""

    class Collapsed:
        def scale(self, tensor: Tensor) -> Tensor:
            return tensor * 0

    wrapper = step(brain(), "T1", scale=0.0)
    whole = gradient_norms(wrapper)
    assert gradient_norms(wrapper, scaler=0.5)["grad_norm/T1"] == 2 * whole["grad_norm/T1"]
    found = gradient_norms(wrapper, scaler=Collapsed())
    assert found["grad_norm/T1"] == math.inf
    assert math.isnan(found["grad_norm/dMRI"])


def test_a_scaler_that_has_unscaled_is_refused_until_its_update() -> None:
    """The norms would be divided twice. No call changes the scaler."""
    scaler = torch.amp.GradScaler("cpu")
    case = brain()
    wrapper = case.wrapper()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    scaler.scale(wrapper.total(case.real({"T1"}), "T1")).backward()
    before = scaler.state_dict()
    scaler.unscale_(optimizer)
    with pytest.raises(
        ValueError, match=r"unscaled the gradients already\. Leave it out, or call `gradient_norms`"
    ):
        gradient_norms(wrapper, scaler=scaler)
    assert gradient_norms(wrapper)["grad_norm/dMRI"] == pytest.approx(1e-7 * 24**0.5)
    scaler.step(optimizer)
    scaler.update()
    gradient_norms(wrapper, scaler=scaler)
    assert scaler.state_dict() == before | {"_growth_tracker": 1}


# --- the table of parameters ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_norms_are_those_of_the_model_as_it_is_now() -> None:
    """After a parameter has lost its gradient, and after some were cast, replaced and added."""
    case = brain()
    model: Any = case.model
    wrapper = step(case, "T1")
    trunk, tower = model.trunk, model.vision_tower["rsfMRI_patch_embed"]

    def check() -> None:
        expected = {n: v for n, v in plain(case).items() if "trunk" not in n and "T10" not in n}
        found = gradient_norms(wrapper)
        by_name = {n.rpartition("/")[2]: v for n, v in found.items() if n.startswith("grad/")}
        assert by_name == pytest.approx(expected, rel=1e-5)

    check()
    kept, tower.bias.grad = tower.bias.grad, None
    check()
    tower.bias.grad = kept
    model.double()
    check()
    model.to(torch.complex128)
    check()
    model.real = nn.Linear(2, 2)  # does not belong to the map
    tower.bias.grad = None
    check()
    tower.bias = nn.Parameter(torch.ones(4))
    tower.bias.grad = torch.ones(4)
    check()
    tower.weight = nn.Parameter(torch.ones(7, 2))
    tower.weight.grad = torch.ones(7, 2)
    check()
    model.vision_tower["rsfMRI_patch_embed"] = nn.Sequential(tower, nn.Linear(2, 3))
    check()
    assert trunk is model.trunk


def test_a_table_is_kept_while_each_key_owns_the_same_parameters() -> None:
    """Also if the model still has the same parameters in the same order."""
    first, second, third = (nn.Parameter(torch.ones(1)) for _ in range(3))
    model: Any = nn.Module()
    model.a, model.b = nn.ParameterList([first, second]), nn.ParameterList([third])
    wrapper = DummyLossWrapper(model, {"T1": "a", "dMRI": "b"})
    table = table_of(wrapper)
    assert table_of(wrapper) is table
    model.a, model.b = nn.ParameterList([first]), nn.ParameterList([second, third])
    assert table_of(wrapper).ids == {"T1": [id(first)], "dMRI": [id(second), id(third)]}


def test_a_copy_of_a_wrapper_measures_its_own_model() -> None:
    wrapper = step(brain(), "T1")
    other = copy.deepcopy(wrapper)
    for _, parameter in other.named_parameters("T1").items():
        parameter.grad = torch.zeros_like(parameter)
    assert gradient_norms(wrapper)["grad_norm/T1"] > 0
    assert gradient_norms(other)["grad_norm/T1"] == 0


def test_a_wrapper_can_be_freed() -> None:
    wrapper = step(brain(), "T1")
    gradient_norms(wrapper)
    gone = weakref.ref(wrapper.named_parameters("T1")[f"{T1}.bias"])
    del wrapper
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("with_scaler", [False, True])
def test_the_host_waits_once(with_scaler: bool) -> None:
    """For 1,000 parameters of two dtypes, and with the factor of a scaler on the device."""
    towers = {
        name: nn.ModuleList(nn.LayerNorm(8, dtype=dtype) for _ in range(250))
        for name, dtype in (("a", torch.float32), ("b", torch.float64))
    }
    model = nn.ModuleDict(towers)
    wrapper = DummyLossWrapper(model, {"a": "a", "b": "b"})
    wrapper.dummy([]).backward()
    scaler = torch.amp.GradScaler("cpu") if with_scaler else None
    copies: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def copy_to_host(*args: Any, **kwargs: Any) -> Any:
            copies.append(name)
            return original(*args, **kwargs)

        return patch.object(Tensor, name, copy_to_host)

    ways = ("numpy", "tolist", "cpu", "item", "__array__")
    with CountSyncs() as counter, contextlib.ExitStack() as stack:
        for name in ways:
            stack.enter_context(counted(name))
        found = gradient_norms(wrapper, scaler=scaler)
    assert counter.seen == []
    assert copies == ["numpy"]
    assert len(found) == 1000 + 2


# --- wrong calls ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix": ""}, ValueError, "`prefix` must be a non-empty string, got ''"),
        ({"prefix": 7}, ValueError, "got 7"),
        ({"active": ["T2"]}, UnknownModalityError, "'T2'"),
        ({"active": [1.5]}, BatchMetadataError, "`active`[0] does not say"),
        ({"scaler": 0}, ValueError, "`scaler` must be a finite number above 0 or a GradScaler"),
        ({"scaler": "65536"}, TypeError, "got '65536'"),
    ],
)
def test_wrong_arguments(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gradient_norms(step(brain(), "T1"), **options)
    assert message in str(caught.value)


def test_before_the_first_loss() -> None:
    wrapper = brain().wrapper()
    with pytest.raises(RuntimeError, match=r"No loss has gone .*, or pass `active`\."):
        gradient_norms(wrapper)
    assert gradient_norms(wrapper, active=["T1"]) == {}


# --- ranks ------------------------------------------------------------------------------------


def sharded(rank: int) -> dict[str, Any]:
    """Norms of the shards of this rank, and norms of whole gradients, of FSDP2 towers."""
    model = Towers()
    for name in NAMES[:2]:
        fully_shard(model.towers[name])
    wrapper = model.wrapper()
    wrapper.total(model.loss(["T1"]), ["T1"]).backward()
    local = gradient_norms(wrapper)
    whole = gradient_norms(wrapper, full=True)
    alone = model.towers["rsfMRI"].bias
    if rank == 1:
        alone.grad = None
    return {"local": local, "whole": whole, "one": gradient_norms(wrapper, full=True)}


@needs_averages
def test_norms_of_sharded_gradients(two: Fleet) -> None:
    """Norms of shards need no communication. Those of whole gradients are as in one process."""
    model = Towers()
    wrapper = model.wrapper()
    wrapper.total(model.loss(["T1"]), ["T1"]).backward()
    expected = gradient_norms(wrapper)
    results = two.ask(sharded)
    for result in results:
        assert result["whole"].pop("grad_ranks") == 2
        assert result["whole"] == pytest.approx(expected, rel=1e-5)
    for name, norm in expected.items():
        parts = [result["local"][name] for result in results]
        if name.startswith(("grad/[T1]", "grad/[inactive]/towers.rsfMRI")):
            assert math.hypot(*parts) == pytest.approx(norm, rel=1e-5)
            assert parts[0] < norm
    bias = "grad/[inactive]/towers.rsfMRI.bias"
    assert results[0]["one"][bias] == pytest.approx(results[0]["local"][bias])
    assert bias not in results[1]["one"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)])
def test_whole_norms_on_one_rank(placement: Placement) -> None:
    wrapper = distributed(placement)
    reduce = torch.distributed.all_reduce
    with patch.object(torch.distributed, "all_reduce", wraps=reduce) as reduced:
        found = gradient_norms(wrapper, active=["a"], full=True)
    parameter: Any = wrapper.named_parameters("a")["a.weight"]
    groups = [call.kwargs["group"] for call in reduced.call_args_list]
    assert groups == ([parameter.device_mesh.get_group(0)] if placement.is_shard() else [])
    assert found == pytest.approx({"grad/[a]/a.weight": 2, "grad_norm/a": 2})
    assert found == gradient_norms(wrapper, active=["a"])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("label", [True, False])
def test_the_number_of_ranks_is_logged(label: bool) -> None:
    """After a reduction, an inactive gradient may be the real one of another rank."""
    wrapper = step(brain(), "T1")
    with patch.object(torch.distributed, "get_world_size", return_value=4):
        assert gradient_norms(wrapper, label=label)["grad_ranks"] == 4


@pytest.mark.usefixtures("process_group")
def test_a_partial_dtensor_is_refused() -> None:
    wrapper = distributed(Partial())
    with pytest.raises(
        UnsupportedEngineError, match=r"shape \[2, 2\] .*Redistribute it, or leave out"
    ):
        gradient_norms(wrapper, active=["a"], full=True)


def distributed(placement: Placement) -> DummyLossWrapper:
    """The gradient of tower `a` is a DTensor of four ones."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a", "b")})
    weight = DTensor.from_local(torch.ones(2, 2), mesh, [placement])
    model["a"].weight = nn.Parameter(weight)
    model["a"].weight.grad = torch.ones_like(weight)
    return DummyLossWrapper(model, {"a": "a", "b": "b"})
