"""Norms of many tensors at once, against the plain loop in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaldummy._core.reduce import accumulation_dtype
from modaldummy._monitor.tensor_norms import tensor_norms
from tests.oracles import naive_norm
from tests.strategies import parameters

CPU, META = torch.device("cpu"), torch.device("meta")
F64 = torch.float64


def test_norms_of_nothing() -> None:
    assert tensor_norms([], device=META).device == META


def test_norms_go_where_they_are_wanted() -> None:
    tensors = [torch.ones(3), torch.ones(3, device=META)]
    assert tensor_norms(tensors, device=META).device == META


@given(st.lists(parameters(), max_size=6))
def test_norms_agree_with_the_loop(tensors: list[torch.nn.Parameter]) -> None:
    found = tensor_norms(tensors, device=CPU)
    assert found.dtype == accumulation_dtype(tensor.dtype for tensor in tensors)
    assert found.shape == (len(tensors),)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([naive_norm(t) for t in tensors], rel=1e-5)


def test_norms_keep_their_order_whatever_the_layouts() -> None:
    sizes = [3, 5, 3, 0, 5, 9000, 3]
    tensors = [torch.full((size,), float(index)) for index, size in enumerate(sizes)]
    expected = [index * size**0.5 for index, size in enumerate(sizes)]
    assert tensor_norms(tensors, device=CPU).tolist() == pytest.approx(expected, rel=1e-6)


def test_norms_of_conjugates() -> None:
    conjugate = torch.tensor([3 + 4j]).conj()
    assert tensor_norms([conjugate], device=CPU).tolist() == [5.0]
