"""The wrapper inside `torch.compile`: one graph for each active set."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from modaldummy import active_modalities
from modaldummy._core.term import dummy_term, product_without_underflow
from tests.asserts import assert_connected, assert_same_bits, last_report
from tests.zoo import brain, sparse_tables

pytestmark = [
    # Torch's own compiler makes an instance of the Function that it traces and uses `torch.jit`.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

NO_COMPILER = not any(map(shutil.which, ("c++", "g++", "clang++")))
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler")
    ),
]
SETS = [["T1"], ["dMRI"], [], ["T1", "rsfMRI", "dMRI"]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


FORMS: dict[str, tuple[float | None, bool]] = {
    "1e-7": (1e-7, False),
    "gradient only": (1e-7, True),
    "0.0": (0.0, False),
    "None": (None, False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "form", ["1e-7", *(pytest.param(form, marks=pytest.mark.long) for form in list(FORMS)[1:])]
)
def test_total_compiles_into_one_graph(backend: str, form: str) -> None:
    """Map, batch and report included; gradients and value are those of the eager form."""
    scale, gradient_only = FORMS[form]
    case = brain()
    wrapper = case.wrapper(scale, gradient_only=gradient_only)

    def step(weight: Tensor, names: list[str]) -> Tensor:
        return wrapper.total(weight.square().sum(), names)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for names in SETS:
        totals, gradients = [], []
        for function in (step, compiled):
            case.model.zero_grad()
            total = function(torch.ones(2, requires_grad=True), names)
            total.backward()
            totals.append(total.detach())
            gradients.append({name: p.grad for name, p in case.model.named_parameters()})
            report = last_report(wrapper)
            assert (report.active, report.real.item()) == (tuple(names), 2)
        assert_same_bits(totals[1], totals[0], "total")
        for name, expected in gradients[0].items():
            assert_same_bits(gradients[1][name], expected, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient_only", [False, True])
def test_the_dummy_alone_compiles(backend: str, gradient_only: bool) -> None:
    case = brain()
    wrapper = case.wrapper(0.25, gradient_only=gradient_only)
    torch.compile(wrapper.dummy, backend=backend, fullgraph=True)("T1").backward()
    inactive = case.inactive({"T1"})
    assert all(p.grad is not None and (p.grad == 0.25).all() for p in inactive.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_do_not_underflow(dtype: torch.dtype, backend: str) -> None:
    """Inductor keeps the choice between product and floor, in one graph."""
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))

    @torch.compile(backend=backend, fullgraph=True)
    def loss(weight: Tensor) -> Tensor:
        real = weight.square().sum()
        return (real + dummy_term([parameter], 1e-7, loss=real, max_fraction=1e-4).connected) / 4096

    loss(torch.ones(2)).backward()
    expected = product_without_underflow(torch.tensor(1 / 4096), 1e-7, dtype).expand(3)
    assert_same_bits(parameter.grad, expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_tables_compile(backend: str) -> None:
    case = sparse_tables()
    wrapper = case.wrapper()
    step = torch.compile(lambda real: wrapper.total(real, "a"), backend=backend, fullgraph=True)
    step(torch.ones((), requires_grad=True)).backward()
    gradient = case.model.get_parameter("b.weight").grad
    assert gradient is not None
    assert gradient.is_sparse


def test_a_wrapped_loss_compiles() -> None:
    case = brain()
    criterion = torch.compile(
        case.wrapper()(nn.functional.mse_loss), backend="aot_eager", fullgraph=True
    )
    criterion(torch.ones(2), torch.zeros(2), modalities="T1").backward()
    assert_connected(case.inactive({"T1"}))


def test_one_graph_for_each_active_set() -> None:
    """With the active modalities read outside: their order in the batch does not count."""
    wrapper = brain().wrapper()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(active: tuple[str, ...]) -> Tensor:
        return wrapper.total(torch.ones(()), active)

    orders: list[list[str]] = [["T1", "dMRI"], ["dMRI", "T1"], ["T1", "T1", "dMRI"], ["rsfMRI"]]
    for names in orders * 2:
        step(active_modalities({"modality": names}, wrapper.modalities))
    assert counter.frame_count == 2
