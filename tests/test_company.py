"""The wrapper beside what training loops put around it: DDP, torch.compile, torch.func."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modaldummy import DummyLossWrapper
from tests.asserts import assert_connected, gradients_of
from tests.zoo import brain

BATCHES = ({"T1": torch.ones(2, 3)}, {"dMRI": torch.ones(2, 5)}, {"rsfMRI": torch.ones(2, 2)})


@pytest.mark.usefixtures("process_group")
def test_ddp_stops_without_the_dummy_and_goes_on_with_it() -> None:
    """The reason for it all, in one process: the second forward finds gradients missing."""
    without = DistributedDataParallel(brain().model)
    without(BATCHES[0]).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        without(BATCHES[1])
    case = brain()
    case.spec = {**case.spec, "rest": "T10_proj"}  # part of the model, and never in its forward
    model = DistributedDataParallel(case.model)
    wrapper = DummyLossWrapper(model, case.spec)
    for batch in BATCHES:
        model.zero_grad()
        wrapper.total(model(batch).square().mean(), batch).backward()
        assert gradients_of(dict(model.named_parameters()))
        assert_connected(case.inactive(set(batch)))


# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_total_compiles_into_one_graph() -> None:
    """Map, batch and report included, for each active set."""
    case = brain()
    wrapper = case.wrapper()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(weight: Tensor, names: list[str]) -> Tensor:
        return wrapper.total(weight.square().sum(), names)

    for names in (["T1"], ["dMRI"], []):
        case.model.zero_grad()
        step(torch.ones(2, requires_grad=True), names).backward()
        assert gradients_of(case.inactive(set(names)))
        assert wrapper.last is not None
        assert wrapper.last.active == tuple(names)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    case = brain()
    hidden = torch.ones(2, 4, requires_grad=True)
    output = checkpoint(case.model.get_submodule("trunk"), hidden, use_reentrant=use_reentrant)
    assert isinstance(output, Tensor)
    case.wrapper().total(output.sum(), "T1").backward()
    assert gradients_of(case.inactive({"T1"}))
    assert case.model.get_parameter("trunk.weight").grad is not None


def test_functional_gradients() -> None:
    """`torch.func.grad` sees the dummy of the parameters that `functional_call` put in place."""
    case = brain()
    wrapper = case.wrapper()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self) -> Tensor:
            return wrapper.total(torch.ones(()), "T1")

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(Loss(), parameters, ())
        return result

    parameters = {f"model.{name}": p.detach() for name, p in case.model.named_parameters()}
    gradients = grad(loss)(parameters)
    expected = {f"model.{name}" for name in case.inactive({"T1"})}
    assert {name for name, gradient in gradients.items() if gradient.any()} == expected
