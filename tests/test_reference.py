"""The tables of the reference are what the code does, row by row."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, prune

from modaldummy import ParameterMapError, active_modalities
from modaldummy._core.reduce import accumulation_dtype
from modaldummy._core.term import product_without_underflow
from tests.asserts import assert_bounded
from tests.zoo import Pair, holder

REFERENCE = Path(__file__).parents[1] / "docs/reference"


def rows(page: str, heading: str) -> list[list[str]]:
    """The rows, without its head, of the tables under a heading."""
    section = (REFERENCE / page).read_text().partition(f"# {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.+) \|$", section, re.M)[1:]
    return [line.split(" | ") for line in lines]


DTYPES = rows("dtypes-and-parameters.md", "By dtype of the parameter")
KINDS = rows("dtypes-and-parameters.md", "By kind of parameter")


FORMS = rows("batch-metadata.md", "What a batch may look like")
MISSING = rows("batch-metadata.md", "Missing values")


@pytest.mark.parametrize("row", FORMS + MISSING, ids=str)
def test_forms_of_metadata(row: list[str]) -> None:
    _, example, active = row
    names = {"torch": torch, "np": np, "nan": math.nan, "x": torch.ones(2), "y": torch.ones(2)}
    expected = () if active == "none" else tuple(active.split(", "))
    assert active_modalities(eval(example.strip("`"), names), ["T1", "rsfMRI", "dMRI"]) == expected


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_tables_are_whole() -> None:
    """Every dtype that torch differentiates has a row, and every row can be read."""
    listed = [getattr(torch, name) for row in DTYPES for name in names(row[0])]
    differentiable = {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    }
    # Left out: complex32, which torch calls experimental, and formats for scales and storage,
    # which hold no weights.
    storage = {dtype for dtype in differentiable if re.search("complex32|e8m0|e2m1", str(dtype))}
    assert set(listed) == differentiable - storage
    assert len(KINDS) == 22
    assert {len(row) for row in DTYPES + KINDS} == {4}


@pytest.mark.parametrize("row", DTYPES, ids=lambda row: str(row[0]))
def test_dtypes(row: list[str]) -> None:
    for name in names(row[0]):
        dtype = getattr(torch, name)
        parameter = torch.ones(3).to(dtype)
        if row[1:] == ["refused"] * 3:
            with pytest.raises(ParameterMapError):
                Pair(holder(weight=parameter)).wrapper()
            continue
        least = product_without_underflow(torch.tensor(1.0), 1e-310, dtype)
        assert least.dtype == dtype
        assert least.item() == eval(row[1].strip("`"))
        assert str(accumulation_dtype([dtype])) == f"torch.{row[2].strip('`')}"
        assert row[3] == "kept"
        model = Pair(holder(weight=parameter * 1000))
        wrapper = model.wrapper(1.0)
        model.step(wrapper)
        assert wrapper.last is not None
        assert wrapper.last.uncapped.item() == 3000
        assert wrapper.last.dummy.dtype == accumulation_dtype([dtype])
        assert wrapper.last.dummy != 0
        assert_bounded(wrapper.last)


class Labelled(Tensor):
    """A tensor subclass of its own name."""


def tied(table: nn.Embedding, head: nn.Linear) -> nn.Module:
    head.weight = table.weight
    return nn.Sequential(table, head)


def observed(model: Pair) -> tuple[str, str]:
    """What the dummy term adds up, and what gradient the parameters of `b` end with."""
    try:
        wrapper = model.wrapper()
    except ParameterMapError:
        return ("error when made",) * 2
    expected = sum(
        float(p.detach().real.double().sum()) for p in model.b.parameters() if is_readable(p)
    )
    try:
        model.step(wrapper)
    except ParameterMapError:
        return ("error at the call",) * 2
    assert wrapper.last is not None
    uncapped = wrapper.last.uncapped.item()
    is_sum = expected != 0 and uncapped == pytest.approx(1e-7 * expected, rel=1e-5)
    value = "sum" if is_sum else "nothing" if not uncapped or math.isnan(uncapped) else "?"
    assert value == "sum" or wrapper.last.dummy == 0
    (gradient,) = {kind_of_gradient(p, model) for p in model.b.parameters()}
    return value, gradient


def is_readable(parameter: Tensor) -> bool:
    return not parameter.is_meta and not isinstance(parameter, nn.UninitializedParameter)


def kind_of_gradient(parameter: Tensor, model: Pair) -> str:
    gradient = parameter.grad
    if gradient is None:
        return "none"
    if gradient.is_sparse:
        assert gradient._nnz() == 0
        return "empty, sparse"
    assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if torch.equal(local, torch.full_like(local, 1e-7)):
        return "dense"
    (real,) = torch.autograd.grad(model(), [parameter], allow_unused=True)
    return "the real one" if real is not None and torch.equal(local, real) else "another"


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("row", KINDS, ids=lambda row: str(row[0]))
def test_kinds_of_parameters(row: list[str]) -> None:
    model = Pair(nn.Module())
    names: dict[str, Any] = {"mesh": init_device_mesh("cpu", (1,)), "a": model.a, "torch": torch}
    names |= {"nn": nn, "tied": tied, "Labelled": Labelled, "DTensor": DTensor}
    names |= {"parametrizations": parametrizations, "prune": prune}
    made = eval(row[1].strip("`"), names)
    if not isinstance(made, nn.Module):
        weight = made if isinstance(made, nn.Parameter) else nn.Parameter(made)
        made = nn.Module()
        made.weight = weight
    model.b = made
    assert observed(model) == tuple(row[2:])
