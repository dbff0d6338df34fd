"""Sums over many tensors at once, against the plain loop in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._reduce import accumulation_dtype, sum_all
from tests.oracles import naive_dummy, naive_magnitude
from tests.strategies import parameters

CPU = torch.device("cpu")


@given(st.lists(parameters(), max_size=6))
def test_sum_agrees_with_the_loop(tensors: list[torch.nn.Parameter]) -> None:
    expected = naive_dummy(tensors, 1.0).item()
    size = naive_magnitude(tensors, 1.0)
    total = sum_all(tensors, dtype=torch.float32, device=CPU)
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=0, abs=1e-5 * size)


def test_sum_of_nothing_is_zero() -> None:
    assert sum_all([], dtype=torch.float32, device=CPU).item() == 0
    assert sum_all([torch.empty(0, 3)], dtype=torch.float32, device=CPU).item() == 0


def test_sum_records_no_history() -> None:
    assert not sum_all(
        [torch.ones(2, requires_grad=True)], dtype=torch.float32, device=CPU
    ).requires_grad


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
