"""Gradients under DeepSpeed are those of one process, or what goes wrong is said."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from modaldummy import (
    DummyLossWrapper,
    MissingGradientError,
    RankDisagreementError,
    UnsupportedEngineError,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)
from tests.distributed.oracle import (
    MAP,
    NAMES,
    Model,
    Outcome,
    Run,
    Schedule,
    batch_of,
    loss_of,
    verdict,
)
from tests.distributed.schedules import check_schedules
from tests.distributed.test_table import AGREE, check_row, rows
from tests.fleet import Fleet

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

from tests.distributed.deepspeed_engines import (
    AGREEING,
    COMPLETE,
    DIFFERING,
    ENGINES,
    LR,
    SHADOWED,
    deepspeed_on_cpus,
    num_micros,
    outcome,
    outcome_with_shadow,
)

FLEET = "DeepSpeed"
PAGE = Path(__file__).parents[2] / "docs/how-to/deepspeed.md"
# Towers of one shape, so that what is mixed up fits.
TOWERS: Schedule = (((("T1",), ("rsfMRI",)),),)
# What `make test` runs of the engines with a shadow.
CORE = {"ZeRO-2, small buckets", "ZeRO-3, overlapping"}


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_read_right(two: Fleet, engine: str) -> None:
    """Nothing is inactive here, so that the wrapper adds nothing."""
    _, micros = num_micros(engine)
    schedule: Schedule = (((NAMES,) * 2,) * micros,) * 2
    for found in two.ask(outcome, engine, 1e-7, schedule):
        assert found.worst <= 1, found


@pytest.mark.long
@pytest.mark.parametrize("engine", DIFFERING)
def test_gradients_are_the_average_over_ranks(fleet: Fleet, engine: str) -> None:
    check_zero(fleet, engine, (1e-7, 0.0))


@pytest.mark.long
@pytest.mark.parametrize("engine", COMPLETE)
def test_gradients_are_the_average_where_all_towers_count(fleet: Fleet, engine: str) -> None:
    """There is no dummy term then."""
    check_zero(fleet, engine, (0.0,))


@pytest.mark.long
@pytest.mark.parametrize("engine", AGREEING)
def test_gradients_are_the_average_over_ranks_that_agree(fleet: Fleet, engine: str) -> None:
    check_zero(fleet, engine, (1e-7, 0.0), agreeing=True)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=[pytest.mark.long] * (name not in CORE)) for name in SHADOWED],
)
def test_with_a_shadow_ranks_may_differ(two: Fleet, engine: str) -> None:
    check_zero(two, engine, (1e-7, 0.0, None), outcome_with_shadow)


def check_zero(
    fleet: Fleet,
    engine: str,
    scales: tuple[float | None, ...],
    of: Callable[..., Outcome] = outcome,
    **options: Any,
) -> None:
    least, most = num_micros(engine)
    options |= {"min_micros": least, "max_micros": most}
    num_examples = 20 // fleet.num_ranks
    check_schedules(fleet, of, engine, scales, num_examples=num_examples, agree=True, **options)


REFUSED = [
    ("ZeRO-1", None, "Use scale=0.0"),
    ("ZeRO-1, overlapping", 1e-7, "use ZeRO-1 without `overlap_comm`"),
    ("ZeRO-2", 1e-7, "use ZeRO-1 without `overlap_comm`"),
    ("ZeRO-2, overlapping", 0.0, "use ZeRO-1 without `overlap_comm`"),
    ("ZeRO-3", 1e-7, "Use ZeRO-1"),
]


@pytest.mark.long
@pytest.mark.parametrize(("engine", "scale", "remedy"), REFUSED)
def test_divergent_ranks_are_refused_on_all_of_them(
    fleet: Fleet, engine: str, scale: float | None, remedy: str
) -> None:
    """With the same error, before any collective that could mismatch."""
    schedule: Schedule = ((tuple(("T1",) if r else ("dMRI",) for r in range(fleet.num_ranks)),),)
    first, *others = fleet.ask(refusal, engine, scale, schedule)
    assert remedy in first
    assert others == [first] * (fleet.num_ranks - 1)


def refusal(rank: int, engine: str, scale: float | None, schedule: Schedule) -> str:
    with pytest.raises(RankDisagreementError) as caught:
        outcome(rank, engine, scale, schedule, agree=True)
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "scale"), [("ZeRO-1", None), ("ZeRO-1, overlapping", 1e-7), ("ZeRO-2", 1e-7)]
)
def test_what_is_refused_would_be_wrong(two: Fleet, engine: str, scale: float | None) -> None:
    for found in two.ask(outcome, engine, scale, TOWERS):
        assert found.worst > 1000, found
        assert found.error > 0.1 * found.largest


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("ZeRO-1, overlapping", "has no attribute 'view'"),
        ("ZeRO-2", "has no attribute 'view'"),
        ("ZeRO-3, gathered", "has no attribute 'numel'"),
    ],
)
def test_upstream_stops_where_a_parameter_gets_no_gradient(
    two: Fleet, engine: str, words: str
) -> None:
    for text in two.ask(ending, engine, None, AGREE):
        assert words in text


@pytest.mark.long
def test_upstream_stops_where_micro_batches_differ_and_communication_overlaps(two: Fleet) -> None:
    schedule: Schedule = (((("T1",),) * 2, (("dMRI",),) * 2),)
    for text in two.ask(ending, "ZeRO-1, overlapping, two micro-batches", 1e-7, schedule):
        assert "Gradient computed twice" in text


def ending(rank: int, engine: str, scale: float | None, schedule: Schedule) -> str:
    """The error in which a schedule ends."""
    try:
        return f"finished: {outcome(rank, engine, scale, schedule)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_zero_3_refuses_a_dummy_for_what_it_has_in_parts(two: Fleet) -> None:
    for text in two.ask(ending, "ZeRO-3", 1e-7, AGREE):
        assert text.startswith(
            "UnsupportedEngineError: ZeRO-3 has released the parameter 'module.towers."
        )
        assert "with deepspeed.zero.GatheredParameters(parameters):" in text


def codes(rank: int, engine: str, scale: float | None) -> dict[str, list[str]]:
    run = ENGINES[engine](scale)
    call: Any = run.call
    made = {
        "engine": preflight(DummyLossWrapper(call, MAP, scale), model=call),
        "engine alone": preflight(DummyLossWrapper(call, MAP, scale)),
        "module": preflight(DummyLossWrapper(call.module, MAP, scale), model=call),
        "optimizer": preflight(
            DummyLossWrapper(call, MAP, scale), call.optimizer.optimizer, model=call
        ),
    }
    return {how: [finding.code for finding in found] for how, found in made.items()}


@pytest.mark.parametrize(
    ("engine", "scale", "expected"),
    [
        ("ZeRO-1", 1e-7, []),
        ("ZeRO-1", None, ["MD105"]),
        ("ZeRO-1, overlapping", 1e-7, ["MD105"]),
        ("ZeRO-2", 1e-7, ["MD105"]),
        ("ZeRO-3", 1e-7, ["MD106"]),
    ],
)
def test_preflight_knows_the_engine(
    two: Fleet, engine: str, scale: float | None, expected: list[str]
) -> None:
    for found in two.ask(codes, engine, scale):
        assert found == dict.fromkeys(("engine", "engine alone", "module", "optimizer"), expected)


def holds(rank: int, engine: str) -> list[str]:
    run = ENGINES[engine](1e-7)
    call: Any = run.call
    with pytest.raises(TypeError) as of_the_engine:
        hold_inactive(run.wrapper, call.optimizer)
    with pytest.raises(ValueError, match="`optimizer`") as inside:
        hold_inactive(run.wrapper, call.optimizer.optimizer)
    return [str(of_the_engine.value), str(inside.value)]


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_hold_refuses_the_optimizers_of_deepspeed(two: Fleet, engine: str) -> None:
    for of_the_engine, inside in two.ask(holds, engine):
        assert "must be a torch.optim.Optimizer, got" in of_the_engine
        assert "has no parameter of the modalities 'T1', 'rsfMRI', 'dMRI'" in inside
        for message in (of_the_engine, inside):
            assert "Under DeepSpeed's ZeRO pass the engine." in message


def held_early(rank: int) -> str:
    model = Model()
    wrapper, optimizer = DummyLossWrapper(model, MAP), AdamW(model.parameters(), LR)
    hold_inactive(wrapper, optimizer)
    engine, *_ = deepspeed_on_cpus().initialize(
        model=model,
        optimizer=optimizer,
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}},
    )
    engine.backward(wrapper.total(loss_of(engine(batch_of(("T1",), 0, 0, rank))), "T1"))
    with pytest.raises(UnsupportedEngineError) as caught:
        engine.step()
    return str(caught.value)


def test_a_hold_that_deepspeed_takes_the_parameters_from_says_so(two: Fleet) -> None:
    for message in two.ask(held_early):
        assert "were replaced after `hold_inactive`" in message
        assert "hold the engine: `hold_inactive(wrapper, engine)`" in message


def still(rank: int, scale: float) -> dict[str, float]:
    """How far towers get from where they start, with what AdamW does under the default config."""
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = deepspeed_on_cpus().initialize(
        model=model,
        optimizer=AdamW(model.parameters(), LR, weight_decay=0.0),
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}},
    )
    run = Run(engine, model, DummyLossWrapper(engine, MAP, scale))
    for place in range(3):
        real = loss_of(engine(batch_of(("T1",), place, 0, rank)))
        engine.backward(run.wrapper.total(real, "T1"))
        engine.step()
    moved = {n: float((p - before[n]).abs().max()) for n, p in model.named_parameters()}
    return {name: moved[f"towers.{name}.weight"] for name in NAMES}


def test_a_scale_of_zero_keeps_adam_from_moving_what_was_never_there(two: Fleet) -> None:
    for moved in two.ask(still, 0.0):
        assert moved["T1"] > LR
        assert moved["rsfMRI"] == moved["dMRI"] == 0
    for moved in two.ask(still, 1e-7):
        assert moved["rsfMRI"] > LR


def gradients_in_sight(rank: int, engine: str) -> dict[str, Any]:
    run = ENGINES[engine](1e-7)
    real = loss_of(run.call(batch_of(("T1",), 0, 0, rank)))
    run.backward(run.wrapper.total(real, "T1"), 1)
    with pytest.raises(MissingGradientError) as caught:
        missing_gradients(run.wrapper, strict=True)
    return {
        "norms": [key for key in gradient_norms(run.wrapper) if key.startswith("grad/")],
        "missing": missing_gradients(run.wrapper),
        "message": str(caught.value),
    }


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2"])
def test_deepspeed_keeps_gradients_out_of_sight(two: Fleet, engine: str) -> None:
    """They are None, so that what looks for them finds none rather than parts of some."""
    for found in two.ask(gradients_in_sight, engine):
        assert found["norms"] == []
        assert list(found["missing"]) == [*NAMES, "T1-dMRI", "[unmapped]"]
        assert "12 of 12 trainable parameters" in found["message"]
        assert "safe_get_full_grad" in found["message"]


def snippets(rank: int, code: list[str]) -> None:
    """As a reader would type them, where the launcher has started two of them."""
    deepspeed_on_cpus()
    torch.manual_seed(rank)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for block in code:
        exec(compile(block, str(PAGE), "exec"), namespace)


@pytest.mark.long
def test_snippets_of_the_page_run(two: Fleet) -> None:
    code = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(code) == 8
    two.ask(snippets, code)


def verdict_of(rank: int, engine: str, scale: float | None, schedule: Schedule) -> str:
    return verdict(rank, ENGINES[engine], scale, schedule)


@pytest.mark.long
@pytest.mark.parametrize("engine", [engine for engine in rows() if "ZeRO" in engine])
def test_what_the_table_says_is_what_happens(two: Fleet, engine: str) -> None:
    check_row(two, verdict_of, engine)
