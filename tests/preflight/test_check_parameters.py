"""What preflight says of parameters is what the dummy term then does to them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from modaldummy import DummyLossWrapper, ParameterMapError, preflight
from tests.holding import NAMES
from tests.preflight.builders import on_meta, with_value
from tests.preflight.findings import codes, evidence
from tests.preflight.models import Model, mapped, sparse_tables, tied, with_towers
from tests.zoo import brain, holder


def test_a_frozen_modality_gets_no_dummy_and_an_unfrozen_one_does() -> None:
    case = brain()
    case.model.get_submodule("fusion").requires_grad_(False)
    wrapper = case.wrapper()
    assert evidence(wrapper, "MD113") == {"modalities": ["T1-dMRI"]}
    wrapper.dummy([]).backward()
    grads = [p.grad for p in case.model.get_submodule("fusion").parameters()]
    assert grads == [None, None]
    case.model.get_parameter("fusion.bias").requires_grad_(True)
    assert preflight(wrapper) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_left_out_of_the_loss(value: float) -> None:
    """And spoils it as soon as its modality is active; the trunk is looked at too."""
    wrapper = with_value(value)["wrapper"]
    model = wrapper.parameters.model
    assert evidence(wrapper, "MD114") == {"parameters": ["towers.dMRI.weight"]}
    assert wrapper.total(model(["T1"]), "T1").isfinite()
    assert wrapper.last is not None
    assert not wrapper.last.uncapped.isfinite()
    assert not wrapper.total(model(["dMRI"]), "dMRI").isfinite()
    nn.init.constant_(model.trunk.bias, value)
    assert evidence(wrapper, "MD114")["parameters"] == ["towers.dMRI.weight", "trunk.bias"]


ODD: dict[str, torch.Tensor] = {
    "float16": torch.full((2, 2), 60000.0, dtype=torch.float16),
    "bfloat16": torch.full((2, 2), 3e38, dtype=torch.bfloat16),
    "float64": torch.full((2, 2), 1e300, dtype=torch.float64),
    "complex": torch.full((2, 2), 1e30, dtype=torch.complex64),
    "empty": torch.empty(0, 3),
    "no dimension": torch.tensor(3.0),
    "float8": torch.full((2, 2), 400.0).to(torch.float8_e4m3fn),
    "int8": torch.ones(2, 2, dtype=torch.int8),
    "on meta": torch.empty(2, 2, device="meta"),
    "sparse": torch.ones(2, 2).to_sparse(),
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_parameters_of_every_kind_are_looked_at(values: torch.Tensor) -> None:
    """Frozen ones, in the trunk; large values are finite."""
    model = Model()
    model.odd = nn.Module()
    model.odd.register_parameter("values", nn.Parameter(values, requires_grad=False))
    assert preflight(mapped(model)) == []
    inexact = values.is_floating_point() or values.is_complex()
    if not inexact or not values.numel() or values.is_meta or values.is_sparse:
        return
    broken = torch.full_like(values.to(torch.complex64), torch.nan)
    model.odd.values = nn.Parameter(
        (broken if values.is_complex() else broken.real).to(values.dtype), requires_grad=False
    )
    assert evidence(mapped(model), "MD114") == {"parameters": ["odd.values"]}


def test_tensors_with_operators_of_their_own_are_left_alone() -> None:
    class Packed(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
            raise NotImplementedError(function)

    model = Model()
    packed = torch.Tensor._make_subclass(Packed, torch.full((2,), torch.nan))
    model.odd = holder()
    model.odd._parameters["values"] = packed  # type: ignore[assignment]
    assert preflight(mapped(model)) == []


def test_a_lazy_trunk_is_left_alone_and_a_lazy_tower_refused() -> None:
    """As it is by the wrapper itself; optimizers and DDP refuse both."""
    model = Model()
    model.head = nn.LazyLinear(3)
    wrapper = mapped(model)
    assert preflight(wrapper) == []
    model.towers["T1"] = nn.LazyLinear(4)
    with pytest.raises(ParameterMapError, match="not initialized"):
        preflight(wrapper)
    with pytest.raises(ParameterMapError, match="not initialized"):
        wrapper.total(torch.tensor(1.0), [])


@pytest.mark.usefixtures("process_group")
def test_of_sharded_parameters_the_shard_is_looked_at() -> None:
    model = Model()
    mesh = init_device_mesh("cpu", (1,))
    bias = DTensor.from_local(torch.full((4,), torch.nan), mesh, [Replicate()])
    model.towers["T1"].bias = nn.Parameter(bias)
    assert evidence(mapped(model), "MD114") == {"parameters": ["towers.T1.bias"]}


def test_parameters_on_meta_stop_the_total_unless_nothing_reads_them() -> None:
    wrapper = on_meta(*NAMES)["wrapper"]
    assert len(evidence(wrapper, "MD115")["parameters"]) == 6
    with pytest.raises(ParameterMapError, match="on the meta device"):
        wrapper.total(torch.tensor(1.0), "T1")
    for options in ({"gradient_only": True}, {"scale": 0.0}, {"scale": None}):
        wrapper = on_meta(*NAMES, **options)["wrapper"]
        assert codes(wrapper=wrapper) <= {"MD131"}
        wrapper.total(torch.tensor(1.0), "T1").backward()
    model = Model().to("meta")
    loss = model.trunk(torch.ones(1, 4, device="meta")).sum()
    assert preflight(mapped(model), loss=mapped(model).total(loss, [])) == []


def test_a_gradient_is_made_where_the_parameter_is() -> None:
    """So the number is copied there; frozen parameters get none."""
    wrapper = on_meta("T1", gradient_only=True)["wrapper"]
    found = evidence(wrapper, "MD116")
    assert found == {"parameters": {"meta": 2, "cpu": 4}, "loss": None}
    model = wrapper.parameters.model
    loss = wrapper.total(model(["dMRI"]), "dMRI")
    assert evidence(wrapper, "MD116", loss=loss)["loss"] == "cpu"
    loss.backward()
    assert model.towers["T1"].weight.grad.is_meta
    model.towers["T1"].requires_grad_(False)
    assert codes(wrapper=wrapper) == {"MD113"}


def test_what_an_active_modality_shares_gets_no_dummy() -> None:
    """Between two towers, until the one that has it is inactive too."""
    model = tied("towers.T1", "towers.dMRI")
    wrapper = mapped(model)
    found = evidence(wrapper, "MD117")
    assert found == {"parameters": {"towers.T1.weight": ["T1", "dMRI"]}, "without_own": []}
    wrapper.dummy("dMRI").backward()
    assert model.towers["T1"].weight.grad is None
    assert model.towers["T1"].bias.grad is not None
    wrapper.dummy("rsfMRI").backward()
    assert model.towers["T1"].weight.grad is not None
    model.towers["T1"].weight.requires_grad_(False)
    assert preflight(wrapper) == []


def test_a_modality_of_nothing_but_shared_parameters_is_a_warning() -> None:
    model = tied("towers.T1", "towers.dMRI", whole=True)
    (finding,) = preflight(mapped(model))
    assert finding.severity == "warning"
    assert finding.evidence["without_own"] == ["T1", "dMRI"]
    wrapper = mapped(model)
    wrapper.dummy(["dMRI", "rsfMRI"])
    assert wrapper.last is not None
    assert wrapper.last.num_params == 0
    model = tied("towers.T1", "towers.dMRI")
    model.towers["dMRI"].bias.requires_grad_(False)
    (finding,) = preflight(mapped(model))
    assert (finding.severity, finding.evidence["without_own"]) == ("warning", ["dMRI"])


def test_what_the_trunk_shares_gets_a_dummy_on_top() -> None:
    model = tied("towers.T1", "trunk")
    wrapper = mapped(model, 0.25, max_fraction=None)
    assert {"MD118"} <= codes(wrapper=wrapper)
    gradients = []
    for total in (lambda loss: loss, lambda loss: wrapper.total(loss, "dMRI")):
        model.zero_grad()
        total(model.trunk(torch.ones(2, 3)).sum()).backward()
        gradients.append(model.trunk.weight.grad)
    assert torch.equal(gradients[1], gradients[0] + 0.25)
    remedy = DummyLossWrapper(model, {"T1": "towers.T1.bias", "dMRI": "towers.dMRI"})
    assert preflight(remedy) == []
    model.trunk.weight.requires_grad_(False)
    assert codes(wrapper=mapped(model)) == set()


def test_the_dummy_of_a_sparse_table_is_empty() -> None:
    model = sparse_tables()
    wrapper = mapped(model)
    assert evidence(wrapper, "MD119") == {"parameters": ["towers.dMRI.weight"]}
    wrapper.dummy("T1").backward()
    gradient = model.towers["dMRI"].weight.grad
    assert gradient.is_sparse
    assert gradient._nnz() == 0
    model.towers["dMRI"].sparse = False
    assert preflight(wrapper) == []


def test_sparse_tables_alone_have_no_dtype_to_round_in() -> None:
    model = with_towers(lambda: nn.Embedding(5, 4, sparse=True)).half()
    assert codes(wrapper=mapped(model, 1e-30), max_norm=1e-9, scaler=2.0**99) == {"MD119"}


def test_names_are_those_of_the_wrappers_model() -> None:
    """Others are those of the model that is called; what both have is named once."""
    model = Model()
    model.towers["T1"].requires_grad_(False)
    head = nn.Linear(2, 2)
    outer = nn.ModuleDict({"backbone": model, "head": head})
    nn.init.constant_(model.get_parameter("towers.T1.bias"), torch.nan)
    nn.init.constant_(head.bias, torch.nan)
    found = preflight(mapped(model), model=outer)
    assert found[0].evidence == {"parameters": ["towers.T1.bias", "head.bias"]}
