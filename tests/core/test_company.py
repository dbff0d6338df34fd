"""The wrapper beside what training loops put around it: DDP, autocast, hooks, checkpoints."""

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper
from tests.asserts import assert_connected, assert_same_bits, gradients_of
from tests.zoo import Case, brain

SIZES = {"T1": 3, "dMRI": 5, "rsfMRI": 2}
BATCHES = [{name: torch.ones(2, size)} for name, size in SIZES.items()]


def real_loss() -> Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1


# --- DDP -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_ddp_stops_without_the_dummy_and_goes_on_with_it(scale: float | None) -> None:
    """The reason for it all, in one process: the second forward finds gradients missing."""
    without = DistributedDataParallel(brain().model)
    without(BATCHES[0]).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        without(BATCHES[1])
    case = brain()
    case.spec = {**case.spec, "rest": "T10_proj"}  # part of the model, and never in its forward
    model = DistributedDataParallel(case.model)
    wrapper = DummyLossWrapper(model, case.spec, scale)
    for batch in BATCHES:
        model.zero_grad()
        wrapper.total(model(batch).square().mean(), batch).backward()
        # DDP reduces zeros for a parameter that it has seen without a gradient.
        assert gradients_of(dict(model.named_parameters()))
        dummies = gradients_of(case.inactive(set(batch)))
        assert all(torch.equal(g, torch.full_like(g, scale or 0.0)) for g in dummies)


# --- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The term is accumulated in float32 all the same."""
    case = brain()
    wrapper = case.wrapper()
    with torch.autocast("cpu", dtype):
        loss = case.model(BATCHES[0]).mean()
        total = wrapper.total(loss, "T1")
        total.backward()
    assert total.dtype == loss.dtype
    assert wrapper.last is not None
    assert wrapper.last.dummy.dtype == torch.float32
    assert_connected(case.inactive({"T1"}))
    gradients = gradients_of(case.inactive({"T1"}))
    assert all(torch.equal(g, torch.full_like(g, 1e-7)) for g in gradients)


