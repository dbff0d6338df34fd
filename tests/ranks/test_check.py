"""What a rank sends to the others, and what it does with what they send."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy import (
    BatchMetadataError,
    DummyLossWrapper,
    RankDisagreementError,
    UnknownModalityError,
    UnsupportedEngineError,
    check_ranks,
)
from tests.fake_ranks import UNREADABLE, check, refusal, row_of
from tests.holding import NAMES
from tests.preflight.models import Engine, Model, mapped

# --- arguments, and what a single rank does --------------------------------------------


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "a model for a wrapper": ({"wrapper": nn.Linear(1, 1)}, "`wrapper` .* got a Linear module"),
    "a function for a model": ({"model": print}, "`model` must be a torch.nn.Module or None, got"),
    "a number for a group": ({"group": 0}, "`group` must be"),
}


@pytest.mark.parametrize(("arguments", "message"), REJECTED.values(), ids=REJECTED)
def test_arguments_of_the_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"wrapper": mapped(Model()), "batch": "T1", **arguments}
    with pytest.raises(TypeError, match=message):
        check_ranks(**given)


def failing(batch: Any) -> list[str]:
    raise LookupError(batch)


# Options of a wrapper, a batch that it cannot read, and the error.
UNREAD: dict[str, tuple[dict[str, Any], Any, type[Exception]]] = {
    "unknown": ({}, "PET", UnknownModalityError),
    "no metadata": ({}, {"image": 1}, BatchMetadataError),
    "resolver that raises": ({"resolver": failing}, "T1", LookupError),
}


@pytest.mark.parametrize(("options", "batch", "error"), UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("in_use", [False, True])
def test_one_rank_reads_its_batch_and_asks_nobody(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    in_use: bool,
    options: dict[str, Any],
    batch: Any,
    error: type[Exception],
) -> None:
    """Its errors are those of several ranks; otherwise there is none, whatever the batch."""
    if in_use:
        request.getfixturevalue("process_group")
    monkeypatch.delattr(dist, "all_gather")
    with pytest.raises(error):
        check_ranks(mapped(Model(), **options), batch)
    wrapper = mapped(Model())
    readable: Any
    for readable in ([], "T1", {"modality": NAMES}):
        check_ranks(wrapper, readable)
        check_ranks(wrapper, readable, model=Engine(wrapper.parameters.model, 2))
    assert wrapper.last is None


# --- what ranks send to each other ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(["T1"], [1, 1, 0, 0]), (["dMRI", "T1"], [1, 1, 1, 1]), ([], [1, 0, 0, 0])],
    ids=str,
)
def test_a_rank_sends_a_byte_for_each_key(batch: list[str], expected: list[int]) -> None:
    """In alphabetical order; a tuple is active if all of its modalities are."""
    paths: dict[Any, str] = {"dMRI": "towers.dMRI", ("T1", "dMRI"): "trunk", "T1": "towers.T1"}
    seen = []

    def watch(everyone: list[Tensor], own: Tensor) -> None:
        seen.append((own.tolist(), own.dtype, own.device.type, len(everyone)))

    check(DummyLossWrapper(Model(), paths), batch, batch, batch, watch=watch)
    assert seen == [(expected, torch.uint8, "cpu", 3)]


def test_tensors_are_on_a_device_that_the_backend_can_send_from() -> None:
    """Nothing can be read back from there, so that nothing more is asked of it here."""
    seen: list[str] = []

    def watch(everyone: list[Tensor], own: Tensor) -> None:
        seen.extend(tensor.device.type for tensor in (*everyone, own))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check(mapped(Model().to("meta")), "T1", ["T1"], watch=watch, backend="meta:fake")
    assert seen == ["meta"] * 3


@pytest.mark.parametrize("other", [["T1"], UNREADABLE], ids=["it could", "nor could it"])
def test_a_rank_that_cannot_read_sends_that_and_raises_its_own_error(other: Any) -> None:
    wrapper = mapped(Model())
    seen = []
    with pytest.raises(UnknownModalityError):
        check(wrapper, "PET", other, watch=lambda _, own: seen.append(own.tolist()))
    assert seen == [row_of(wrapper, UNREADABLE).tolist()]


def time_out(*_: object) -> None:
    raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")


def test_its_own_error_comes_first_where_others_do_not_answer() -> None:
    with pytest.raises(UnknownModalityError) as caught:
        check(mapped(Model()), "PET", ["T1"], watch=time_out)
    assert caught.value.__cause__ is None


def test_an_interrupt_does_not_wait() -> None:
    """It ends this rank now, not once the others have answered."""

    def interrupted(batch: Any) -> list[str]:
        raise KeyboardInterrupt

    asked: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        check(mapped(Model(), resolver=interrupted), "T1", ["T1"], watch=lambda *_: asked.append(_))
    assert asked == []


def test_the_others_say_who_could_not_read() -> None:
    """Even where they differ in what they could read."""
    model = Model()
    text = refusal(mapped(model), "T1", UNREADABLE, ["dMRI"], model=Engine(model, 2))
    assert text.startswith("The batch could not be read on rank 1. Look at the error there:")
    text = refusal(mapped(model), "T1", UNREADABLE, UNREADABLE, ["T1"], UNREADABLE)
    assert "on ranks 1-2, 4. Look" in text


def test_a_rank_that_does_not_answer_has_an_error_of_its_own() -> None:
    """Its cause is the error of torch."""
    with pytest.raises(RankDisagreementError, match="Not all ranks called `check_ranks`") as caught:
        check(mapped(Model()), "T1", ["T1"], watch=time_out)
    assert "4000ms" in str(caught.value.__cause__)


# --- what the error says -------------------------------------------------------------------------


def test_the_error_names_ranks_parameters_and_remedies() -> None:
    model = Model()
    batches: Any = (["T1"], ["dMRI", "rsfMRI"], ["T1"], [])
    assert refusal(mapped(model), *batches, model=Engine(model, 2)) == (
        "Ranks have different modalities: ranks 0, 2: T1; rank 1: dMRI, rsfMRI; rank 3: nothing. "
        "ZeRO-2, like ZeRO-1 with `overlap_comm`, fills its buckets in the order in which "
        "gradients arrive. If ranks have different modalities, the engine adds up gradients of "
        "different parameters: the result is silently wrong. This concerns T1, dMRI, rsfMRI "
        "(towers.T1.bias, towers.T1.weight, towers.dMRI.bias, and 3 more). Give all ranks the "
        "same modalities at each step, for instance with `ModalityBatchSampler`. Or use ZeRO-1 "
        "without `overlap_comm`. Or run `check_ranks`, forward and backward in "
        "`with engine.coalesce_grad_reduction():`."
    )


def test_a_tuple_of_modalities_is_one_word() -> None:
    model = Model()
    paths: dict[Any, str] = {"T1": "towers.T1", ("T1", "dMRI"): "towers.dMRI"}
    wrapper = DummyLossWrapper(model, paths)
    text = refusal(wrapper, ["T1", "dMRI"], ["T1"], model=Engine(model, 2))
    assert "rank 0: T1, T1-dMRI; rank 1: T1." in text
    assert "This concerns T1-dMRI (towers.dMRI.bias, towers.dMRI.weight)." in text


def of_64_ranks(batch_of: Callable[[int], list[str]]) -> list[list[str]]:
    return [batch_of(rank) for rank in range(64)]


MANY = [f"m{number}" for number in range(64)]
# The modalities of 64 ranks, and how the error lists them.
CROWDS: dict[str, tuple[list[list[str]], list[str]]] = {
    "two halves": (
        of_64_ranks(lambda rank: [MANY[rank >= 32]]),
        ["ranks 0-31: m0; ranks 32-63: m1."],
    ),
    "every other": (
        of_64_ranks(lambda rank: [MANY[rank % 2]]),
        ["ranks 0, 2, 4, 6, 8, 10, and 26 more: m0; ", "11, and 26 more: m1."],
    ),
    "all different": (
        of_64_ranks(lambda rank: [MANY[rank]]),
        ["rank 0: m0; ", "rank 5: m5; and 58 more."],
    ),
    "six of them": (
        [MANY[:6], []],
        ["rank 0: m0, m1, m2, m3, m4, m5; rank 1: nothing."],
    ),
    # Their short forms are equal.
    "almost everything": (
        of_64_ranks(lambda rank: MANY if rank % 63 else MANY[1:] if rank else MANY[:63]),
        ["rank 0: m0, m1, m10, m11, m12, m13, and 57 more; ranks 1-62: m0,", "; rank 63: m1,"],
    ),
}


@pytest.mark.parametrize(("batches", "parts"), CROWDS.values(), ids=CROWDS)
def test_with_many_ranks_it_stays_short(batches: list[list[str]], parts: list[str]) -> None:
    model = Model(MANY)
    text = refusal(mapped(model), *batches, model=Engine(model, 2))
    assert all(part in text for part in parts), text
    assert len(text) < 1000


def test_several_conflicts_are_reported_together() -> None:
    model = Model()
    model.towers["dMRI"] = Engine(model.towers["dMRI"], 2)
    model.towers["T1"] = Engine(model.towers["T1"], 3)
    text = refusal(mapped(model), ["T1"], ["dMRI"])
    for part in ("T1 (towers.T1.module.bias", "dMRI (towers.dMRI.module.bias"):
        assert f"This concerns {part}" in text


def test_a_model_without_parameters_of_the_wrapper_is_refused() -> None:
    """Where it would be asked, which is where ranks differ."""
    with pytest.raises(ValueError, match=r"`model` \(Engine\) shares no parameter .* \(Model\)"):
        check(mapped(Model()), ["T1"], ["dMRI"], model=Engine(Model(), 2))


def test_zero_2_without_gradients_is_refused_if_a_modality_is_inactive_on_all_ranks() -> None:
    """Though ranks agree: its backward would stop, in words of its own."""
    model = Model()
    without, zeros = mapped(model, None), mapped(model, 0.0)
    engine = Engine(model, 2)
    with pytest.raises(UnsupportedEngineError, match=r"With scale=None.*Use scale=0\.0"):
        check(without, ["T1"], ["T1"], model=engine)
    check(without, NAMES, NAMES, model=engine)
    check(without, ["T1"], ["T1"], model=Engine(model, 1))
    check(zeros, ["T1"], ["T1"], model=engine)
