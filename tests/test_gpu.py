"""What only a CUDA device can show: no waiting, launches, graphs, streams, sizes beyond 2**31."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from modaldummy import DummyLossWrapper
from modaldummy._core.reduce import fused_kernels, sum_all

pytestmark = pytest.mark.gpu

REDUCTIONS = ["torch", "triton"]
SETTINGS: dict[str, dict[str, object]] = {
    "default": {},
    "zero": {"scale": 0.0},
    "none": {"scale": None},
    "gradient_only": {"gradient_only": True},
}


@pytest.fixture(params=REDUCTIONS)
def reductions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton" and fused_kernels() is None:
        pytest.skip("Triton is not here")
    monkeypatch.setenv("MODALDUMMY_REDUCTIONS", request.param)
    return str(request.param)


def model_of(count: int, size: int = 768, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Modality `here` and `count` vectors of modality `gone`."""
    vectors = (torch.ones(size, dtype=dtype) for _ in range(count))
    return nn.ModuleDict({"here": nn.Linear(4, 1), "gone": nn.ParameterList(vectors)}).cuda()


def wrap(model: nn.Module, **options: object) -> DummyLossWrapper:
    return DummyLossWrapper(model, {"here": "here", "gone": "gone"}, **options)  # type: ignore[arg-type]


def loss_of(model: nn.ModuleDict) -> Tensor:
    output: Tensor = model["here"](torch.ones(2, 4, device="cuda"))
    return output.square().mean() + 1


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.usefixtures("no_waiting")
def test_a_step_never_waits(reductions: str, options: dict[str, object]) -> None:
    """Neither the first one, which builds tables, nor one that adds to gradients."""
    model = model_of(300)
    wrapper = wrap(model, **options)
    loss_of(model)  # cuBLAS waits once, when it starts
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        wrapper.total(loss_of(model), ["here"]).backward()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
def test_waiting_would_be_seen() -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


def forward_and_backward(wrapper: DummyLossWrapper) -> None:
    wrapper.total(torch.ones((), device="cuda", requires_grad=True), ["here"]).backward()


def launches(run: Callable[[], object]) -> int:
    """Kernels that `run` gives to the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    names = [event.name() for event in record.profiler.kineto_results.events()]
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)


def test_launches_do_not_grow_with_the_number_of_tensors(reductions: str) -> None:
    """Forward and backward of up to 2**17 elements of one small shape without gradients."""
    counts = {}
    for count in (2, 100):  # as many as fit into one buffer of slices, 2**17 elements
        model = model_of(count)
        step = partial(forward_and_backward, wrap(model))
        step()
        model.zero_grad()
        counts[count] = launches(step)
    assert counts[2] == counts[100]
    assert 0 < counts[2] < 60


def test_one_launch_reads_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch for each dtype, one that joins their pieces, and the sum."""
    if fused_kernels() is None:
        pytest.skip("Triton is not here")
    monkeypatch.setenv("MODALDUMMY_REDUCTIONS", "triton")
    device = torch.device("cuda", 0)
    found = {}
    for count in (1, 1000):
        tensors = [torch.ones(size % 50 + 1, device=device) for size in range(count)]
        run = partial(sum_all, tensors, dtype=torch.float32, device=device)
        run()
        found[count] = launches(run)
    assert 0 < found[1] == found[1000] <= 5


def test_a_graph_can_be_captured_and_replayed(reductions: str) -> None:
    """Value and gradients follow the parameters and the loss from replay to replay.

    Also where the fused kernels have been asked for: the warm-up uses them, the capture does not.
    """
    model = model_of(50)
    wrapper = wrap(model, scale=1e-3, max_fraction=None)
    real = torch.ones((), device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wrapper.total(real, ["here"]).backward()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in [*model.parameters(), real]:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = wrapper.total(real, ["here"])
        total.backward()
    for value in (1.0, 2.0):
        with torch.no_grad():
            real.fill_(value)
            for parameter in model["gone"].parameters():
                parameter.fill_(value)
        graph.replay()
        assert total.item() == pytest.approx(value + 1e-3 * value * 50 * 768, rel=1e-5)
        gradients = [parameter.grad for parameter in model["gone"].parameters()]
        assert all(g is not None and (g == 1e-3).all() for g in gradients)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_compiled(reductions: str, scale: float | None) -> None:
    torch.compiler.reset()
    model = model_of(20)
    wrapper = wrap(model, scale=scale)
    compiled = torch.compile(wrapper.total, fullgraph=True)
    real = torch.ones((), device="cuda", requires_grad=True)
    total = compiled(real * 2, ["here"])
    total.backward()
    assert total.item() == pytest.approx(2, rel=1e-3)
    for parameter in model["gone"].parameters():
        if scale:
            assert parameter.grad is not None
            assert (parameter.grad == torch.tensor(scale)).all()
        else:
            assert parameter.grad is None or not parameter.grad.any()


def test_each_stream_has_tables_of_its_own(reductions: str) -> None:
    """Work on a second stream does not read a table that the first is still filling."""
    tensors = [torch.ones(1000, device="cuda") for _ in range(200)]
    device = tensors[0].device
    torch.cuda.synchronize()
    if reductions == "triton":
        from modaldummy._core import triton_kernels

        triton_kernels._table.cache_clear()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(sum_all(tensors, dtype=torch.float32, device=device))
    torch.cuda.synchronize()
    assert [total.item() for total in found] == pytest.approx([200_000.0] * 4)
    if reductions == "triton":
        assert triton_kernels._table.cache_info().currsize == len(streams)


def test_more_than_two_to_the_31_elements(reductions: str) -> None:
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of free memory")
    huge = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    huge[-1] = 3
    total = sum_all([huge, huge[:2]], dtype=torch.float64, device=huge.device)
    assert total.item() == count + 2 + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_totals_agree_with_the_cpu(reductions: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = model_of(40, 1000, dtype)
    with torch.no_grad():
        for parameter in model["gone"].parameters():
            parameter.normal_()
    wrapper = wrap(model, scale=1e-4, max_fraction=None)
    total = wrapper.total(torch.ones((), device="cuda", requires_grad=True), ["here"])
    expected = 1 + 1e-4 * sum(p.double().sum().item() for p in model["gone"].parameters())
    assert total.item() == pytest.approx(expected, rel=1e-5)
