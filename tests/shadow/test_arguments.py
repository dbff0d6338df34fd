"""How the arguments of towers and of the trunk may differ between calls."""

import pytest
import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper
from modaldummy._errors import UnsupportedEngineError
from modaldummy._shadow import shadow_inactive
from tests.asserts import assert_same_bits


class Memory:
    """A cache: each call of a tower adds its output."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []


class Tower(nn.Module):
    """Of one linear layer and of one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, image: Tensor, memory: Memory) -> Tensor:
        memory.outputs.append(self.used(image))
        return torch.stack(memory.outputs).sum(0)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(
        self, features: list[Tensor] | None, first: Tensor | None, _unused: Tensor, text: Tensor
    ) -> Tensor:
        self.text_node = str(text.grad_fn)
        return (self.weight * sum(features or [], start=text)).sum() + (
            0 if first is None else first.sum()
        )


class Model(nn.Module):
    """The trunk takes features or None, before what is always there."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tower, self.trunk = nn.Linear(2, 2), Tower(), Trunk()

    def forward(self, text: Tensor, image: Tensor | None = None, memory: object = None) -> Tensor:
        text, memory = self.text(text), memory or Memory()
        features = [] if image is None else [self.tower(image, memory)] * 2
        first = features[0] if features else None
        loss: Tensor = self.trunk(features or None, first, torch.ones(2), text)
        return loss


def test_optional_inputs_and_caches_may_differ_from_the_record() -> None:
    model, batch = Model(), torch.ones(1, 2)
    wrapper = DummyLossWrapper(model, {"image": "tower"})
    memory = Memory()
    memory.outputs.append(model.text(batch))  # a tensor with a graph
    shadow_inactive(wrapper, model, examples=[(batch, batch, memory)])
    for _ in range(2):
        model.zero_grad()
        wrapper.total(model(batch), ()).backward()
        assert "Tie" in model.trunk.text_node  # this input is there without the tower
        for parameter in model.tower.used.parameters():
            assert_same_bits(parameter.grad, torch.full_like(parameter, 1e-7).detach(), "used")
        # Where the tower runs these get no gradient, and ranks have to agree.
        assert all(parameter.grad is None for parameter in model.tower.unused.parameters())


def test_an_argument_that_cannot_be_copied_is_refused() -> None:
    class Once(Memory):
        def __deepcopy__(self, _: object) -> object:
            raise TypeError("cannot copy")

    model, batch = Model(), torch.ones(1, 2)
    wrapper = DummyLossWrapper(model, {"image": "tower"})
    with pytest.raises(UnsupportedEngineError, match="cannot be copied"):
        shadow_inactive(wrapper, model, examples=[(batch, batch, Once())])


class Doubled:
    """An argument that computes its own copy."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __deepcopy__(self, memo: dict[int, object]) -> "Doubled":
        return Doubled(torch.cat([self.image]))


class ByObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = ObjectTower(2, 2)
        self.trunk = nn.Linear(2, 2)

    def forward(self, text: Tensor, image: Doubled | None = None) -> Tensor:
        loss: Tensor = self.trunk(text if image is None else text + self.tower(image)).sum()
        return loss


class ObjectTower(nn.Linear):
    def forward(self, image: Doubled) -> Tensor:  # type: ignore[override]
        return super().forward(image.image)


def test_an_argument_may_compute_its_own_copy() -> None:
    model, batch = ByObject(), torch.ones(1, 2)
    wrapper = DummyLossWrapper(model, {"image": "tower"})
    shadow_inactive(wrapper, model, examples=[(batch, Doubled(batch))])
    wrapper.total(model(batch), []).backward()
    assert model.tower.weight.grad is not None
    assert model.tower.weight.grad.unique().tolist() == [pytest.approx(1e-7)]
