"""Sums and fills over many tensors at once, against the plain loop in float64."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modaldummy._core import reduce
from modaldummy._core.reduce import (
    accumulation_dtype,
    by_spec,
    fill_gradients,
    fused_kernels,
    kernels_for,
    sum_all,
)
from tests.oracles import naive_dummy, naive_magnitude
from tests.strategies import FLOATS, parameters

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
F32, F64 = torch.float32, torch.float64


@given(st.lists(parameters(), max_size=6))
def test_sum_agrees_with_the_loop(tensors: list[torch.nn.Parameter]) -> None:
    expected = naive_dummy(tensors, 1.0).item()
    size = naive_magnitude(tensors, 1.0)
    total = sum_all(tensors, dtype=F32, device=CPU)
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=0, abs=1e-5 * size)


def whole_numbers(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Random whole numbers, whose sums are exact, so that a lost or doubled one shows."""
    return torch.randint(-8, 9, shape).to(dtype)


LISTS: dict[str, Callable[[], list[Tensor]]] = {
    "one": lambda: [whole_numbers(768)],
    "more than one buffer": lambda: [whole_numbers(768) for _ in range(100)],
    "exactly one buffer": lambda: [whole_numbers(8192) for _ in range(4)],
    "just not small": lambda: [whole_numbers(8193) for _ in range(3)],
    "matrices": lambda: [whole_numbers(8, 768) for _ in range(7)],
    "transposed": lambda: [whole_numbers(8, 768).t() for _ in range(3)],
    "of many layouts": lambda: [whole_numbers(size % 5 + 1, 3) for size in range(40)],
    "scalars": lambda: [whole_numbers() for _ in range(5)],
    "empty": lambda: [torch.empty(0, 3), torch.empty(0, 3), whole_numbers(2)],
    "of every dtype": lambda: [whole_numbers(40, dtype=d) for d in FLOATS for _ in range(2)],
    "complex": lambda: [torch.complex(whole_numbers(30), torch.ones(30)) for _ in range(3)],
    "large and small": lambda: [whole_numbers(n) for n in (5, 100_000, 5, 9000, 5, 100_000)],
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS.keys())
def test_sum_counts_each_element_once(make: Callable[[], list[Tensor]]) -> None:
    tensors = make()
    expected = naive_dummy(tensors, 1.0).item()
    assert sum_all(tensors, dtype=F32, device=CPU).item() == expected
    assert sum_all(tensors, by_spec(tensors), dtype=F64, device=CPU).item() == expected


def test_sum_of_nothing_is_zero() -> None:
    """And has the dtype and device that were asked for, as any other sum."""
    assert sum_all([], dtype=F32, device=CPU).item() == 0
    assert sum_all([torch.empty(0, 3)], dtype=F32, device=CPU).item() == 0
    for tensors in ([], [torch.ones(3), torch.ones(3, device=META)]):
        total = sum_all(tensors, dtype=F64, device=META)
        assert (total.dtype, total.device) == (F64, META)


class Own(Tensor):
    """A subclass, which may lack what others have."""


UNLIKE: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.ones(4).to_sparse(),
    "subclass": lambda: torch.ones(4).as_subclass(Own),
}