def test_a_gradient_scaler_skips_a_broken_step_and_unscales_the_next() -> None:
    """The scaled dummy is scaled back to 1e-7; a loss of inf moves nothing."""
    case = brain()
    wrapper = case.wrapper()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)
    before = copy.deepcopy(case.model.state_dict())
    scaler.scale(wrapper.total(case.real({"T1"}) * torch.inf, "T1")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    for name, value in case.model.state_dict().items():
        assert_same_bits(value, before[name], name)
    optimizer.zero_grad()
    scaler.scale(wrapper.total(case.real({"T1"}), "T1")).backward()
    scaler.unscale_(optimizer)
    gradients = gradients_of(case.inactive({"T1"}))
    assert all(torch.equal(g, torch.full_like(g, 1e-7)) for g in gradients)
    scaler.step(optimizer)
    bias = case.model.get_parameter("fusion.bias").detach()
    assert_same_bits(bias, before["fusion.bias"] - torch.full((4,), 1e-7), "bias")


# --- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside_the_model(use_reentrant: bool) -> None:
    case = brain()
    hidden = torch.ones(2, 4, requires_grad=True)
    output = checkpoint(case.model.get_submodule("trunk"), hidden, use_reentrant=use_reentrant)
    assert isinstance(output, Tensor)
    case.wrapper().total(output.sum(), "T1").backward()
    assert gradients_of(case.inactive({"T1"}))
    assert case.model.get_parameter("trunk.weight").grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_the_total(use_reentrant: bool) -> None:
    """The total is computed twice and its gradient handed out once."""
    case = brain()
    wrapper = case.wrapper(0.25)

    def step(weight: Tensor) -> Tensor:
        return wrapper.total(weight.square().sum(), "T1")

    total = checkpoint(step, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
    assert isinstance(total, Tensor)
    total.backward()
    assert all((gradient == 0.25).all() for gradient in gradients_of(case.inactive({"T1"})))


def test_a_graph_can_be_kept_and_walked_again() -> None:
    case = brain()
    total = case.wrapper(0.25).total(real_loss(), "T1")
    total.backward(retain_graph=True)
    total.backward()
    assert all((gradient == 0.5).all() for gradient in gradients_of(case.inactive({"T1"})))


def test_autograd_grad_leaves_the_parameters_alone() -> None:
    case = brain()
    parameters = list(case.inactive({"T1"}).values())
    gradients = torch.autograd.grad(case.wrapper(0.25).total(real_loss(), "T1"), parameters)
    assert all((gradient == 0.25).all() for gradient in gradients)
    assert all(parameter.grad is None for parameter in parameters)


def test_gradients_of_gradients() -> None:
    """A gradient penalty on the total reaches the inactive parameters too."""
    case = brain()
    parameters = list(case.inactive({"T1"}).values())
    total = case.wrapper(0.25, max_fraction=None).total(real_loss(), "T1")
    first = torch.autograd.grad(total.square(), parameters, create_graph=True)
    # d(total^2)/dp = 2 total s, and its sum over all n elements has the gradient 2 s^2 n.
    second = torch.autograd.grad(torch.cat([g.flatten() for g in first]).sum(), parameters)
    number = sum(parameter.numel() for parameter in parameters)
    for gradient in second:
        assert torch.equal(gradient, torch.full_like(gradient, 2 * 0.25**2 * number))


class Loss(nn.Module):
    """A module for `functional_call`: real loss of T1, plus the dummy of the others."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model
        self.wrapper = case.wrapper()

    def forward(self, data: Tensor) -> Tensor:
        return self.wrapper.total(self.model({"T1": data}).square().mean(), "T1")


def functional(case: Case) -> tuple[Any, dict[str, Tensor], set[str]]:
    """The loss as a function of all parameters, these, and the names of the inactive ones."""
    module = Loss(case)

    def loss(parameters: dict[str, Tensor], data: Tensor) -> Tensor:
        result: Tensor = functional_call(module, parameters, (data,))
        return result

    parameters = {f"model.{name}": p.detach() for name, p in case.model.named_parameters()}
    return loss, parameters, {f"model.{name}" for name in case.inactive({"T1"})}


def test_functional_gradients() -> None:
    """`torch.func.grad` sees the dummy of the parameters that `functional_call` put in place."""
    loss, parameters, inactive = functional(brain())
    gradients = grad(loss)(parameters, torch.ones(2, 3))
    for name in inactive:
        assert_same_bits(gradients[name], torch.full_like(gradients[name], 1e-7), name)
    assert gradients["model.trunk.weight"].any()


def test_functional_gradients_per_sample() -> None:
    """`vmap(grad(...))`: each sample has a dummy gradient of its own."""
    loss, parameters, inactive = functional(brain())
    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, torch.ones(5, 2, 3))
    for name in inactive:
        expected = torch.full((5, *parameters[name].shape), 1e-7)
        assert_same_bits(gradients[name], expected, name)


@pytest.mark.parametrize("scale", [0.25, 0.0, None])
def test_hooks_of_inactive_parameters_run_once(scale: float | None) -> None:
    """With a scale of None they run too: that is how DDP learns that a parameter is done."""
    case = brain()
    bias = case.model.get_parameter("fusion.bias")
    seen: list[Tensor | None] = []
    bias.register_hook(seen.append)
    bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    case.wrapper(scale).total(real_loss(), "T1").backward()
    assert len(seen) == 2
    for gradient in seen:
        expected = None if scale is None else torch.full((4,), scale)
        assert_same_bits(gradient, expected, "gradient")


def test_a_hook_may_change_a_dummy_gradient() -> None:
    """Each parameter's own: the others keep theirs."""
    case = brain()
    case.model.get_parameter("fusion.bias").register_hook(lambda gradient: gradient * 3)
    case.wrapper(0.25).total(real_loss(), "T1").backward()
    for name, parameter in case.inactive({"T1"}).items():
        assert parameter.grad is not None
        assert (parameter.grad == (0.75 if name == "fusion.bias" else 0.25)).all()


# --- copies, wrappers, threads -------------------------------------------------------------------


def test_a_wrapper_can_be_pickled() -> None:
    """With its model and its last report, and without a graph."""
    case = brain()
    wrapper = case.wrapper(0.25)
    wrapper.total(real_loss(), "T1")
    twin: DummyLossWrapper = pickle.loads(pickle.dumps(wrapper))
    assert repr(twin) == repr(wrapper)
    assert wrapper.last is not None
    assert twin.last is not None
    assert twin.last.as_dict() == wrapper.last.as_dict()
    twin.total(real_loss(), "T1").backward()
    assert all(p.grad is None for p in case.model.parameters())
    copied = twin.named_parameters(("T1", "dMRI"))
    assert all((gradient == 0.25).all() for gradient in gradients_of(copied))


def test_wrappers_can_be_chained() -> None:
    """Two maps of one model, say vision and text: each adds its own term."""
    case = brain()
    vision = DummyLossWrapper(case.model, {"T1": "fusion"}, 0.25)
    text = DummyLossWrapper(case.model, {"text": "trunk"}, 0.5)
    text.total(vision.total(real_loss(), []), []).backward()
    for name, value in (("fusion.bias", 0.25), ("trunk.bias", 0.5)):
        gradient = case.model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient == value).all()


def test_threads_may_share_a_wrapper() -> None:
    """Each total is right; `last` is the report of one of them, whole."""
    case = brain()
    wrapper = case.wrapper(0.25)
    names = [[name] for name in SIZES] * 40

    def gradient_names(active: list[str]) -> set[str]:
        parameters = dict(case.model.named_parameters())
        total = wrapper.total(real_loss(), active)
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {name for name, g in zip(parameters, found, strict=True) if g is not None}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(gradient_names, names))
    assert results == [set(case.inactive(set(active))) for active in names]
    assert wrapper.last is not None
    assert set(wrapper.last.active) | set(wrapper.last.inactive) == set(SIZES)
    assert len(wrapper.last.active) == 1


class Probe(torch.autograd.Function):
    """Identity whose node tells when the graph goes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_the_report_keeps_no_graph_alive() -> None:
    """Otherwise the activations of a whole step would live until the next."""
    wrapper = brain().wrapper()
    real = Probe.apply(torch.ones((), requires_grad=True))  # type: ignore[no-untyped-call]
    node = weakref.ref(real.grad_fn)
    total = wrapper.total(real, "T1")
    del real
    assert node() is not None
    del total
    assert wrapper.last is not None
    assert node() is None
