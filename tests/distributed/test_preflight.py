"""What preflight says about ranks, on one of them, is what happens between two and four."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from modaldummy import RankDisagreementError, check_ranks, preflight
from tests.fleet import Fleet
from tests.holding import NAMES
from tests.preflight.models import Model, mapped

Found = list[dict[str, Any]]  # what each rank found


def codes(**arguments: Any) -> set[str]:
    return {finding.code for finding in preflight(**arguments)}


def gradients(model: Model) -> dict[str, Any]:
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def alone(names: list[str]) -> dict[str, Any]:
    """The average over ranks, computed without any."""
    model = Model()
    torch.stack([model([name]) for name in names]).mean().backward()
    return gradients(model)


# --- FSDP2 ---------------------------------------------------------------------------------------

ZEROS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
TOWERS = [f"towers.{name}" for name in NAMES]
# Parts that are sharded by themselves before the whole is, and how.
SHARDED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "towers": (TOWERS, {}),
    "towers that stay whole": (TOWERS, {"reshard_after_forward": False}),
    "root, resharding": ([], {"reshard_after_forward": True}),
    "root": ([], {}),
}
# Names in `SHARDED`, whether zeros are reduced for what got no gradient, and whether only the trunk
# and rsfMRI are trained.
FORMS = [
    *((form, zeros, False) for form in SHARDED for zeros in (False, *[True] * ZEROS)),
    ("towers", False, True),
    ("root", False, True),
]
BATCHES = (["T1", "dMRI"], ["T1", "T1"])  # a modality for each rank


def sharded(
    rank: int, form: str, zeros: bool, frozen: bool, scale: float | None, names: list[str]
) -> dict[str, Any]:
    """What preflight finds, what `check_ranks` says, and the largest error of a gradient."""
    model: Any = Model()
    parts, options = SHARDED[form]
    for part in parts:
        fully_shard(model.get_submodule(part), **options)
    fully_shard(model, **({} if parts else options))
    for name in ("T1", "dMRI") if frozen else ():
        model.towers[name].requires_grad_(False)
    if zeros:
        model.set_reduce_scatter_unused_params(True)
    wrapper = mapped(model, scale)
    result: dict[str, Any] = {"codes": codes(wrapper=wrapper), "refusal": ""}
    try:
        check_ranks(wrapper, names[rank])
    except RankDisagreementError as error:
        result["refusal"] = str(error)
    wrapper.total(model([names[rank]]), names[rank]).backward()
    right = alone(names)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return result | {"error": max(error_of(p, right[name], rank) for name, p in trained.items())}


def error_of(parameter: Any, right: Tensor | None, rank: int) -> float:
    """The error of the gradient of this rank's half; None stands for zero."""
    half = torch.zeros_like(parameter.to_local())
    expected = half if right is None else right.chunk(2)[rank] * ratio_of_average()
    actual = half if parameter.grad is None else parameter.grad.to_local()
    return float((actual - expected).abs().max())


@functools.cache
def ratio_of_average() -> float:
    """FSDP2 averages over ranks, but between gloo ranks of torch 2.8 it only adds up."""
    model = Model()
    fully_shard(model)
    model(["T1"]).backward()
    return float((gradients(model)["trunk.bias"] / alone(["T1"])["trunk.bias"])[0])


# --- DDP -----------------------------------------------------------------------------------------


def static_graph(rank: int, scale: float | None) -> dict[str, Any]:
    """No rank has dMRI at the first step, rank 1 at the second."""
    model = Model()
    ddp = DistributedDataParallel(model, static_graph=True)
    wrapper = mapped(model, scale)
    for names in (["T1", "rsfMRI"], ["T1", "dMRI"]):
        model.zero_grad()
        wrapper.total(ddp([names[rank]]), names[rank]).backward()
    return {"codes": codes(wrapper=wrapper, model=ddp), "gradients": gradients(model)}


