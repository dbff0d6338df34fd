"""`preflight` finds what is wrong, names it, and changes nothing."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import modaldummy
from modaldummy import Finding, preflight
from tests.asserts import assert_same_bits
from tests.holding import assert_same_state
from tests.preflight.cases import HEALTHY, NEEDS_GROUP, SICK
from tests.preflight.models import Model, mapped

ROOT = Path(__file__).parents[2]
SEVERITIES = {
    "error": {
        *("MD101", "MD102", "MD103", "MD105", "MD106", "MD111", "MD114", "MD115"),
        *("MD120", "MD121", "MD136", "MD143"),
    },
    "warning": {
        *("MD104", "MD105", "MD107", "MD111", "MD112", "MD117", "MD118", "MD121"),
        *("MD122", "MD132", "MD133", "MD135", "MD137", "MD141"),
    },
    "info": {"MD113", "MD116", "MD117", "MD119", "MD131", "MD134", "MD142"},
}
# What these say is also the text of an error.
WORDS_OF_ERRORS = {"MD101", "MD104", "MD105", "MD106"}


@pytest.fixture
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of `preflight` for one case."""
    name = request.param
    if name in NEEDS_GROUP:
        request.getfixturevalue("process_group")
    made: dict[str, Any] = SICK[name][1]() if name in SICK else HEALTHY[name]()
    return made


cases = pytest.mark.parametrize("arguments", [*SICK, *HEALTHY], indirect=True)
sick = pytest.mark.parametrize(
    ("arguments", "codes"),
    [(name, SICK[name][0]) for name in SICK],
    indirect=["arguments"],
    ids=SICK,
)


@sick
def test_what_is_wrong_is_found_and_nothing_else(
    arguments: dict[str, Any], codes: set[str]
) -> None:
    assert {finding.code for finding in preflight(**arguments)} == codes


@pytest.mark.parametrize("arguments", HEALTHY, indirect=True)
def test_nothing_is_found_in_a_setup_in_order(arguments: dict[str, Any]) -> None:
    assert preflight(**arguments) == []


@sick
def test_findings_have_the_form_of_findings(arguments: dict[str, Any], codes: set[str]) -> None:
    """One sentence, a known severity, evidence for JSON, and a remedy.

    Messages about engines have several sentences, because errors use the same words.
    """
    for finding in preflight(**arguments):
        assert finding.code in SEVERITIES[finding.severity]
        assert re.fullmatch(r"[A-Z].*[^.]\.", finding.message)
        if finding.code not in WORDS_OF_ERRORS:
            assert not re.search(r"[a-z)]\. [A-Z]", finding.message), "more than one sentence"
        assert finding.remedy.endswith(".")
        assert finding.evidence
        assert json.loads(json.dumps(finding.evidence, allow_nan=False)) == finding.evidence


