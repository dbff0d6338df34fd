"""The wrapper with features of torch: DDP, autocast, checkpoints, `torch.func`, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper
from tests.asserts import assert_connected, assert_same_bits, gradients_of, last_report
from tests.zoo import Case, brain

SIZES = {"T1": 3, "dMRI": 5, "rsfMRI": 2}
BATCHES = [{name: torch.ones(2, size)} for name, size in SIZES.items()]


def real_loss() -> Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1


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
    assert last_report(wrapper).dummy.dtype == torch.float32
    assert_connected(case.inactive({"T1"}))
    gradients = gradients_of(case.inactive({"T1"}))
    assert all(torch.equal(g, torch.full_like(g, 1e-7)) for g in gradients)


def test_a_gradient_scaler_unscales_dummy_gradients() -> None:
    """A step whose loss is infinite is skipped, as without a dummy term."""
    case = brain()
    wrapper = case.wrapper()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)
    before = case.model.get_parameter("fusion.bias").detach().clone()
    for factor, moved in ((torch.inf, 0.0), (1.0, 1e-7)):
        optimizer.zero_grad()
        scaler.scale(wrapper.total(case.real({"T1"}) * factor, "T1")).backward()
        scaler.step(optimizer)
        scaler.update()
        bias = case.model.get_parameter("fusion.bias").detach()
        assert_same_bits(bias, before - torch.full((4,), moved), "bias")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_total_may_be_computed_in_a_checkpoint(use_reentrant: bool) -> None:
    """The total is computed twice and its gradient handed out once."""
    case = brain()
    wrapper = case.wrapper(0.25)

    def step(weight: Tensor) -> Tensor:
        return wrapper.total(weight.square().sum(), "T1")

    total = checkpoint(step, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
    assert isinstance(total, Tensor)
    total.backward()
    assert all((gradient == 0.25).all() for gradient in gradients_of(case.inactive({"T1"})))


class Loss(nn.Module):
    """A module for `functional_call`: real loss of T1, plus the dummy of the others."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model
        self.wrapper = case.wrapper()

    def forward(self, data: Tensor) -> Tensor:
        return self.wrapper.total(self.model({"T1": data}).square().mean(), "T1")


def test_functional_gradients() -> None:
    """`torch.func.grad` sees the parameters that `functional_call` put in place.

    Under `vmap`, each sample has a dummy gradient of its own.
    """
    case = brain()
    module = Loss(case)

    def loss(parameters: dict[str, Tensor], data: Tensor) -> Tensor:
        result: Tensor = functional_call(module, parameters, (data,))
        return result

    parameters = {f"model.{name}": p.detach() for name, p in case.model.named_parameters()}
    gradients = grad(loss)(parameters, torch.ones(2, 3))
    assert gradients["model.trunk.weight"].any()
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, torch.ones(5, 2, 3))
    for name, parameter in case.inactive({"T1"}).items():
        expected = torch.full(parameter.shape, 1e-7)
        assert_same_bits(gradients[f"model.{name}"], expected, name)
        assert_same_bits(per_sample[f"model.{name}"], expected.expand(5, *expected.shape), name)


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
    report = last_report(wrapper)
    assert set(report.active) | set(report.inactive) == set(SIZES)
    assert len(report.active) == 1