class Half(Model):
    def forward(self, active: Iterable[str]) -> Tensor:
        (name,) = active
        data = torch.ones(2, 3, dtype=torch.float16)
        loss: Tensor = self.trunk(self.towers[name](data)).float().square().mean()
        return loss


def averaged(rank: int, steps: int, reduced_once: bool) -> dict[str, Any]:
    """What becomes of the dummy gradient of a float16 tower."""
    model = Half().half()
    ddp = DistributedDataParallel(model)
    wrapper = mapped(model)
    findings = preflight(wrapper, model=ddp, accumulation_steps=steps)
    for step in range(steps):
        ddp.require_backward_grad_sync = not reduced_once or step == steps - 1
        (wrapper.total(ddp(["T1"]), "T1") / steps).backward()
    return {"findings": findings, "gradient": model.towers["dMRI"].bias.grad}


AVERAGES = [(steps, once) for steps in (1, 4) for once in (False, True)]


def on_two(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"static {scale}": static_graph(rank, scale) for scale in (None, 0.0)}
    for form in FORMS:
        for scale in (0.0, None):
            for names in BATCHES:
                found[f"{form} {scale} {names}"] = sharded(rank, *form, scale, names)
    return found | on_four(rank)


def on_four(rank: int) -> dict[str, Any]:
    return {f"average {steps} {once}": averaged(rank, steps, once) for steps, once in AVERAGES}


@pytest.fixture(scope="module")
def two(fleets: Callable[[int], Fleet]) -> Found:
    return fleets(2).ask(on_two)


@pytest.fixture(scope="module")
def four(fleets: Callable[[int], Fleet]) -> Found:
    return fleets(4).ask(on_four)


def test_a_static_graph_leaves_gradients_of_none_unreduced(two: Found) -> None:
    """Rank 1 goes on with a gradient that rank 0 does not have; with a scale of 0 both have it."""
    right, name = alone(["T1", "dMRI"]), "towers.dMRI.weight"
    first, second = (found["static None"] for found in two)
    assert first["codes"] == second["codes"] == {"MD102"}
    assert first["gradients"][name] is None
    assert torch.equal(second["gradients"][name], 2 * right[name])
    for found in two:
        assert found["static 0.0"]["codes"] == set()
        assert torch.allclose(found["static 0.0"]["gradients"][name], right[name], atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scale", [0.0, None])
@pytest.mark.parametrize("names", BATCHES, ids=["different", "the same"])
def test_what_is_refused_is_wrong_and_nothing_else_is(
    two: Found, form: tuple[str, bool, bool], scale: float | None, names: list[str]
) -> None:
    """Ranks may differ in what one unit gathers, if parameters without a gradient are reduced too.

    Either by a dummy, which needs the parameters as a whole and a scale, or by zeros.
    """
    name, zeros, frozen = form
    alike = name.startswith("root")
    reduced = zeros or (name == "root" and scale is not None)
    wrong = names[0] != names[1] and not (alike and (reduced or frozen))
    results = [found[f"{form} {scale} {names}"] for found in two]
    for result in results:
        assert result["codes"] == (set() if alike and reduced else {"MD104"})
        assert (result["error"] > 1e-3) == wrong, result
        assert bool(result["refusal"]) == wrong
    assert results[0]["refusal"] == results[1]["refusal"]


@pytest.mark.parametrize(("steps", "once"), AVERAGES)
@pytest.mark.parametrize("number", [2, 4])
def test_the_average_rounds_as_it_says(
    two: Found, four: Found, number: int, steps: int, once: bool
) -> None:
    for found in two if number == 2 else four:
        result = found[f"average {steps} {once}"]
        codes = [finding.code for finding in result["findings"]]
        assert codes == (["MD137"] if (number, steps) != (2, 1) else [])
        if codes and once:
            (finding,) = result["findings"]
            assert finding.evidence["ranks"] == number
            assert finding.evidence["if_reduced_once"] == {"float16": result["gradient"][0].item()}
        else:
            assert bool(result["gradient"].any()) == (not codes)
