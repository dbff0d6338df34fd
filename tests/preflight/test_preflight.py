"""`preflight` finds what is wrong, names it, and changes nothing."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import modaldummy
from modaldummy import preflight
from tests.asserts import assert_same_bits
from tests.holding import assert_same_state
from tests.preflight.cases import HEALTHY, SICK, Arguments, Sick, needs_group
from tests.preflight.models import Model, mapped

ROOT = Path(__file__).parents[2]
# What these say is also the text of an error, and may have several sentences.
WORDS_OF_ERRORS = {"MD101", "MD104", "MD105", "MD106"}


@pytest.fixture
def arguments(request: pytest.FixtureRequest) -> Arguments:
    """The arguments of `preflight` for one case."""
    name = request.param
    if needs_group(name):
        request.getfixturevalue("process_group")
    return SICK[name].build() if name in SICK else HEALTHY[name]()


@pytest.mark.parametrize(("arguments", "case"), SICK.items(), indirect=["arguments"], ids=SICK)
def test_what_is_wrong_is_found_and_nothing_else(arguments: Arguments, case: Sick) -> None:
    """It has one sentence, evidence that JSON can represent, and a remedy."""
    findings = preflight(**arguments)
    assert {f"{finding.code} {finding.severity}" for finding in findings} == {case.finding}
    for part in case.text.split("..."):
        assert part in f"{findings[0]} {findings[0].evidence}"
    for finding in findings:
        assert re.fullmatch(r"[A-Z].*[^.]\.", finding.message)
        if finding.code not in WORDS_OF_ERRORS:
            assert not re.search(r"[a-z)]\. [A-Z]", finding.message), "more than one sentence"
        assert finding.remedy.endswith(".")
        assert finding.evidence
        assert json.loads(json.dumps(finding.evidence, allow_nan=False)) == finding.evidence


@pytest.mark.parametrize("arguments", HEALTHY, indirect=True)
def test_nothing_is_found_in_a_healthy_setup(arguments: Arguments) -> None:
    assert preflight(**arguments) == []


def test_every_finding_has_a_case_and_its_severities_in_the_reference() -> None:
    checks = Path(modaldummy.__file__).parent.glob("_preflight/check_*.py")
    in_source = {code for path in checks for code in re.findall(r'"(MD\d{3})"', path.read_text())}
    in_cases = {case.finding for case in SICK.values()}
    page = (ROOT / "docs/reference/preflight.md").read_text()
    rows = re.findall(r"^\| \[(MD\d{3})\]\([^)]+\) \| ([a-z, ]+) \|", page, re.M)
    assert in_source == {code for code, _ in rows}
    assert in_cases == {f"{code} {name}" for code, names in rows for name in names.split(", ")}


# --- nothing is changed --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [*SICK, *HEALTHY], indirect=True)
def test_nothing_is_changed(arguments: Arguments) -> None:
    """Values, gradients, optimizers, the report and the state of the random numbers."""
    wrapper, model = arguments["wrapper"], arguments["wrapper"].parameters.model
    optimizers = arguments.get("optimizer", [])
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    last = wrapper.last
    parameters = dict(model.named_parameters())
    versions = [p._version for p in parameters.values()]
    gradients = [p.grad for p in parameters.values()]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    random = torch.get_rng_state()
    preflight(**arguments)
    assert wrapper.last is last
    assert all(p is q for p, q in zip(parameters.values(), model.parameters(), strict=True))
    assert [p._version for p in parameters.values()] == versions
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for optimizer, state in zip(optimizers, states, strict=True):
        assert_same_state(optimizer.state_dict()["state"], state["state"], "state")
        assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(torch.get_rng_state(), random)


class Noisy(SGD):
    """Draws random numbers in each step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.rand_like(parameter))


def test_an_optimizer_that_draws_random_numbers_draws_the_same_afterwards() -> None:
    model = Model()
    before = torch.get_rng_state()
    assert preflight(model.wrapper(), Noisy(model.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_graph_can_be_used_afterwards() -> None:
    """Backward gives the same gradients after `preflight` as without it."""
    model = Model()
    gradients: list[list[Tensor | None]] = []
    for check in (preflight, lambda *_, **__: None):
        model.zero_grad()
        wrapper = mapped(model)
        loss = model.total(wrapper, "T1")
        check(wrapper, AdamW(model.parameters()), loss=loss)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(ours, theirs, "gradient")


# --- arguments -----------------------------------------------------------------------------------

# One wrong value for each validator, which has its own tests, and all that `optimizer` refuses.
WRONG: list[tuple[str, Any, str]] = [
    ("wrapper", nn.Linear(1, 1), "`wrapper`"),
    ("model", [nn.Linear(1, 1)], "`model` must be"),
    ("model", nn.Linear(1, 1), "`model`.*shares no parameter"),
    ("loss", 0.5, "`loss`"),
    ("scaler", "dynamic", "`scaler` must be .* above 0, a torch.amp.GradScaler or None"),
    ("max_norm", 0, "`max_norm` must be .* above 0 or None"),
    ("accumulation_steps", 0, "`accumulation_steps` must be 1 or more"),
    ("optimizer", SGD, "`optimizer` must be a torch.optim.Optimizer, .*SGD"),
    ("optimizer", "SGD", "`optimizer`.*'SGD'"),
    ("optimizer", torch.ones(2), "`optimizer`.*shape .2."),
    ("optimizer", [nn.Parameter(torch.ones(2))], "`optimizer`.*a Parameter of shape .2."),
    ("optimizer", [], "`optimizer` is empty. Leave it out"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_wrong_arguments(argument: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        preflight(**{"wrapper": Model().wrapper(), argument: value})


def test_any_iterable_of_optimizers_will_do() -> None:
    model = Model()
    parts = (model.towers, model.trunk)
    assert preflight(model.wrapper(), (SGD(part.parameters(), lr=0.1) for part in parts)) == []
