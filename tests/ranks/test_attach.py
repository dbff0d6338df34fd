"""The output is connected to all parameters; totals, gradients and reports stay the same."""

import copy
import io
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from modaldummy import (
    DummyLossWrapper,
    UnsupportedEngineError,
    attach_to_outputs,
    hold_inactive,
    missing_gradients,
    preflight,
)
from tests.asserts import assert_same_bits
from tests.holding import NAMES, Towers

Pair = namedtuple("Pair", ["number", "output"])


@dataclass(frozen=True)
class Output:
    number: int
    output: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """Items are attributes too, as in transformers."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda o: o),
    "tuple": (lambda t: (1, t), lambda o: o[1]),
    "list": (lambda t: [t.detach(), t], lambda o: o[1]),
    "named tuple": (lambda t: Pair(1, t), lambda o: o.output),
    "dict": (lambda t: {"a": None, "b": t}, lambda o: o["b"]),
    "dataclass": (lambda t: Output(1, t), lambda o: o.output),
    "model output": (lambda t: ModelOutput(output=t), lambda o: o.output),
    "nested": (lambda t: {"a": [1, (t,)]}, lambda o: o["a"][1][0]),
    "several": (lambda t: (t.sum(), t, t * 2), lambda o: o[0] + o[1] + o[2]),
    "connected second": (lambda t: (t.sum(), t), lambda o: o[1]),
}


class Model(Towers):
    """Returns what a function makes of its output."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = FORMS[form][0]
        self.towers["dMRI"] = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.table = nn.Embedding(5, 4, sparse=True)

    def mapped(self, scale: float | None = 1e-7) -> DummyLossWrapper:
        owned = {name: [f"towers.{name}"] for name in NAMES}
        return DummyLossWrapper(self, owned | {"text": ["table"]}, scale)

    def forward(self, name: str) -> Any:
        return self.form(self.trunk(self.towers[name](torch.ones(2, 3))))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad if p.grad is None else p.grad.to_dense() for p in model.parameters()]


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for name, ours, theirs in zip(names, gradients(model), gradients(other), strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
@pytest.mark.parametrize("form", FORMS)
def test_total_gradients_and_report_are_as_without(form: str, scale: float | None) -> None:
    results = []
    for attached in (False, True):
        model = Model(form)
        wrapper = model.mapped(scale)
        if attached:
            attach_to_outputs(wrapper, model)
        for name in ("T1", "dMRI"):  # the second adds to the gradients of the first
            loss = FORMS[form][1](model(name)).square().mean()
            total = wrapper.total(loss, name)
            total.backward()
        assert wrapper.last is not None
        results.append((model, total.detach(), wrapper.last.as_dict()))
    (plain, total, report), (connected, connected_total, connected_report) = results
    assert_same_bits(connected_total, total, form)
    assert connected_report == report
    assert_same_gradients(connected, plain)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_about_the_output_changes(form: str) -> None:
    model = Model(form)
    plain = model("T1")
    attach_to_outputs(model.mapped(), model)
    connected = model("T1")
    assert type(connected) is type(plain)
    assert_same_bits(FORMS[form][1](connected).detach(), FORMS[form][1](plain).detach(), form)


def test_what_the_model_returned_stays_as_it_is() -> None:
    """It may keep the container, and use it at the next step."""
    model, kept = Model(), {"output": torch.ones(1)}

    def keep(tensor: Tensor) -> dict[str, Tensor]:
        kept["output"] = tensor
        return kept

    model.form = keep
    attach_to_outputs(model.mapped(), model)
    output = model("T1")
    assert output is not kept
    assert output["output"] is not kept["output"]


def test_the_output_can_be_changed_in_place() -> None:
    model = Model()
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    output = model("T1")
    output *= 2
    wrapper.total(output.sum(), "T1").backward()
    twin = Model()
    twin.mapped().total((twin("T1") * 2).sum(), "T1").backward()
    assert missing_gradients(wrapper) == {}
    assert_same_gradients(model, twin)


def test_without_gradient_mode_nothing_is_touched() -> None:
    model, returned = Model(), (torch.ones(1),)
    model.form = lambda tensor: returned
    attach_to_outputs(model.mapped(), model)
    with torch.no_grad():
        assert model("T1") is returned


def test_a_frozen_model_is_left_alone() -> None:
    model, returned = Model(), (torch.ones(1),)
    model.form = lambda tensor: returned
    attach_to_outputs(model.mapped(), model)
    model.requires_grad_(False)
    assert model("T1") is returned


def test_losses_and_forwards_may_be_several() -> None:
    """Two losses of one forward, one after the other; then one loss of two forwards."""
    results = []
    for attached in (False, True):
        model = Model()
        wrapper = model.mapped()
        if attached:
            attach_to_outputs(wrapper, model)
        output = model("T1")
        wrapper.total(output.sum(), "T1").backward(retain_graph=True)
        wrapper.total(output.square().sum(), "T1").backward()
        wrapper.total((model("T1") + model("rsfMRI")).sum(), ["T1", "rsfMRI"]).backward()
        results.append(model)
    assert_same_gradients(*results)


def test_a_copy_connects_its_own_parameters() -> None:
    model = Model()
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    model("T1")
    twin = copy.deepcopy(wrapper)
    twin_model: Any = twin.parameters.model
    twin.total(twin_model("T1").sum(), "T1").backward()
    assert missing_gradients(twin) == {}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_can_be_saved_whole() -> None:
    model = Towers()
    attach_to_outputs(model.wrapper(), model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert len(torch.load(file, weights_only=False)._forward_hooks) == 1


def test_hold_inactive_works_as_without() -> None:
    model = Model()
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    dense = [p for name, p in model.named_parameters() if name != "table.weight"]
    optimizer = AdamW(dense, lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model("T1").sum(), "T1").backward()
    optimizer.step()
    assert {name.split(".")[1] for name in handle.held} == {"rsfMRI", "dMRI"}


@pytest.mark.usefixtures("process_group")
def test_ddp_that_looks_for_unused_parameters_does_not_stop() -> None:
    model = Model()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    wrapper = model.mapped()
    with attach_to_outputs(wrapper, ddp):
        assert [finding.code for finding in preflight(wrapper, model=ddp)] == ["MD119"]
        for name in NAMES:
            wrapper.total(ddp(name).sum(), name).backward()
            assert missing_gradients(wrapper) == {}
    assert [finding.code for finding in preflight(wrapper, model=ddp)] == ["MD101", "MD119"]
    total = wrapper.total(ddp("T1").sum(), "T1")
    with pytest.raises(RuntimeError, match="ready only once"):
        total.backward()


@pytest.mark.usefixtures("process_group")
def test_a_connection_of_another_wrapper_does_not_count() -> None:
    model = Model()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    attach_to_outputs(model.mapped(), ddp)
    model.register_forward_hook(lambda *_: None)
    assert [finding.code for finding in preflight(model.mapped(), model=ddp)] == ["MD101", "MD119"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
# What Dynamo does itself, and nobody sees but where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_can_be_attached_before_ddp_and_below_compile() -> None:
    model = Model()
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in NAMES:
        wrapper.total(compiled(name).sum(), name).backward()
    twin = Model()
    for name in NAMES:
        twin.mapped().total(twin(name).sum(), name).backward()
    for ours, theirs in zip(gradients(model), gradients(twin), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)


# --- Refusals ------------------------------------------------------------------------------------


def test_what_it_is_given_is_checked() -> None:
    model = Model()
    wrapper = model.mapped()
    with pytest.raises(TypeError, match="`wrapper` must be a DummyLossWrapper, got 3"):
        attach_to_outputs(3, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn.Module, got 3"):
        attach_to_outputs(wrapper, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has none of the parameters .* 'T1', 'rsfMRI'"):
        attach_to_outputs(wrapper, nn.Linear(2, 2))


@pytest.mark.usefixtures("process_group")
def test_several_ddps_are_refused() -> None:
    model = Model()
    wrapper = model.mapped()
    for name in ("T1", "dMRI"):
        model.towers[name] = DistributedDataParallel(model.towers[name])
    with pytest.raises(
        ValueError, match=r"contains 2 DDP modules .* Put one DDP around the whole model"
    ):
        attach_to_outputs(wrapper, model)


@pytest.mark.usefixtures("process_group")
def test_a_static_graph_without_gradients_is_refused() -> None:
    model = Model()
    ddp = DistributedDataParallel(model, static_graph=True)
    with pytest.raises(UnsupportedEngineError, match=r"never reduces.*Use scale=0\.0\."):
        attach_to_outputs(model.mapped(None), ddp)
    attach_to_outputs(model.mapped(0.0), ddp)


@pytest.mark.parametrize("returned", [3, None, [], torch.ones(1), {"a": "b"}], ids=repr)
def test_an_output_without_a_graph_is_refused(returned: Any) -> None:
    model = Model()
    model.form = lambda tensor: returned
    handle = attach_to_outputs(model.mapped(), model)
    with pytest.raises(
        UnsupportedEngineError, match=r"output of Model contains no tensor with a graph.*`remove"
    ):
        model("T1")
    handle.remove()
    assert model("T1") is returned


def test_reentrant_checkpoints_are_refused() -> None:
    """Their backward reaches parameters another time, after DDP has reduced them."""
    model = Model("several")
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    model.form = lambda t: (t.sum(), checkpoint(torch.tanh, t, use_reentrant=True))
    with pytest.raises(
        UnsupportedEngineError, match=r"Model uses reentrant checkpoints.*use_reentrant=False"
    ):
        model("T1")
    model.form = lambda t: (t.sum(), checkpoint(torch.tanh, t, use_reentrant=False))
    model("T1")


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_refused() -> None:
    model = Towers()
    wrapper = model.wrapper()
    mesh = init_device_mesh("cpu", (1,))
    for tower in model.towers.values():
        fully_shard(tower, mesh=mesh)
    model.forward = model.loss
    attach_to_outputs(wrapper, model)
    with pytest.raises(UnsupportedEngineError, match="FSDP2 has sharded"):
        model(["T1"])
