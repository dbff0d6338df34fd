"""Models whose forward pass is unusual: a shadow changes nothing but the gradients of towers."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from modaldummy import DummyLossWrapper, ShadowHandle, UnsupportedEngineError, shadow_inactive
from tests.preflight.models import partition

SCALE = 1e-3


class Model(nn.Module):
    """Text and perhaps an image; subclasses change how modules are called."""

    def __init__(self, image: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.block, self.trunk = nn.Linear(4, 4), Block(), nn.Linear(4, 2)
        self.image: Any = image or nn.Linear(4, 4)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Any:
        hidden = self.text(text)
        if image is not None:
            hidden = hidden + self.see(image)
        return self.trunk(self.think(hidden)).sum()

    def see(self, image: Tensor) -> Any:
        return self.image(image)

    def think(self, hidden: Tensor) -> Any:
        return self.block(hidden)


class Block(nn.Module):
    """A checkpoint saves tensors of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Any:
        return self.second(torch.sin(self.first(hidden)).exp())


def data() -> Tensor:
    return torch.linspace(-1, 1, 8).view(2, 4)


def shadowed(model: Any) -> tuple[DummyLossWrapper, ShadowHandle]:
    wrapper = DummyLossWrapper(model, {"image": "image"}, SCALE)
    return wrapper, shadow_inactive(wrapper, model, examples=[(data(), data())])


def save_products(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_product = operation is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


class Selective(Model):
    """A checkpoint saves the results of some operations."""

    def think(self, hidden: Tensor) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, save_products)
        return checkpoint(self.block, hidden, use_reentrant=False, context_fn=contexts)


class Checkpoints(Model):
    def think(self, hidden: Tensor) -> Any:
        return checkpoint(self.block, hidden, use_reentrant=False)


class Appends(Model):
    """A module gets a list, and appends a loss to it."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = Appending()

    def think(self, hidden: Tensor) -> Any:
        losses: list[Tensor] = []
        hidden = self.block(hidden, losses)
        return hidden + sum(losses)


class Appending(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, hidden: Tensor, losses: list[Tensor]) -> Tensor:  # type: ignore[override]
        losses.append(hidden.square().sum())
        return super().forward(hidden)


class Collects(Model):
    """A module gets its input in a list, and appends its output."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = Collecting()

    def think(self, hidden: Tensor) -> Any:
        states = [hidden]
        self.block(states)
        return states[1]


class Collecting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, states: list[Tensor]) -> None:  # type: ignore[override]
        states.append(super().forward(states[0]))


class Twice(Model):
    """A module gets the same tensor twice, and asks whether it is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = Compares()

    def think(self, hidden: Tensor) -> Any:
        return self.block(hidden, (hidden,))


class Compares(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, hidden: Tensor, others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden) if others[0] is hidden else hidden * 100


class Shares(Model):
    """A module of the tower is also called in the trunk, after it."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()
        self.image = nn.Sequential(nn.Linear(4, 4), self.activation)

    def think(self, hidden: Tensor) -> Any:
        return self.block(self.activation(hidden))


@dataclass
class Output:
    loss: Tensor


class Dataclasses(Model):
    """The tower and the model return dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Wraps()

    def forward(self, text: Tensor, image: Tensor | None = None) -> Any:
        return Output(super().forward(text, image))

    def see(self, image: Tensor) -> Any:
        return self.image(image).loss


class Wraps(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, image: Tensor) -> Any:
        return Output(super().forward(image))


class Casts(Model):
    """Forward opens autocast, and the tower is its last module."""

    def forward(self, text: Tensor, image: Tensor | None = None) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.trunk(self.block(self.text(text)))
            if image is not None:
                hidden = hidden + self.image(self.text(image))[:, :2]
            return hidden.float().sum()


class Optional(nn.Linear):
    """Gets nothing but the output of a tower, or nothing at all."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, states: Tensor | None) -> Any:
        return 0.0 if states is None else super().forward(states)


class Apart(Model):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = Optional()

    def forward(self, text: Tensor, image: Tensor | None = None) -> Any:
        states = self.fuse(None if image is None else self.image(image))
        return self.trunk(self.block(self.text(text)) + states).sum()


