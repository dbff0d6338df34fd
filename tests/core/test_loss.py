"""The loss inside what a loss function returns: every kind of container."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from modaldummy._core.loss_function import extract_loss, replace_loss

LOGITS = torch.zeros(2)
TOTAL = torch.tensor(3.0)

Named = namedtuple("Named", ["logits", "loss"])  # loss is not first
Unnamed = namedtuple("Unnamed", ["value", "logits"])


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Frozen:
    loss: Tensor
    logits: Tensor


@dataclass(slots=True)
class Slotted:
    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a mapping whose items are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class TupleWithLoss(tuple[Any, ...]):
    loss: Tensor

    @classmethod
    def of(cls, loss: Tensor) -> "TupleWithLoss":
        made = cls((LOGITS, LOGITS))
        made.loss = loss
        return made


class ListWithName(list[Any]):
    name = "kept"


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda loss: loss,
    "tuple": lambda loss: (loss, LOGITS),
    "list": lambda loss: [loss, LOGITS],
    "list subclass": lambda loss: ListWithName([loss, LOGITS]),
    "dict": lambda loss: {"logits": LOGITS, "loss": loss},
    "user dict": lambda loss: UserDict(loss=loss, logits=LOGITS),
    "model output": lambda loss: ModelOutput(loss=loss, logits=LOGITS),
    "named tuple with loss": lambda loss: Named(LOGITS, loss),
    "named tuple without": lambda loss: Unnamed(loss, LOGITS),
    "tuple with an attribute": TupleWithLoss.of,
    "dataclass": lambda loss: Output(loss, LOGITS),
    "frozen dataclass": lambda loss: Frozen(loss, LOGITS),
    "dataclass with slots": lambda loss: Slotted(loss, LOGITS),
    "object": lambda loss: SimpleNamespace(loss=loss, logits=LOGITS),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_only_the_loss_is_replaced_and_on_a_copy(make: Callable[[Tensor], Any]) -> None:
    """The new container is of the same kind, holds the rest as it was, and shares no state."""
    real = torch.tensor(2.0)
    result = make(real)
    assert extract_loss(result) is real
    changed = replace_loss(result, TOTAL)
    assert type(changed) is type(result)
    assert extract_loss(changed) is TOTAL
    assert extract_loss(result) is real
    if not isinstance(result, Tensor):
        rest = list(changed) if isinstance(changed, (list, tuple)) else [_logits(changed)]
        assert any(item is LOGITS for item in rest)


def test_attributes_of_a_model_output_follow() -> None:
    changed = replace_loss(ModelOutput(loss=torch.tensor(2.0)), TOTAL)
    assert changed.loss is changed["loss"] is TOTAL


def test_attributes_of_a_list_stay() -> None:
    assert replace_loss(ListWithName([LOGITS]), TOTAL).name == "kept"


def _logits(container: Any) -> Any:
    return container["logits"] if hasattr(container, "keys") else container.logits


class WithProperty(NamedTuple):
    value: Tensor

    @property
    def loss(self) -> Tensor:
        return self.value


def test_a_loss_that_is_computed_can_be_read_and_not_replaced() -> None:
    result = WithProperty(torch.tensor(2.0))
    assert extract_loss(result).item() == 2
    with pytest.raises(TypeError, match="cannot be replaced"):
        replace_loss(result, TOTAL)
