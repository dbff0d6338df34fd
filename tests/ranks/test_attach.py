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


# What a model makes of its output tensor, and how to get it from there.
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

    def __init__(self, form: Callable[[Tensor], Any] = FORMS["tensor"][0]) -> None:
        super().__init__()
        self.form = form
        self.towers["dMRI"] = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.table = nn.Embedding(5, 4, sparse=True)

    def mapped(self, scale: float | None = 1e-7) -> DummyLossWrapper:
        owned = {name: [f"towers.{name}"] for name in NAMES}
        return DummyLossWrapper(self, owned | {"text": ["table"]}, scale)

    def forward(self, name: str) -> Any:
        return self.form(self.trunk(self.towers[name](torch.ones(2, 3))))


def attached(form: Callable[[Tensor], Any] = FORMS["tensor"][0]) -> tuple[Model, DummyLossWrapper]:
    """A model whose output is connected, and its wrapper."""
    model = Model(form)
    wrapper = model.mapped()
    attach_to_outputs(wrapper, model)
    return model, wrapper


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert_same_bits(ours.grad.to_dense(), theirs.grad.to_dense(), name)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
@pytest.mark.parametrize("form", FORMS)
def test_output_total_gradients_and_report_are_as_without(form: str, scale: float | None) -> None:
    make, take = FORMS[form]
    plain, connected = Model(make), Model(make)
    wrappers = plain.mapped(scale), connected.mapped(scale)
    attach_to_outputs(wrappers[1], connected)
    for name in ("T1", "dMRI"):  # The second adds to the gradients of the first.
        outputs = plain(name), connected(name)
        assert type(outputs[0]) is type(outputs[1])
        totals = [
            wrapper.total(take(output).square().mean(), name)
            for wrapper, output in zip(wrappers, outputs, strict=True)
        ]
        for total in totals:
            total.backward()
        assert_same_bits(totals[1].detach(), totals[0].detach(), form)
        assert wrappers[0].last is not None
        assert wrappers[1].last is not None
        assert wrappers[1].last.as_dict() == wrappers[0].last.as_dict()
        assert_same_gradients(connected, plain)


def test_what_the_model_returned_stays_as_it_is() -> None:
    """It may keep the container, and use it at the next step."""
    kept = {"output": torch.ones(1)}

    def keep(tensor: Tensor) -> dict[str, Tensor]:
        kept["output"] = tensor
        return kept

    model, _ = attached(keep)
    output = model("T1")
    assert output is not kept
    assert output["output"] is not kept["output"]


def test_the_output_can_be_changed_in_place() -> None:
    model, wrapper = attached()
    output = model("T1")
    output *= 2
    wrapper.total(output.sum(), "T1").backward()
    twin = Model()
    twin.mapped().total((twin("T1") * 2).sum(), "T1").backward()
    assert missing_gradients(wrapper) == {}
    assert_same_gradients(model, twin)


def test_without_gradients_nothing_is_touched() -> None:
    """In `no_grad`, or if all parameters are frozen."""
    returned = (torch.ones(1),)
    model, _ = attached(lambda tensor: returned)
    with torch.no_grad():
        assert model("T1") is returned
    model.requires_grad_(False)
    assert model("T1") is returned


def test_losses_and_forwards_may_be_several() -> None:
    """Two losses of one forward, one after the other; then one loss of two forwards."""
    model, wrapper = attached()
    twin = Model()
    for one, its_wrapper in ((model, wrapper), (twin, twin.mapped())):
        output = one("T1")
        its_wrapper.total(output.sum(), "T1").backward(retain_graph=True)
        its_wrapper.total(output.square().sum(), "T1").backward()
        its_wrapper.total((one("T1") + one("rsfMRI")).sum(), ["T1", "rsfMRI"]).backward()
    assert_same_gradients(model, twin)


def test_a_copy_connects_its_own_parameters() -> None:
    model, wrapper = attached()
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
    model, wrapper = attached()
    dense = [p for name, p in model.named_parameters() if name != "table.weight"]
    optimizer = AdamW(dense, lr=0.1)
    handle = hold_inactive(wrapper, optimizer)
    wrapper.total(model("T1").sum(), "T1").backward()
    optimizer.step()
    assert {name.split(".")[1] for name in handle.held} == {"rsfMRI", "dMRI"}


@pytest.mark.usefixtures("process_group")
def test_ddp_that_looks_for_unused_parameters_does_not_stop() -> None:
    """Nor does `preflight` report it, if the connection is of this wrapper and not removed."""
    model = Model()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    model.register_forward_hook(lambda *_: None)
    wrapper = model.mapped()

    def stops(wrapper: DummyLossWrapper) -> bool:
        return "MD101" in {finding.code for finding in preflight(wrapper, model=ddp)}

    with attach_to_outputs(wrapper, ddp):
        assert not stops(wrapper)
        assert stops(model.mapped())
        for name in NAMES:
            wrapper.total(ddp(name).sum(), name).backward()
            assert missing_gradients(wrapper) == {}
    assert stops(wrapper)
    total = wrapper.total(ddp("T1").sum(), "T1")
    with pytest.raises(RuntimeError, match="ready only once"):
        total.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
# What Dynamo does itself, and nobody sees but where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_model_can_be_compiled_afterwards() -> None:
    model, wrapper = attached()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    twin = Model()
    for name in NAMES:
        wrapper.total(compiled(name).sum(), name).backward()
        twin.mapped().total(twin(name).sum(), name).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"wrapper": 3}, TypeError, "`wrapper` must be a DummyLossWrapper, got 3"),
        ({"model": 3}, TypeError, r"`model` must be a torch\.nn.Module, got 3"),
        ({"model": nn.Linear(2, 2)}, ValueError, "has none of the parameters .* 'T1', 'rsfMRI'"),
    ],
)
def test_wrong_arguments_are_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    given: dict[str, Any] = {"wrapper": model.mapped(), "model": model}
    with pytest.raises(error, match=message):
        attach_to_outputs(**given | changed)


@pytest.mark.usefixtures("process_group")
def test_several_ddps_are_refused() -> None:
    model = Model()
    wrapper = model.mapped()
    for name in ("T1", "dMRI"):
        model.towers[name] = DistributedDataParallel(model.towers[name])
    with pytest.raises(ValueError, match=r"contains 2 DDP modules .* Put one DDP around the whole"):
        attach_to_outputs(wrapper, model)


@pytest.mark.parametrize("returned", [3, None, [], torch.ones(1), {"a": "b"}], ids=repr)
def test_an_output_without_a_graph_is_refused(returned: Any) -> None:
    model = Model(lambda tensor: returned)
    with (
        attach_to_outputs(model.mapped(), model),
        pytest.raises(UnsupportedEngineError, match=r"Model contains no tensor with.*`remove"),
    ):
        model("T1")
    assert model("T1") is returned


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_are_refused(reentrant: bool) -> None:
    """Their backward reaches parameters another time, after DDP has reduced them."""
    model, _ = attached(lambda t: (t.sum(), checkpoint(torch.tanh, t, use_reentrant=reentrant)))
    if reentrant:
        with pytest.raises(UnsupportedEngineError, match=r"reentrant check.*use_reentrant=False"):
            model("T1")
    else:
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
    with pytest.raises(UnsupportedEngineError, match="FSDP has sharded"):
        model(["T1"])
