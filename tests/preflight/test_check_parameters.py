"""What preflight says about parameters is what the dummy term then does to them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from modaldummy import DummyLossWrapper, ParameterMapError, preflight
from tests.holding import NAMES
from tests.preflight.cases import on_meta, towers_of, with_value
from tests.preflight.models import Model, mapped, tied
from tests.zoo import holder


def not_finite(wrapper: DummyLossWrapper, **arguments: Any) -> list[str]:
    """Parameters that the only finding, MD114, lists."""
    (finding,) = preflight(wrapper, **arguments)
    assert finding.code == "MD114"
    names: list[str] = finding.evidence["parameters"]
    return names


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_left_out_of_the_loss(value: float) -> None:
    """It spoils the loss as soon as its modality is active. The trunk is checked too."""
    wrapper = with_value(value)["wrapper"]
    model = wrapper.parameters.model
    assert not_finite(wrapper) == ["towers.dMRI.weight"]
    assert wrapper.total(model(["T1"]), "T1").isfinite()
    assert not wrapper.total(model(["dMRI"]), "dMRI").isfinite()
    nn.init.constant_(model.trunk.bias, value)
    assert not_finite(wrapper) == ["towers.dMRI.weight", "trunk.bias"]


ODD: dict[str, torch.Tensor] = {
    "float16": torch.full((2, 2), 60000.0, dtype=torch.float16),
    "bfloat16": torch.full((2, 2), 3e38, dtype=torch.bfloat16),
    "float64": torch.full((2, 2), 1e300, dtype=torch.float64),
    "complex": torch.full((2, 2), 1e30, dtype=torch.complex64),
    "float8": torch.full((2, 2), 400.0).to(torch.float8_e4m3fn),
    "no dimension": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "int8": torch.ones(2, 2, dtype=torch.int8),
    "on meta": torch.empty(2, 2, device="meta"),
    "sparse": torch.ones(2, 2).to_sparse(),
}
WITHOUT_NAN = ("empty", "int8", "on meta", "sparse")


@pytest.mark.parametrize("name", ODD)
def test_parameters_of_every_kind_are_checked(name: str) -> None:
    """Frozen ones in the trunk are checked, and large values are finite."""
    model = Model()
    model.odd = holder()
    model.odd.values = nn.Parameter(ODD[name], requires_grad=False)
    assert preflight(mapped(model)) == []
    if name not in WITHOUT_NAN:
        broken = torch.full_like(ODD[name].float() if name == "float8" else ODD[name], torch.nan)
        model.odd.values.data = broken.to(ODD[name].dtype)
        assert not_finite(mapped(model)) == ["odd.values"]


def test_tensors_with_operators_of_their_own_are_left_alone() -> None:
    class Packed(torch.Tensor):
        """Of a library whose tensors support no operator of torch."""

        @classmethod
        def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
            raise NotImplementedError(function)

    model = Model()
    packed = torch.Tensor._make_subclass(Packed, torch.full((2,), torch.nan))
    model.odd = holder()
    model.odd._parameters["values"] = packed  # type: ignore[assignment]
    assert preflight(mapped(model)) == []


def test_a_lazy_trunk_is_left_alone_and_a_lazy_tower_is_refused() -> None:
    """As it is by the wrapper itself; optimizers and DDP refuse both."""
    model = Model()
    model.head = nn.LazyLinear(3)
    wrapper = mapped(model)
    assert preflight(wrapper) == []
    model.towers["T1"] = nn.LazyLinear(4)
    with pytest.raises(ParameterMapError, match="not initialized"):
        preflight(wrapper)


@pytest.mark.usefixtures("process_group")
def test_the_local_shard_of_a_sharded_parameter_is_checked() -> None:
    model = Model()
    mesh = init_device_mesh("cpu", (1,))
    bias = DTensor.from_local(torch.full((4,), torch.nan), mesh, [Replicate()])
    model.towers["T1"].bias = nn.Parameter(bias)
    assert not_finite(mapped(model)) == ["towers.T1.bias"]


def test_parameters_on_meta_stop_the_total_unless_nothing_reads_them() -> None:
    wrapper = on_meta(*NAMES)["wrapper"]
    assert len(preflight(wrapper)[0].evidence["parameters"]) == 6
    with pytest.raises(ParameterMapError, match="on the meta device"):
        wrapper.total(torch.tensor(1.0), "T1")
    for options in ({"gradient_only": True}, {"scale": 0.0}, {"scale": None}):
        wrapper = on_meta(*NAMES, **options)["wrapper"]
        assert preflight(wrapper) == []
        wrapper.total(torch.tensor(1.0), "T1").backward()
    model = Model().to("meta")
    loss = model.trunk(torch.ones(1, 4, device="meta")).sum()
    assert preflight(mapped(model), loss=mapped(model).total(loss, [])) == []


def test_a_modality_without_parameters_of_its_own_may_get_no_dummy_gradient() -> None:
    wrapper = towers_of(T1="towers.T1.weight", dMRI="towers.T1")["wrapper"]
    assert [finding.code for finding in preflight(wrapper)] == ["MD117"]
    wrapper.dummy("dMRI")
    assert wrapper.last.inactive == ("T1",)
    assert wrapper.last.num_params == 0


def test_what_the_trunk_shares_gets_a_dummy_gradient_on_top() -> None:
    model = tied("towers.T1", "trunk")
    wrapper = mapped(model, 0.25, max_fraction=None)
    assert "MD118" in {finding.code for finding in preflight(wrapper)}
    gradients = []
    for total in (lambda loss: loss, lambda loss: wrapper.total(loss, "dMRI")):
        model.zero_grad()
        total(model.trunk(torch.ones(2, 3)).sum()).backward()
        gradients.append(model.trunk.weight.grad)
    assert torch.equal(gradients[1], gradients[0] + 0.25)
    assert preflight(DummyLossWrapper(model, {"T1": "towers.T1.bias", "dMRI": "towers.dMRI"})) == []


def test_names_are_those_of_the_model_of_the_wrapper() -> None:
    """Others are those of the called model, and what both have is named once."""
    model, head = Model(), nn.Linear(2, 2)
    outer = nn.ModuleDict({"backbone": model, "head": head})
    for bias in (model.towers["T1"].bias, head.bias):
        nn.init.constant_(bias, torch.nan)
    assert not_finite(mapped(model), model=outer) == ["towers.T1.bias", "head.bias"]
