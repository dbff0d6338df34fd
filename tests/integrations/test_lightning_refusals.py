"""What `DummyLossCallback` refuses, where training starts or at its first step."""

from typing import Any

import pytest
import torch

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from modaldummy.integrations.lightning import DummyLossCallback
from tests.holding import NAMES, Towers
from tests.integrations.lightning_modules import QUIET, Module, fit

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

TURNS = [["T1"], ["rsfMRI"]]


def test_it_refuses_what_is_no_wrapper() -> None:
    wrong: Any = Towers()
    with pytest.raises(TypeError, match=r"`wrapper` must be a DummyLossWrapper, got .*Towers"):
        DummyLossCallback(wrong)


@pytest.mark.parametrize(
    ("number", "given"), [(0, "got none. Pass the wrapper"), (2, "got 2. Pass the wrapper")]
)
def test_it_refuses_to_guess_the_wrapper(number: int, given: str) -> None:
    module = Module(wrapped=False)
    spec = {name: f"model.towers.{name}" for name in NAMES}
    for place in range(number):
        setattr(module, f"wrapper{place}", DummyLossWrapper(module, spec))
    expected = rf"`Module` must have one DummyLossWrapper among its attributes, {given}"
    with pytest.raises(ValueError, match=expected):
        fit(module, TURNS, DummyLossCallback())


def test_it_refuses_the_wrapper_of_another_model() -> None:
    with pytest.raises(ValueError, match="shares no parameter with the model of the wrapper"):
        fit(Module(), TURNS, DummyLossCallback(Module().wrapper, hold=True))


def test_it_refuses_a_loss_that_does_not_go_through_the_wrapper() -> None:
    module = Module()
    module.wrapped = False
    with pytest.raises(RuntimeError, match="The loss of `Module` did not go through the wrapper"):
        fit(module, TURNS, DummyLossCallback())


def test_it_refuses_such_a_loss_after_others_too() -> None:
    """Of a training before, or outside of any."""
    module = Module()
    fit(module, TURNS, DummyLossCallback())
    module.wrapped = False
    with pytest.raises(RuntimeError, match="The loss of `Module` did not go through the wrapper"):
        fit(module, TURNS, DummyLossCallback())


class Two(Module):
    """With two optimizers, the second of which may be one that cannot be held."""

    def __init__(self, second: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.second: Any = second

    def configure_optimizers(self) -> Any:
        towers = self.model.towers
        return [
            torch.optim.AdamW(towers["T1"].parameters()),
            self.second(towers["dMRI"].parameters()),
        ]


def test_a_hold_that_is_refused_leaves_no_other_behind() -> None:
    module = Two(torch.optim.LBFGS)
    with pytest.raises(UnsupportedEngineError, match="LBFGS"):
        fit(module, TURNS, DummyLossCallback(hold=True))
    assert module.wrapper._observers == []


def test_all_optimizers_are_let_go_at_the_end() -> None:
    module = Two(torch.optim.AdamW)
    fit(module, TURNS, DummyLossCallback(hold=True))
    assert module.wrapper._observers == []


def test_it_refuses_to_hold_what_has_no_parameter_of_the_map() -> None:
    class Trunk(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.trunk.parameters())

    with pytest.raises(ValueError, match="has no parameter of the modalities"):
        fit(Trunk(), TURNS, DummyLossCallback(hold=True))