MODELS: dict[str, Callable[[], Model]] = {
    "plain": Model,
    "checkpoint": Checkpoints,
    "selective checkpoint": Selective,
    "list that grows": Appends,
    "list that the caller reads": Collects,
    "same tensor twice": Twice,
    "shared module": Shares,
    "dataclass": Dataclasses,
    "autocast": Casts,
    "input of a tower alone": Apart,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("has_image", [False, True])
def test_only_the_gradients_of_a_shadowed_tower_change(
    make: Callable[[], Model], has_image: bool
) -> None:
    plain, model = make(), make()
    wrapper, handle = shadowed(model)
    inputs = (data(), data()) if has_image else (data(),)
    expected, actual = (
        getattr(output, "loss", output) for output in (plain(*inputs), model(*inputs))
    )
    assert torch.equal(expected, actual)
    assert bool(handle.shadowed) != has_image
    expected.backward()
    wrapper.total(actual, ["image"] * has_image).backward()
    for name, parameter in plain.named_parameters():
        own = model.get_parameter(name).grad
        if parameter.grad is None and not name.startswith("image"):
            assert own is None
        elif parameter.grad is None:
            assert own is not None
            assert own.unique().tolist() == [pytest.approx(SCALE, rel=1e-2)]
        else:
            assert own is not None
            torch.testing.assert_close(own, parameter.grad)


def test_a_frozen_trunk_inside_a_checkpoint() -> None:
    """Its second run needs the gradients of the first."""
    model = Checkpoints()
    model.requires_grad_(False)
    model.image.requires_grad_(True)
    wrapper, _ = shadowed(model)
    wrapper.total(model(data()), []).backward()
    assert model.image.weight.grad.unique().tolist() == [pytest.approx(SCALE)]


class UsesWithoutACall(nn.Module):
    """Parameters of modules that are not called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.listed = nn.ParameterList([torch.ones(4)])

    def forward(self, image: Tensor) -> Any:
        image = image[:, None] * self.listed[0]
        return self.attention(image, image, image, need_weights=False)[0][:, 0]


def test_parameters_that_are_used_without_a_call_get_their_dummy_gradient() -> None:
    model = Model(UsesWithoutACall())
    wrapper, _ = shadowed(model)
    wrapper.total(model(data()), []).backward()
    for name, parameter in model.image.named_parameters():
        assert parameter.grad.unique().tolist() == [pytest.approx(SCALE)], name


def test_the_dummy_gradient_of_a_sparse_embedding_is_empty() -> None:
    model = Model(nn.Embedding(5, 4, sparse=True))
    wrapper = DummyLossWrapper(model, {"image": "image"}, SCALE)
    shadow_inactive(wrapper, model, examples=[(data(), torch.tensor([0, 1]))])
    wrapper.total(model(data()), []).backward()
    assert model.image.weight.grad.is_sparse
    assert not model.image.weight.grad.to_dense().any()


def test_each_loss_has_the_dummy_gradients_of_its_own_pass() -> None:
    """Two passes with two totals, and two totals of one pass."""
    model = Model()
    wrapper, _ = shadowed(model)
    real, other = model(data(), data()), model(data())
    totals = [wrapper.total(real, ["image"]), wrapper.total(other, [])]
    assert wrapper.last is not None
    assert wrapper.last.num_params == 0
    totals[1].backward()
    assert model.image.bias.grad.unique().tolist() == [pytest.approx(SCALE)]
    model.zero_grad()
    loss = model(data())
    (wrapper.total(loss, []) + wrapper.total(2 * loss, [])).backward()
    assert wrapper.last.num_params == 0
    assert model.image.bias.grad.unique().tolist() == [pytest.approx(2 * SCALE)]


def test_a_loss_of_no_pass_changes_no_pass_that_is_alive() -> None:
    model = Model()
    wrapper, _ = shadowed(model)
    loss = model(data())
    wrapper.total(torch.ones((), requires_grad=True), []).backward()
    wrapper.total(loss, []).backward()
    assert model.image.bias.grad.unique().tolist() == [pytest.approx(SCALE)]


def test_a_share_of_the_scale_reaches_the_dummy_gradient() -> None:
    model = Model()
    wrapper, _ = shadowed(model)
    wrapper.add(model(data()), [], share=0.25).backward()
    assert model.image.bias.grad.unique().tolist() == [pytest.approx(SCALE / 4)]


# --- what is left behind ----------------------------------------------------------------------


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    model = Model()
    _, handle = shadowed(model)
    calls: list[Any] = []
    model.image.register_forward_hook(lambda *_: calls.append(_))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.ones(2, 5))
    model.block(data())
    assert calls == []
    with pytest.raises(RuntimeError, match="shape"):
        model(data(), torch.ones(2, 5))
    model.image(data())
    model.trunk(data())
    handle.remove()
    assert not model.image.weight._backward_hooks


def test_a_refused_record_is_not_used() -> None:
    """Each forward pass is refused again."""
    model = Model()
    model.register_parameter("token", nn.Parameter(torch.ones(4)))
    partition(model, "_hp_mapping")
    wrapper = DummyLossWrapper(model, {"image": ["image", "token"]}, SCALE)
    handle = shadow_inactive(wrapper, model)
    text = "No recorded call of a tower reaches token"
    with pytest.raises(UnsupportedEngineError, match=text), handle.record():
        model(data(), data())
    for _ in range(2):
        with pytest.raises(UnsupportedEngineError, match=text):
            model(data())


def test_a_failed_pass_does_not_spoil_a_record() -> None:
    model = Model()
    wrapper = DummyLossWrapper(model, {"image": "image"}, SCALE)
    handle = shadow_inactive(wrapper, model)
    with handle.record():
        with pytest.raises(RuntimeError, match="shape"):
            model(data(), torch.ones(2, 5))
        model(data(), data())
    model(data())
    assert handle.shadowed == ("image",)


class Counts(nn.Linear):
    """A buffer counts the calls."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.count += 1
        return super().forward(image).sin()


def test_the_second_run_of_a_checkpoint_leaves_no_trace() -> None:
    class Sees(Model):
        def see(self, image: Tensor) -> Any:
            return checkpoint(self.image, image, use_reentrant=False)

    model = Sees(Counts())
    wrapper, _ = shadowed(model)
    wrapper.total(model(data()), []).backward()
    assert model.image.count == 0
    assert model.image.bias.grad.unique().tolist() == [pytest.approx(SCALE)]


def test_a_copy_of_the_model_may_get_a_shadow_of_its_own() -> None:
    model = Model()
    shadowed(model)
    _, handle = shadowed(copy.deepcopy(model))
    handle.remove()
    outer = nn.Sequential(model)
    wrapper = DummyLossWrapper(outer, {"image": "0.image"})
    with pytest.raises(ValueError, match="shadow already"):
        shadow_inactive(wrapper, outer)


def test_a_tower_is_shadowed_in_inference_mode_as_recorded() -> None:
    class Infers(Model):
        def see(self, image: Tensor) -> Any:
            with torch.inference_mode():
                return self.image(image)

    model = Infers()
    model.image.requires_grad_(False)
    modes = []
    model.image.register_forward_pre_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    wrapper = DummyLossWrapper(model, {"image": "image"}, SCALE)
    shadow_inactive(wrapper, model, examples=[(data(), data())])
    model(data())
    assert modes == [True, True]


@pytest.mark.parametrize(
    "examples", [data(), {"text": data()}, [data()]], ids=["tensor", "batch", "tensors"]
)
def test_examples_that_are_not_a_list_of_batches_are_refused(examples: Any) -> None:
    model = Model()
    with pytest.raises(TypeError, match="`examples`"):
        shadow_inactive(DummyLossWrapper(model, {"image": "image"}), model, examples=examples)


def test_a_module_in_the_middle_ends_before_the_trunk_goes_on() -> None:
    """A tower that is the last module in another one is shadowed at the end of that."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.image = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden: Tensor, image: Tensor | None) -> Any:
            hidden = self.before(hidden)
            return hidden if image is None else hidden + self.image(image)

    class InParts(Model):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            del self.image

        def forward(self, text: Tensor, image: Tensor | None = None) -> Any:
            return self.trunk(self.part(self.text(text), image)).sum()

    model = InParts()
    names: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.append(name))
    wrapper = DummyLossWrapper(model, {"image": "part.image"}, SCALE)
    shadow_inactive(wrapper, model, examples=[(data(), data())])
    names.clear()
    wrapper.total(model(data()), []).backward()
    assert names == ["text", "part.before", "part.image", "part", "trunk", ""]
    assert model.part.image.bias.grad is not None


class Outer(nn.Module):
    """What an engine may put around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.num_calls = 0

    def forward(self, *inputs: Any) -> Any:
        self.num_calls += 1
        return self.module(*inputs)


def test_a_shadow_calls_what_an_engine_has_put_around_a_tower_since_the_record() -> None:
    model: Any = Model()
    model.text = Outer(model.text)
    wrapper, _ = shadowed(model)
    model.image = Outer(Outer(model.image))
    model.block = Outer(model.block)
    wrapper.total(model(data()), []).backward()
    assert (model.image.num_calls, model.image.module.num_calls, model.block.num_calls) == (1, 1, 1)
    assert model.image.module.module.bias.grad.unique().tolist() == [pytest.approx(SCALE)]


def test_a_module_that_an_engine_gathers_alone_gets_its_dummy_gradient(
    process_group: None,
) -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    fully_shard(model.image[1])
    fully_shard(model)
    wrapper, _ = shadowed(model)
    wrapper.total(model(data()), []).backward()
    for parameter in model.image.parameters():
        assert parameter.grad.to_local().unique().tolist() == [pytest.approx(SCALE)]