# Words that message, evidence and remedy must contain, by case and code.
NAMED: dict[tuple[str, str], list[str]] = {
    ("DDP that looks for unused parameters", "MD101"): [
        *("ready only once", "Model", "find_unused_parameters=False", "static_graph=True"),
        *("not None", "attribute"),
    ],
    ("static graph without gradients", "MD102"): ["static_graph=True", "scale=0.0"],
    ("sparse table without gradients in DDP", "MD103"): ["towers.dMRI.weight", "scale=0.0"],
    ("FSDP2, one tower and no root", "MD104"): [
        *("towers.T1.bias", "same modalities", "fully_shard", "`ModalityBatchSampler`"),
        "`check_ranks`",
    ],
    ("FSDP2, a root that reshards", "MD104"): [
        *("towers.dMRI.bias", "has resharded", "set_reduce_scatter_unused_params(True)"),
    ],
    ("FSDP2, no gradients", "MD104"): ["towers.dMRI.bias", "scale=None", "scale=0.0"],
    ("ZeRO-2", "MD105"): ["Engine", "zero_optimization_stage=2", "ZeRO-1", "towers.T1.bias"],
    ("ZeRO-2, no gradients", "MD105"): ["MD105 error", "first inactive", "scale=0.0"],
    ("ZeRO-1 that overlaps", "MD105"): ["zero_optimization_stage=1", "`overlap_comm`"],
    ("ZeRO-1, no gradients", "MD105"): ["zero_optimization_stage=1", "scale=0.0"],
    ("partitioned by DeepSpeed", "MD105"): ["towers.dMRI.weight", "`model=engine`"],
    ("ZeRO-3", "MD106"): ["Engine", "zero_optimization_stage=3", "ZeRO-1", "towers.T1.bias"],
    ("partitioned by ZeRO-3", "MD106"): ["towers.dMRI.weight", "Use ZeRO-1"],
    ("compiled, four modalities", "MD107"): ["15", "after 8", "recompile_limit = 15"],
    ("head that no batch uses", "MD111"): ["head.weight", "head.bias", "tuple of modalities"],
    ("the same in DDP", "MD111"): ["head.weight", "Expected to have finished reduction"],
    ("head that no optimizer has", "MD112"): ["trunk.0.weight", "2 of 10"],
    ("frozen tower", "MD113"): ["dMRI"],
    ("NaN in a tower", "MD114"): ["towers.dMRI.weight"],
    ("all towers on meta", "MD115"): ["towers.T1.weight", "gradient_only=True"],
    ("one tower on another device", "MD116"): ["meta", "cpu"],
    ("weight of two towers", "MD117"): ["towers.T1.weight", "T1", "dMRI"],
    ("one tower for two modalities", "MD117"): [
        "towers.T1.weight",
        "nothing else that is trainable belongs to T1, dMRI",
    ],
    ("weight of a tower and the trunk", "MD118"): ["towers.T1.weight", "Leave them out"],
    ("sparse table", "MD119"): ["towers.dMRI.weight"],
    ("loss made of a number", "MD120"): ["has no graph", ".item()", "requires_grad=False"],
    ("loss of another model", "MD120"): ["reaches no trainable", "trainable=8"],
    ("real loss in place of the total", "MD121"): ["dMRI.bias", "inactive", "wrapper.total"],
    ("part of a tower that forward leaves out", "MD121"): ["towers.T1.extra.bias", "Freeze"],
    ("the same in DDP, part of a tower", "MD121"): ["Expected to have finished reduction"],
    ("name that is misspelt in the map", "MD122"): ["leaves dmri", "towers.dMRI.bias", "misspelt"],
    ("name that is misspelt in a tuple of the map", "MD122"): ["T1-dmri", "trunk.0.weight"],
    ("scale 0.0", "MD131"): ["scale=0.0"],
    ("scale of a real gradient", "MD132"): ["0.001", "1e-7"],
    ("scale below float16", "MD133"): ["float16", "1e-08", "5.96"],
    ("sum that is large", "MD134"): ["capped to 0.0001", "assumed"],
    ("sum that is large for the last loss", "MD134"): ["loss=0.5", "wrapper.last"],
    ("norm that is tight for float16", "MD135"): ["float16", "max_norm=0.1", "assumed"],
    ("norm that is tight for these gradients", "MD135"): ["float16", "gradients", "total_norm=7"],
    ("scaler that float16 cannot take", "MD136"): ["float16", "4.295e+09"],
    ("float16 on four ranks", "MD137"): ["float16", "4 ranks", "no_sync()"],
    ("AdamW", "MD141"): ["AdamW", "T1", "dMRI", "up to 0.9 ", "hold_inactive(wrapper, optimizer)"],
    ("LBFGS", "MD142"): ["LBFGS", "TypeError", "closure"],
    ("FSDP2, between forward and backward", "MD142"): ["AdamW", "without `loss`"],
    ("optimizer for each tower, no gradients", "MD143"): ["SGD", "No inf checks", "scale=0.0"],
}


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [(name, code, parts) for (name, code), parts in NAMED.items()],
    indirect=["arguments"],
    ids=[f"{code}: {name}" for name, code in NAMED],
)
def test_findings_name_what_it_is_about(
    arguments: dict[str, Any], code: str, parts: list[str]
) -> None:
    finding = next(one for one in preflight(**arguments) if one.code == code)
    for part in parts:
        assert part in f"{finding} {finding.evidence}", f"{part!r} is not in {finding}"


def test_every_code_is_tested_and_documented() -> None:
    checks = Path(modaldummy.__file__).parent.glob("_preflight/check_*.py")
    source = "".join(path.read_text() for path in checks)
    page = (ROOT / "docs/reference/preflight.md").read_text()
    codes = sorted(set(re.findall(r'"(MD1\d\d)"', source)))
    assert codes == sorted(set.union(*(expected for expected, _ in SICK.values())))
    assert codes == re.findall(r"^\| \[(MD\d+)\]", page, re.M), "the table"
    assert codes == re.findall(r"^## (MD\d+): ", page, re.M), "the sections"
    assert set(codes) == {code for _, code in NAMED}
    for code in codes:
        severities = {name for name, known in SEVERITIES.items() if code in known}
        (cell,) = re.findall(rf"^\| \[{code}\]\([^)]+\) \| ([a-z, ]+) \|", page, re.M)
        assert set(cell.split(", ")) == severities, code


def test_errors_come_first() -> None:
    model = Model()
    model.towers["T1"].requires_grad_(False)
    nn.init.constant_(model.towers["dMRI"].bias, torch.nan)
    findings = preflight(mapped(model), AdamW(model.parameters(), lr=0.1))
    assert [finding.code for finding in findings] == ["MD114", "MD141", "MD113"]
    assert all(isinstance(finding, Finding) for finding in findings)


# --- nothing is changed --------------------------------------------------------------------------