@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_cannot_be_copied_is_summed_alone(make: Callable[[], Tensor]) -> None:
    """Though it has the shape and dtype of its neighbours."""
    with patch.object(torch, "cat", side_effect=AssertionError("copied")):
        assert sum_all([torch.ones(4), make(), make()], dtype=F32, device=CPU).item() == 12
        with pytest.raises(AssertionError, match="copied"):
            sum_all([torch.ones(4), torch.ones(4)], dtype=F32, device=CPU)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, F32), (torch.float16, F32), (F32, F64)], ids=str
)
@pytest.mark.parametrize("shape", [(3_000_000,), (2000, 1500)])
def test_large_sums_in_another_dtype_make_no_large_copy(
    dtype: torch.dtype, wide: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Torch casts all of a tensor before it adds it up; 2**20 elements are enough at a time."""
    tensor = whole_numbers(*shape, dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as record:
        total = sum_all([tensor], dtype=wide, device=CPU)
    assert total.item() == tensor.double().sum().item()
    assert max(event.cpu_memory_usage for event in record.events()) <= 2**20 * wide.itemsize


def test_sum_records_no_history() -> None:
    assert not sum_all([torch.ones(2, requires_grad=True)], dtype=F32, device=CPU).requires_grad


def test_sum_takes_few_calls() -> None:
    """300 small tensors are copied into seven buffers: two calls for each, and two in the end."""
    with torch.profiler.profile() as record:
        sum_all([torch.ones(768) for _ in range(300)], dtype=F32, device=CPU)
    calls = [event.name for event in record.events() if event.cpu_parent is None]
    assert calls.count("aten::cat") == calls.count("aten::sum") - 1 == 8


def test_by_layout_keeps_apart_what_differs() -> None:
    tensors = [torch.ones(2), torch.ones(2, dtype=F64), torch.ones(2), torch.ones(2, 1)]
    tensors.append(torch.ones(2, device="meta"))
    assert list(by_spec(tensors).values()) == [[0, 2], [1], [3], [4]]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0, 2), (8192,), (8193,), (1, 1, 4)])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_fills(shape: tuple[int, ...], fresh: bool, count: int) -> None:
    """Each has the number everywhere and, where autograd will keep it, memory of its own."""
    like = [torch.zeros(shape) for _ in range(count)] + [torch.zeros(3, dtype=F64)]
    groups = by_spec(like)
    values = {(F32, CPU): torch.tensor(2.5), (F64, CPU): torch.tensor(0.5, dtype=F64)}
    gradients = fill_gradients(groups, values, set(groups) if fresh else set())
    assert sorted(gradients) == list(range(count + 1))
    for index, tensor in enumerate(like):
        expected = torch.full_like(tensor, 0.5 if tensor.dtype == F64 else 2.5)
        assert gradients[index].dtype == tensor.dtype
        assert gradients[index].equal(expected)
    kept = [gradients[i] for i in range(count) if gradients[i].is_contiguous()]
    kept = [gradient for gradient in kept if gradient.numel()]
    assert len({gradient.data_ptr() for gradient in kept}) == len(kept)
    size = torch.Size(shape).numel()
    memory = {gradients[index].untyped_storage().nbytes() for index in range(count)}
    if fresh and 0 < size <= 8192 and count > 1:
        assert len(kept) == count
        assert max(memory) <= 2**19
    elif size > 1:
        assert memory == {4}  # one number, expanded


def test_slices_do_not_count_changes_of_their_neighbours() -> None:
    """Else autograd would refuse a graph over one gradient once another has been clipped."""
    groups = by_spec([torch.zeros(2), torch.zeros(2)])
    first, second = fill_gradients(groups, {(F32, CPU): torch.ones(())}, set(groups)).values()
    second.mul_(2)
    assert first._version == 0
    assert first.tolist() == [1, 1]


# --- which implementation is used -------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were a CUDA device and the fused kernels had been asked for."""
    monkeypatch.setenv("MODALDUMMY_REDUCTIONS", "triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield monkeypatch
    fused_kernels.cache_clear()


def test_the_kernels_are_used_where_they_are_asked_for(asked: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from modaldummy._core import triton_kernels

    assert kernels_for(CUDA) is triton_kernels
    assert kernels_for(CPU) is None
    for wanted in ("torch", ""):
        asked.setenv("MODALDUMMY_REDUCTIONS", wanted)
        assert kernels_for(CUDA) is None
    asked.delenv("MODALDUMMY_REDUCTIONS")
    assert kernels_for(CUDA) is None


def test_an_unknown_implementation_is_refused(asked: pytest.MonkeyPatch) -> None:
    asked.setenv("MODALDUMMY_REDUCTIONS", "cuda")
    with pytest.raises(ValueError, match="must be torch or triton, got 'cuda'"):
        kernels_for(CUDA)


@pytest.mark.parametrize("where", ["is_compiling", "transforms", "capturing"])
def test_plain_torch_where_the_kernels_cannot_be(where: str, asked: pytest.MonkeyPatch) -> None:
    targets: dict[str, tuple[object, str]] = {
        "is_compiling": (torch.compiler, "is_compiling"),
        "transforms": (torch._C, "_are_functorch_transforms_active"),
        "capturing": (torch.cuda, "is_current_stream_capturing"),
    }
    asked.setattr(*targets[where], lambda: True)
    assert kernels_for(CUDA) is None


@pytest.mark.parametrize("broken", [None, SimpleNamespace(jit=lambda kernel: kernel)])
def test_plain_torch_without_triton_or_with_one_too_old(
    broken: object, asked: pytest.MonkeyPatch
) -> None:
    """Silently: the result is the same."""
    fused_kernels.cache_clear()
    asked.delitem(sys.modules, "modaldummy._core.triton_kernels", raising=False)
    asked.delattr("modaldummy._core.triton_kernels", raising=False)
    asked.setitem(sys.modules, "triton", broken)
    assert fused_kernels() is None
    assert kernels_for(CUDA) is None


def test_what_the_kernels_do_not_take_goes_to_plain_torch() -> None:
    """Each tensor is counted once."""

    def takes(tensor: Tensor) -> bool:
        return tensor.numel() == 3

    def sum_three(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        assert tensors
        assert all(map(takes, tensors))
        return torch.stack([tensor.sum(dtype=dtype) for tensor in tensors]).sum()

    stand_in = SimpleNamespace(takes=takes, sum_all=sum_three)
    sizes = [3, 4, 3, 1, 4]
    with patch.object(reduce, "kernels_for", return_value=stand_in):
        for chosen in (sizes, [3, 3], [4, 4]):
            tensors = [torch.full((size,), float(size)) for size in chosen]
            assert sum_all(tensors, dtype=F32, device=CPU).item() == sum(n * n for n in chosen)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
        ([torch.complex64], torch.float32),
        ([torch.complex128], torch.float64),
        ([torch.int64], torch.float32),
    ],
)
def test_accumulation_dtype(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert accumulation_dtype(dtypes) == expected
