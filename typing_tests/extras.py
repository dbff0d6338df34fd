"""What a type checker knows of the test kit and of the pieces for frameworks."""

from collections.abc import Mapping
from typing import Any, assert_type

from hypothesis.strategies import SearchStrategy
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from torch import Tensor, nn
from transformers import Trainer

from modaldummy import DummyLossWrapper
from modaldummy.integrations.lightning import DummyLossCallback
from modaldummy.integrations.transformers import DummyLossMixin, GradientNormCallback
from modaldummy.testing import (
    active_sets,
    assert_dummy_is_negligible,
    assert_every_parameter_has_gradient,
    assert_gradients_unchanged,
    batches,
    param_maps,
    scales,
)


def strategies(model: nn.Module) -> None:
    """What they draw is known, but for batches, which may be anything."""
    assert_type(active_sets(["T1", "dMRI"]), SearchStrategy[set[str]])
    assert_type(scales(), SearchStrategy[float])
    assert_type(batches(["T1"], ["T1"]), SearchStrategy[Any])
    spec: SearchStrategy[Mapping[Any, Any]] = param_maps(model, max_modalities=2)
    assert spec is not None


def drawn(model: nn.Module) -> DummyLossWrapper:
    """A drawn map is a map."""
    return DummyLossWrapper(model, param_maps(model).example())


def assertions(wrapper: DummyLossWrapper, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """They return nothing."""

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        return batch["T1"].mean()

    assert_every_parameter_has_gradient(model)
    assert_every_parameter_has_gradient(model, wrapper)
    assert_dummy_is_negligible(wrapper, max_fraction=1e-3)
    assert_gradients_unchanged(wrapper, loss_fn, batch)


class MyTrainer(DummyLossMixin, Trainer):
    """As the how-to has it; the mixin is no obstacle for what the Trainer has."""


def transformers(model: nn.Module, wrapper: DummyLossWrapper) -> None:
    """The arguments of the Trainer go on to it."""
    trainer = MyTrainer(model=model, wrapper=wrapper, hold=True)
    MyTrainer(model=model, wrapper=lambda model: DummyLossWrapper(model, {"T1": "T1"}))
    assert_type(trainer.wrapper, DummyLossWrapper)
    trainer.add_callback(GradientNormCallback())


def lightning(wrapper: DummyLossWrapper, module: LightningModule) -> None:
    """A callback like any other."""
    callback = DummyLossCallback(wrapper, hold=True, label=False, prefix="g")
    LightningTrainer(callbacks=[DummyLossCallback(), callback]).fit(module)