class Noisy(SGD):
    """Draws random numbers in each step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.rand_like(parameter))


@cases
def test_nothing_is_changed(arguments: dict[str, Any]) -> None:
    """Values, gradients, optimizers, the report and the state of the random numbers."""
    wrapper, model = arguments["wrapper"], arguments["wrapper"].parameters.model
    optimizers = arguments.get("optimizer", [])
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    last, observers = wrapper.last, list(wrapper._observers)
    parameters = dict(model.named_parameters())
    versions = [p._version for p in parameters.values()]
    gradients = [p.grad for p in parameters.values()]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    random = torch.get_rng_state()
    preflight(**arguments)
    assert wrapper.last is last
    assert wrapper._observers == observers
    assert all(p is q for p, q in zip(parameters.values(), model.parameters(), strict=True))
    assert [p._version for p in parameters.values()] == versions
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for optimizer, state in zip(optimizers, states, strict=True):
        assert_same_state(optimizer.state_dict()["state"], state["state"], "state")
        assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(torch.get_rng_state(), random)


def test_an_optimizer_that_draws_random_numbers_draws_the_same_afterwards() -> None:
    model = Model()
    optimizer = Noisy(model.parameters(), lr=0.1)
    before = torch.get_rng_state()
    assert [finding.code for finding in preflight(model.wrapper(), optimizer)] == ["MD141"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", ["plain SGD", "AdamW, held"], indirect=True)
def test_the_graph_can_be_used_afterwards(arguments: dict[str, Any]) -> None:
    """Backward gives the same gradients after `preflight` as without it."""
    model = arguments["wrapper"].parameters.model
    gradients: list[list[Tensor | None]] = []
    for check in (preflight, lambda **_: None):
        model.zero_grad()
        loss = arguments["wrapper"].total(model(["T1"]), "T1")
        check(**arguments, loss=loss)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(ours, theirs, "gradient")


# --- arguments -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Model], dict[str, Any]], type[Exception], list[str]]] = {
    "no wrapper": (lambda m: {"wrapper": m}, TypeError, ["`wrapper`", "a Model module"]),
    "no optimizer": (
        lambda m: {"optimizer": 3},
        TypeError,
        ["`optimizer` must be a torch.optim.Optimizer", "3 (int)"],
    ),
    "its class": (lambda m: {"optimizer": SGD}, TypeError, ["`optimizer`", "SGD"]),
    "its name": (lambda m: {"optimizer": "SGD"}, TypeError, ["`optimizer`", "'SGD'"]),
    "parameters": (
        lambda m: {"optimizer": m.parameters()},
        TypeError,
        ["`optimizer`", "a Parameter of shape [4, 3]"],
    ),
    "a tensor": (lambda m: {"optimizer": torch.ones(2)}, TypeError, ["`optimizer`", "[2]"]),
    "empty list": (lambda m: {"optimizer": []}, ValueError, ["`optimizer` is empty. Leave it out"]),
    "no model": (lambda m: {"model": [m]}, TypeError, ["`model` must be a torch.nn.Module"]),
    "another model": (
        lambda m: {"model": nn.Linear(1, 1)},
        ValueError,
        ["`model` (Linear) shares no parameter", "(Model)"],
    ),
    "a number as loss": (lambda m: {"loss": 0.5}, TypeError, ["`loss`", "0.5 (float)"]),
    "no scaler": (
        lambda m: {"scaler": "dynamic"},
        TypeError,
        ["`scaler` must be a torch.amp.GradScaler, a number or None", "'dynamic'"],
    ),
    "bool as scaler": (lambda m: {"scaler": True}, TypeError, ["`scaler`", "True (bool)"]),
    "factor of 0": (lambda m: {"scaler": 0}, ValueError, ["`scaler` must be positive", "0 (int)"]),
    "factor of NaN": (lambda m: {"scaler": torch.nan}, ValueError, ["`scaler`", "nan (float)"]),
    "norm of -1": (lambda m: {"max_norm": -1}, ValueError, ["`max_norm` must be positive", "-1"]),
    "no norm": (
        lambda m: {"max_norm": "1"},
        TypeError,
        ["`max_norm` must be a number or None", "'1'"],
    ),
    "half a step": (
        lambda m: {"accumulation_steps": 0.5},
        TypeError,
        ["`accumulation_steps` must be an int", "0.5 (float)"],
    ),
    "true steps": (lambda m: {"accumulation_steps": True}, TypeError, ["True (bool)"]),
    "no steps": (
        lambda m: {"accumulation_steps": 0},
        ValueError,
        ["`accumulation_steps` must be 1 or more, got 0"],
    ),
}


@pytest.mark.parametrize(("make", "kind", "parts"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(
    make: Callable[[Model], dict[str, Any]], kind: type[Exception], parts: list[str]
) -> None:
    model = Model()
    with pytest.raises(kind) as error:
        preflight(**{"wrapper": model.wrapper(), **make(model)})
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


def test_any_iterable_of_optimizers_will_do() -> None:
    model = Model()
    parts = (model.towers, model.trunk)
    assert preflight(model.wrapper(), (SGD(part.parameters(), lr=0.1) for part in parts)) == []
    assert preflight(model.wrapper(), max_norm=float("inf"), scaler=2) == []
