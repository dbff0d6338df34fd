"""What the mixin refuses, and what it says then."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from modaldummy.integrations.transformers import DummyLossMixin
from tests.integrations.trainers import (
    SCALE,
    MixedTrainer,
    Recorder,
    Scanner,
    arguments,
    mixed,
    samples,
    scanner,
    wrapper_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
def test_the_mixin_comes_first(base: type[Trainer]) -> None:
    expected = r"has no effect\. Write `class Wrong\(DummyLossMixin, Trainer\)`"
    with pytest.raises(TypeError, match=expected):
        type("Wrong", (base, DummyLossMixin), {})
    assert type("Right", (DummyLossMixin, base), {}).__mro__[1] is DummyLossMixin


def test_a_mixin_between_does_no_harm() -> None:
    class Other: ...

    assert issubclass(type("Right", (Other, DummyLossMixin, Trainer), {}), Trainer)


WRONG: dict[str, tuple[Any, str]] = {
    "a map": ({"T1": "towers.T1"}, "must be a DummyLossWrapper, or a function"),
    "nothing": (None, r"must be a DummyLossWrapper, or a function .* got None"),
    "a function of something else": (lambda model: model, "must be a DummyLossWrapper"),
    "a function that forgets to return": (lambda _: None, r"got None"),
}


@pytest.mark.parametrize(("wrapper", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_wrapper_is_one(wrapper: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=expected):
        mixed(scanner(), arguments(tmp_path), wrapper=wrapper)


class Bypassing(MixedTrainer):
    """Computes the loss by itself."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return model(**inputs)["loss"]


class Dropping(MixedTrainer):
    """Asks for the outputs, and makes another loss of them."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return outputs["logits"].square().mean()


@pytest.mark.parametrize("kind", [Bypassing, Dropping])
def test_a_loss_that_bypasses_the_mixin_is_refused(kind: type[Any], tmp_path: Path) -> None:
    """At the first step, before the optimizer makes it."""
    model = scanner()
    before = model.trunk.weight.clone()
    with pytest.raises(RuntimeError) as caught:
        mixed(model, arguments(tmp_path), kind).train()
    assert f"`{kind.__name__}` did not go through the wrapper" in str(caught.value)
    assert "`super().compute_loss(...)`" in str(caught.value)
    assert torch.equal(model.trunk.weight, before)


class Adding(MixedTrainer):
    """Adds to the loss of the mixin."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        total: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return total + model.get_parameter("trunk.weight").square().sum()


class Own(MixedTrainer):
    """Sends a loss of its own through the wrapper."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return self.wrapper.total(model(**inputs)["logits"].square().mean(), inputs)


@pytest.mark.parametrize("kind", [Adding, Own])
def test_losses_of_ones_own_may_go_through_the_wrapper(kind: type[Any], tmp_path: Path) -> None:
    model, own = scanner(), Recorder()
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=1)
    mixed(model, args, kind, callbacks=[own]).train()
    gradient = own.steps[0]["towers.dMRI.weight"]
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((3, 6), SCALE), rtol=1e-6, atol=0)


class Lossless(Scanner):
    def forward(self, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"loss": None}

    accepts_loss_kwargs = False


class Wrapping(Scanner):
    """Adds the dummy itself, as a model does that is trained without the mixin."""

    def loss(self, error: Tensor, present: Collection[str]) -> Tensor:
        wrapper: Any = self.wrapper
        total: Tensor = wrapper.total(error, list(present))
        return total


def test_a_dummy_that_would_be_added_twice_is_refused(tmp_path: Path) -> None:
    model: Any = Wrapping()
    model.wrapper = wrapper_of(model)
    options = {"wrapper": model.wrapper, "train_dataset": samples(model)}
    with pytest.raises(RuntimeError, match="dummy term would be added twice"):
        mixed(model, arguments(tmp_path), **options).train()


class Twice(MixedTrainer):
    """Sends through the wrapper what has been through it."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return self.wrapper.total(super().compute_loss(model, inputs, *args, **kwargs), inputs)


def test_a_total_of_the_total_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not both"):
        mixed(scanner(), arguments(tmp_path), Twice).train()


def test_a_model_without_a_loss_is_named(tmp_path: Path) -> None:
    """Before arithmetic with None fails; and the wrapper is left as it was."""
    model = Lossless()
    wrapper = wrapper_of(model)
    trainer = mixed(model, arguments(tmp_path, remove_unused_columns=False), wrapper=wrapper)
    with pytest.raises(TypeError, match="The loss that `compute_loss` of the Trainer returns"):
        trainer.train()
    assert wrapper._observers == []


def test_a_hold_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """As `hold_inactive` does, before the first step."""
    model = scanner()
    optimizer = torch.optim.SGD(model.trunk.parameters(), lr=0.1)
    trainer = mixed(model, arguments(tmp_path), hold=True, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="has no parameter of the modalities"):
        trainer.train()
