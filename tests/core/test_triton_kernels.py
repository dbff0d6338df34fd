"""The fused kernels, on a GPU or in Triton's interpreter, against plain loops in float64."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import naive_dummy
from tests.strategies import FLOATS

pytest.importorskip("triton")

from modaldummy._core import reduce, triton_kernels

# Triton 3.4 with a numpy that warns about what its interpreter does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@st.composite
def lists(draw: st.DrawFn) -> list[Tensor]:
    """Up to eight tensors, contiguous, of any dtype and length, some of them slices of others."""
    tensors = []
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.sampled_from([0, 1, 2, 100, 4095, 4096, 4097, 9000, 65536, 65537, 200_000]))
        offset = draw(st.integers(0, 3))
        seed = draw(st.integers(0, 2**16))
        values = torch.randn(size + offset, generator=torch.Generator().manual_seed(seed))
        tensors.append(values.to(DEVICE, draw(st.sampled_from(FLOATS)))[offset:])
    return tensors


@given(lists(), st.sampled_from([torch.float32, torch.float64]))
def test_sums_agree_with_the_loop(tensors: list[Tensor], dtype: torch.dtype) -> None:
    tensors = [t for t in tensors if t.dtype != torch.float64 or dtype == torch.float64]
    if tensors:
        size = sum(tensor.double().abs().sum().item() for tensor in tensors)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        found = triton_kernels.sum_all(tensors, dtype)
        assert (found.dtype, found.shape, found.device) == (dtype, (), tensors[0].device)
        assert abs(found.item() - naive_dummy(tensors, 1.0).item()) <= tolerance * size


def test_the_same_bits_each_time() -> None:
    tensors = [torch.randn(size, device=DEVICE) for size in (100_000, 3, 70_000)]
    sums = {triton_kernels.sum_all(tensors, torch.float32).item() for _ in range(5)}
    assert len(sums) == 1


def test_numbers_that_are_none_stay_visible() -> None:
    for bad in (float("inf"), float("nan")):
        tensors = [torch.ones(5, device=DEVICE), torch.tensor([1.0, bad], device=DEVICE)]
        assert not triton_kernels.sum_all(tensors, torch.float32).isfinite()


# --- the table --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_tables() -> None:
    triton_kernels._table.cache_clear()


def num_tables() -> int:
    """How many tables have been made."""
    return triton_kernels._table.cache_info().misses


@given(st.lists(st.integers(0, 2**33), min_size=1, max_size=5), st.sampled_from(FLOATS))
def test_pieces_cover_each_tensor_once(lengths: list[int], dtype: torch.dtype) -> None:
    """Also tensors of more than 2**31 elements; the table alone needs no memory for them."""
    start, places = 2**40, []
    for length in lengths:
        places.append((start, length))
        start += length * dtype.itemsize + 16 * (length % 3)
    with patch.object(triton_kernels, "_PIECE", 2**28):
        pieces = triton_kernels._table.__wrapped__(tuple(places), dtype, torch.device("cpu"), 0)
    assert ((pieces[:, 1] > 0) & (pieces[:, 1] <= 2**28)).all()
    counts = [-(-length // 2**28) for length in lengths]
    assert len(pieces) == sum(counts)
    for (address, length), own in zip(places, pieces.split(counts), strict=True):
        ends = own[:, 0] + own[:, 1] * dtype.itemsize
        assert own[:, 1].sum() == length
        if length:
            assert own[0, 0] == address
            assert ends[:-1].equal(own[1:, 0])
            assert ends[-1] == address + length * dtype.itemsize


def test_a_launch_reads_wide_words_only_from_aligned_memory() -> None:
    """A piece of an aligned tensor is aligned too, so that the first address tells."""
    smallest = min(dtype.itemsize for dtype in triton_kernels._DTYPES)
    assert triton_kernels._PIECE * smallest % 16 == 0
    storage = torch.ones(100, device=DEVICE)
    tensors = [storage, storage[1:], storage[4:], storage.half(), storage.half()[1:]]
    with patch.object(triton_kernels, "_piece_sums", wraps=triton_kernels._piece_sums) as launch:
        assert triton_kernels.sum_all(tensors, torch.float32).item() == 494
    groups = [call.args[:2] for call in launch.call_args_list]
    assert sorted(len(group) for group, _ in groups) == [1, 1, 1, 2]
    for group, aligned in groups:
        assert {tensor.data_ptr() % 16 == 0 for tensor in group} == {aligned}


def test_a_table_is_kept_while_the_addresses_are() -> None:
    tensors = [torch.ones(5, device=DEVICE), torch.ones(7, device=DEVICE)]
    triton_kernels.sum_all(tensors, torch.float32)
    tensors[0].mul_(3)
    assert triton_kernels.sum_all(tensors, torch.float32).item() == 22
    assert num_tables() == 1
    triton_kernels.sum_all([*tensors, torch.ones(1, device=DEVICE)], torch.float32)
    assert num_tables() == 2


def test_memory_that_was_used_again_makes_a_new_table() -> None:
    """The same address with another length or dtype is another tensor."""
    storage = torch.ones(8, device=DEVICE)
    assert triton_kernels.sum_all([storage], torch.float32).item() == 8
    assert triton_kernels.sum_all([storage[:4]], torch.float32).item() == 4
    whole = torch.ones(100_000, device=DEVICE)
    whole[60_000:] = 3
    assert triton_kernels.sum_all([whole], torch.float32).item() == 180_000
    halves = whole.view(torch.float16)[:100_000]
    expected = halves.float().sum().item()
    assert triton_kernels.sum_all([halves], torch.float32).item() == expected


def test_tables_do_not_pile_up() -> None:
    """What has not been asked for longest goes first."""
    often, *others = torch.ones(100, device=DEVICE).split(1)
    for tensor in others:
        triton_kernels.sum_all([tensor], torch.float32)
        triton_kernels.sum_all([often], torch.float32)
    assert num_tables() == 100
    assert triton_kernels._table.cache_info().currsize == 64
    assert triton_kernels.sum_all([others[0]], torch.float32).item() == 1


TAKEN = {
    "parameter": nn.Parameter(torch.ones(2)),
    "contiguous slice": torch.ones(9)[3:],
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
}
NOT_TAKEN = {
    "transposed": torch.ones(2, 3).t(),
    "strided": torch.ones(9)[::2],
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "complex": torch.ones(2, dtype=torch.complex64),
    "integers": torch.ones(2, dtype=torch.int32),
    "negated": torch.tensor([1 + 2j]).conj().imag,
    "subclass": torch.ones(2).as_subclass(type("Own", (Tensor,), {})),
}


@pytest.mark.parametrize("name", TAKEN | NOT_TAKEN)
def test_the_kernels_take_plain_contiguous_tensors(name: str) -> None:
    """Plain torch adds the others."""
    assert triton_kernels.takes((TAKEN | NOT_TAKEN)[name]) == (name in TAKEN)


def test_the_term_is_the_same_through_the_kernels() -> None:
    """What they do not take is added by plain torch, and all of it is counted once."""
    tensors = [torch.ones(5, 3), torch.ones(5, 3).t(), torch.ones(70_000), torch.ones(2, 2)]
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    with patch.object(reduce, "kernels_for", return_value=triton_kernels):
        total = reduce.sum_all(tensors, dtype=torch.float32, device=DEVICE)
    assert total.item() == sum(tensor.numel() for tensor in tensors)


COMPILE = """
import re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modaldummy._core import triton_kernels

def ptx(kernel, signature, constants, capability):
    names = dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature | names, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

for capability in (80, 90):
    for kind in (tl.float16, tl.bfloat16, tl.float32, tl.float64):
        constants = {"KIND": kind, "ALIGNED": True, "BLOCK": triton_kernels._BLOCK}
        partial = "*fp64" if kind is tl.float64 else "*fp32"
        signature = {"pieces": "*i64", "partial": partial}
        code = ptx(triton_kernels._pieces_kernel, signature, constants, capability)
        assert re.search(r"ld\\.global\\.(v4\\.b32|v2\\.b64)", code), (capability, kind)
print("compiled")
"""


def test_the_kernels_compile_for_gpus_and_read_wide_words() -> None:
    """Triton needs no GPU to compile for one, and what it made shows whether loads are wide."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout == "compiled\n", result.stderr
