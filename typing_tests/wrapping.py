"""What a type checker knows of the wrapper and of what it returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, StepReport, active_modalities


@dataclass
class Output:
    """What a model returns."""

    loss: Tensor
    logits: Tensor


def maps(model: nn.Module) -> list[DummyLossWrapper]:
    """Plain dicts of every kind are maps, without a cast."""
    plain: dict[str, str] = {"T1": "encoders.T1"}
    joint: dict[tuple[str, str], nn.Module] = {("T1", "dMRI"): model}
    mixed: dict[str | tuple[str, ...], str | nn.Module | list[nn.Parameter]] = {
        "T1": model,
        ("T1", "dMRI"): list(model.parameters()),
    }
    nested: Mapping[str, list[list[str]]] = {"T1": [["encoders.T1", "heads.T1"]]}
    return [DummyLossWrapper(model, spec) for spec in (plain, joint, mixed, nested)]


def options(model: nn.Module) -> None:
    """All of them, positional where they may be."""

    def resolver(batch: dict[str, Tensor]) -> Iterable[str]:
        return batch.keys()

    DummyLossWrapper(model, {"T1": "T1"}, 1e-7)
    DummyLossWrapper(model, {"T1": "T1"}, None, max_fraction=None, gradient_only=True)
    DummyLossWrapper(model, {"T1": "T1"}, scale=0, max_fraction=1, resolver=resolver)


def members(wrapper: DummyLossWrapper, loss: Tensor) -> None:
    """Results are as narrow as they are at run time."""
    assert_type(wrapper.total(loss, {"T1": loss}), Tensor)
    assert_type(wrapper.dummy(["T1"]), Tensor)
    assert_type(wrapper.modalities, tuple[str, ...])
    assert_type(wrapper.named_parameters("T1"), dict[str, nn.Parameter])
    assert_type(wrapper.named_parameters(("T1", "dMRI")), dict[str, nn.Parameter])
    assert_type(wrapper.last, StepReport | None)
    assert_type(active_modalities({"T1": loss}, wrapper.modalities), tuple[str, ...])


def report(wrapper: DummyLossWrapper) -> None:
    """There is none before the first call, which has to be asked for."""
    last = wrapper.last
    assert last is not None
    assert_type(last.active, tuple[str, ...])
    assert_type(last.inactive, tuple[str, ...])
    assert_type(last.real, Tensor)
    assert_type(last.dummy, Tensor)
    assert_type(last.uncapped, Tensor)
    assert_type(last.num_params, int)
    assert_type(last.num_elements, int)
    assert_type(last.fraction, float)
    assert_type(last.as_dict("train/"), dict[str, float])


def returns(wrapper: DummyLossWrapper, x: Tensor) -> None:
    """A wrapped function returns what it returned before, and also takes `modalities=`."""

    @wrapper
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    @wrapper
    def pair(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        return output.mean(), {}

    @wrapper
    def whole(model: nn.Module, batch: dict[str, Any]) -> Output:
        return Output(x, x)

    assert_type(loss(x, x), Tensor)
    assert_type(loss(x, x, modalities=["T1"]), Tensor)
    assert_type(loss(x, target=x, modalities=torch.ones(2, dtype=torch.bool)), Tensor)
    assert_type(pair(x, {"T1": x}), tuple[Tensor, dict[str, float]])
    assert_type(whole(nn.Linear(1, 1), {"T1": x}), Output)


def modules(wrapper: DummyLossWrapper, x: Tensor) -> Tensor:
    """The result of a module is Any, as `nn.Module.__call__` says; it fits where a loss goes."""
    criterion = wrapper(nn.MSELoss())
    assert_type(criterion(x, x, modalities="T1"), Any)
    loss: Tensor = criterion(x, x, modalities="T1")
    return loss


class Trainer:
    """Has a loss to be wrapped, as a trainer's subclass does."""

    wrapper: DummyLossWrapper

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The real loss."""
        return torch.stack([model(data) for data in inputs.values()]).mean()

    def step(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """A bound method keeps its result too."""
        loss = self.wrapper(self.compute_loss)(model, inputs, modalities=["T1"])
        assert_type(loss, Tensor)


def methods(wrapper: DummyLossWrapper, x: Tensor) -> None:
    """A method in a class is bound, and returns what it did."""

    class Wrapped:
        @wrapper
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return torch.stack([model(data) for data in inputs.values()]).mean()

    assert_type(Wrapped().compute_loss(nn.Linear(1, 1), {"T1": x}), Tensor)
