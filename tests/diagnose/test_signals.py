"""What keys and values of logged metrics mean, in any format, and which rows are kept."""

import itertools
import math
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from modaldummy import gradient_norms
from modaldummy._diagnose.history import Row
from modaldummy._diagnose.keys import role_of
from modaldummy._diagnose.signals import Columns, Signals
from tests.zoo import ZOO

INF, NAN = math.inf, math.nan
Numbers: TypeAlias = dict[str, float]


def read(*rows: Row) -> Columns:
    return Signals().add(rows)


def told(row: Row) -> Numbers:
    """What a single row says."""
    return {name: float(value[0]) for name, value in read(row).items() if not np.isnan(value[0])}


# --- keys ---------------------------------------------------------------------------------------

ROLES = {
    ("loss", "loss"): ["loss"],
    ("loss", "train_loss"): ["train_loss"],
    ("step", ""): ["step", "_step", "global_step", "Step"],
    ("report", "num_elements"): ["modaldummy/num_elements"],
    ("present", "T1"): ["modaldummy/active/T1"],
    ("active", "T1"): ["active/T1"],
    ("grad", "ratio"): ["grad_ratio"],
    ("norm", "T1"): ["grad_norm/T1"],
    ("norm", "site/T1-dMRI"): ["grad_norm/site/T1-dMRI"],
    ("label", "T1"): ["grad/[T1]/tower.weight"],
    ("whole", ""): ["grad/tower.weight"],
    ("constant", "T1"): ["grad/T1/tower.weight"],
    ("missing", "T1"): ["grad_missing/T1"],
    ("overall", ""): ["grad_norm"],
    # Among them the losses of evaluations, and extremes beside the values of a panel.
    ("", ""): [
        *("lr", "eval_loss", "eval/loss", "val/loss", "loss/ce", "losses", "my_step", "eval/step"),
        *("grad/norm", "grad", "grad/", "grad_norm/", "active", "reactive/T1", "", "/", " - "),
        *("modaldummy/other", "grad_norms/T1", "loss__MIN", "grad_norm/T1__MAX"),
    ],
}


@pytest.mark.parametrize("before", ["", "train/", "brave-sun-12 - ", "a/b - c - ", "x - train/"])
@pytest.mark.parametrize("role", ROLES)
def test_a_key_means_the_same_behind_what_loggers_put_before_it(
    role: tuple[str, str], before: str
) -> None:
    for key in ROLES[role]:
        assert role_of(before + key) == role


def test_unknown_keys_are_ignored_and_remembered() -> None:
    """In the order in which they came, up to a hundred."""
    signals = Signals()
    signals.add([{"lr": 1.0, "loss": 1.0}, {"eval/loss": 5.0, "lr": "high", 7: 1.0}])  # type: ignore[dict-item]
    assert list(signals.ignored) == ["lr", "eval/loss", "7"]
    signals.add([{f"x{index}": 1.0 for index in range(200)}])
    assert len(signals.ignored) == 100


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ({"train_loss": 1.0, "total_loss": 2.0, "training_loss": 3.0, "loss": 4.0}, 4.0),
        ({"modaldummy/real": 1.0, "train_loss": 2.0, "total_loss": 3.0}, 3.0),
        ({"modaldummy/real": 1.0}, 1.0),
    ],
)
def test_the_loss_is_the_first_key_of_a_list(row: Row, loss: float) -> None:
    assert told(row)["loss"] == loss


def test_the_loss_stays_the_same_key() -> None:
    """Hugging Face's Trainer writes `train_loss`, a mean of all, below the losses."""
    signals = Signals()
    assert signals.add([{"loss": 3.0}])["loss"] == 3
    assert np.isnan(signals.add([{"train_loss": 1.0}])["loss"])


def test_two_keys_of_one_meaning_complete_each_other() -> None:
    """The first that says something counts."""
    rows = ({"loss": 1.0}, {"train/loss": 2.0}, {"loss": 3.0, "train/loss": 4.0})
    assert read(*rows)["loss"].tolist() == [1, 2, 3]


# --- steps and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([10, 20, 30], [10, 20, 30]),
        ([None, None, None], [1, 2, 3]),
        ([10, None, None, 40, None], [10, 10, 10, 40, 40]),
        ([None, None, 30, None], [1, 2, 30, 30]),
        ([7, NAN, "NaN", "later"], [7, 7, 7, 7]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_row_without_a_step_is_of_the_one_before(
    steps: list[Any], expected: list[float], size: int
) -> None:
    """Rows are numbered from 1 until there is one, however many are read at once."""
    rows = [{"loss": 1.0} | ({} if step is None else {"step": step}) for step in steps]
    signals = Signals()
    for start in range(0, len(rows), size):
        signals.add(rows[start : start + size])
    assert signals.sample()["step"].tolist() == expected


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((1.5, 1.5), ("1.5", 1.5), ("1e-7", 1e-7), (" 2 ", 2), (3, 3), (True, 1), (False, 0)),
        *((np.float32(0.5), 0.5), (np.int8(3), 3), (np.bool_(True), 1), (np.array([4.0]), 4)),
        *((torch.tensor(2.0), 2), (torch.tensor([2.0]), 2), (torch.tensor(3), 3)),
        (torch.tensor(2.0, dtype=torch.bfloat16), 2),
        (torch.tensor(2.0, requires_grad=True), 2),
        *((NAN, INF), ("NaN", INF), ("nan", INF), (np.float32("nan"), INF)),
        *((INF, INF), (-INF, INF), ("Infinity", INF), ("-Infinity", INF), (torch.tensor(NAN), INF)),
        *((10**400, INF), ("1e400", INF)),
        *((None, NAN), ("", NAN), (" ", NAN), ("high", NAN), ({}, NAN), (1j, NAN), ([1.0], NAN)),
        *((torch.ones(2), NAN), (np.ones(2), NAN), (torch.ones((), device="meta"), NAN)),
    ],
)
def test_values(value: Any, number: float) -> None:
    """What is not finite is infinity. What is not a number is absent."""
    found = read({"loss": value}, {"loss": 1.0}, {})["loss"]
    np.testing.assert_array_equal(found, [number, 1.0, NAN])


def test_a_row_of_a_table_that_lacks_our_keys() -> None:
    """It has NaN for them, also for flags, which are never NaN: it says nothing."""
    row = {"loss": 1.0, "modaldummy/real": 1.0} | flags("modaldummy/active/") | NORMS
    found = read(row, dict.fromkeys(row, NAN))
    assert np.isnan(found["loss"]).tolist() == [False, True]
    assert np.isnan(found["norm/T1"]).tolist() == [False, True]


# --- the sample ---------------------------------------------------------------------------------


def sampled(number: int, size: int) -> list[float]:
    """The steps that are kept of so many rows, of at most 1,000, where so many are read at once."""
    signals = Signals(1000)
    for start in range(0, number, size):
        steps = range(start, min(start + size, number))
        signals.add([{"step": n, "active/T1": n % 2} for n in steps])
        assert len(signals.sample()["step"]) <= 1000
    sample = signals.sample()
    np.testing.assert_array_equal(sample["contains/T1"], sample["step"] % 2)
    return sample["step"].tolist()


def test_a_part_that_is_drawn_at_random_is_kept_of_a_long_history() -> None:
    """Not every other row: batches that take turns are both in it, and all parts of the run."""
    assert sampled(1000, 300) == list(range(1000))
    steps = sampled(9001, 1000)
    assert sampled(9001, 77) == steps
    assert steps == sorted(set(steps))
    assert 0.4 < np.mean(np.array(steps) % 2) < 0.6
    assert np.histogram(steps, 9)[0].min() > len(steps) / 9 / 2 > 15


def test_what_was_not_said_before_is_absent_in_the_sample() -> None:
    signals = Signals()
    signals.add([{"loss": 1.0}])
    signals.add([{"grad_ranks": 2.0}])
    np.testing.assert_array_equal(signals.sample()["grad/ranks"], [NAN, 2.0])


# --- modalities ---------------------------------------------------------------------------------

ALL = ("T1", "rsfMRI", "dMRI")
NORMS = {"grad_norm/T1": 3.0, "grad_norm/rsfMRI": 4e-7, "grad_norm/dMRI": 3e-7}
LABELS = {
    "grad/[T1]/T1.weight": 3.0,
    "grad/[T1]/T1.bias": 4.0,
    "grad/[inactive]/rsfMRI.weight": 4e-7,
    "grad/[inactive]/dMRI.weight": 3e-7,
}


def flags(before: str, **values: float) -> Numbers:
    active = {"T1": 1.0, "rsfMRI": 0.0, "dMRI": 0.0} | values
    return {f"{before}{name}": value for name, value in active.items()}


def of_all(kind: str, found: Numbers) -> list[float]:
    return [found[f"{kind}/{name}"] for name in ALL]


@pytest.mark.parametrize("prefix", ["", "train/"])
@pytest.mark.parametrize(
    ("row", "real"),
    [
        (LABELS | NORMS, 5.0),
        ({"grad/T1/w": 3.0, "grad/dMRI/w": 3e-7} | NORMS | flags("active/"), 3.0),
        (NORMS | flags("modaldummy/active/"), 3.0),
    ],
    ids=["labels", "constant keys", "norms and a report"],
)
def test_norms_of_real_and_dummy_gradients(row: Numbers, real: float, prefix: str) -> None:
    found = told({prefix + key: value for key, value in row.items()})
    assert found["real_norm"] == pytest.approx(real)
    assert found["dummy_norm"] == pytest.approx(5e-7)
    assert of_all("contains", found) == of_all("trained", found) == [1, 0, 0]
    assert found["due"] == 1


def test_a_batch_with_everything_has_no_labels_and_no_dummy() -> None:
    found = told({"grad/T1.weight": 3.0, "grad/dMRI.weight": 3.0} | NORMS)
    assert of_all("contains", found) == [1, 1, 1]
    assert found["real_norm"] == pytest.approx(3.0)
    assert found["due"] == 0
    assert "dummy_norm" not in found


def test_constant_keys_of_a_frozen_modality() -> None:
    """Its norm is NaN and its parameters have no keys, whether it is active or not."""
    constant = {"grad/dMRI/w": 3e-7, "grad/rsfMRI/w": 4e-7} | NORMS | {"grad_norm/T1": NAN}
    found = told(constant | flags("active/"))
    assert "real_norm" not in found
    assert found["dummy_norm"] == pytest.approx(5e-7)
    found = told(constant | flags("active/", T1=0.0, dMRI=1.0))
    assert found["real_norm"] == pytest.approx(3e-7)
    assert found["dummy_norm"] == pytest.approx(4e-7)


@pytest.mark.parametrize("name", ZOO)
def test_labels_and_constant_keys_say_the_same(name: str) -> None:
    """Of whatever is frozen, tied, shared or joint, for each batch that contains something."""
    names = ZOO[name]().wrapper().modalities
    for number in range(1, len(names) + 1):
        for active in itertools.combinations(names, number):
            case = ZOO[name]()
            wrapper = case.wrapper()
            wrapper.total(case.real({*active}), active).backward()
            assert wrapper.last is not None
            report = wrapper.last.as_dict()
            labels = told(gradient_norms(wrapper) | report)
            constant = told(gradient_norms(wrapper, label=False) | report)
            for norm in ("real_norm", "dummy_norm"):
                assert constant.get(norm) == pytest.approx(labels.get(norm)), (active, norm)


def test_gradients_that_are_not_finite_or_large() -> None:
    for value in (NAN, "NaN", INF):
        assert told(LABELS | {"grad/[T1]/T1.bias": value})["real_norm"] == INF
        assert told(LABELS | {"grad/[inactive]/x": value})["dummy_norm"] == INF
    large = {"grad/[T1]/a": 3e200, "grad/[T1]/b": 4e200}
    assert told(large)["real_norm"] == pytest.approx(5e200)


def test_gradients_of_accumulation_and_the_report_of_its_last_batch() -> None:
    """The gradients are of all batches, and the report is of the last one."""
    labels = LABELS | {"grad/[dMRI]/dMRI.weight": 12.0}
    found = told(labels | NORMS | flags("modaldummy/active/", T1=0.0, rsfMRI=1.0))
    assert of_all("contains", found) == [0, 1, 0]
    assert of_all("trained", found) == [1, 0, 1]
    assert found["real_norm"] == pytest.approx(13.0)
    found = told(NORMS | flags("active/", dMRI=1.0) | flags("modaldummy/active/", T1=0.0))
    assert of_all("contains", found) == [0, 0, 0]
    assert of_all("trained", found) == [1, 0, 1]
    assert found["dummy_norm"] == pytest.approx(4e-7)


def test_labels_that_name_no_modality() -> None:
    """`[active]` and `[inactive]`, as dashboards from before this library have them."""
    signals = Signals()
    signals.add([{"grad/[active]/T1_embed": 3.0, "grad/[inactive]/dMRI_embed": 4e-7}])
    assert signals.modalities == []
    assert signals.sample()["real_norm"] == 3
    assert signals.sample()["dummy_norm"] == pytest.approx(4e-7)
    found = told({"grad/[active]/T1_embed": 3.0} | NORMS)
    assert not found.keys() & {"contains/T1", "trained/T1"}


@pytest.mark.parametrize(
    ("names", "modalities", "fusions"),
    [
        (["T1-dMRI", "dMRI", "T1"], ["dMRI", "T1"], {"T1-dMRI": ["T1", "dMRI"]}),
        (["T1", "rs-fMRI", "T1-rs-fMRI"], ["T1", "rs-fMRI"], {"T1-rs-fMRI": ["T1", "rs-fMRI"]}),
        (["a-a", "a"], ["a"], {"a-a": ["a", "a"]}),
        (["a-b-c", "a", "b", "c"], ["a", "b", "c"], {"a-b-c": ["a", "b", "c"]}),
        (["a", "a-b", "b-c", "a-b-c"], ["a", "a-b", "b-c"], {"a-b-c": ["a", "b-c"]}),
        (["a", "b-c", "a-b-cd"], ["a", "b-c", "a-b-cd"], {}),
    ],
)
def test_fusions_are_names_of_modalities_joined_by_hyphens(
    names: list[str], modalities: list[str], fusions: dict[str, list[str]]
) -> None:
    """A flag names a modality, whatever the name is."""
    norms, flagged = Signals(), Signals()
    norms.add([{f"grad_norm/{name}": 1.0 for name in names}])
    assert (norms.modalities, norms.fusions) == (modalities, fusions)
    flagged.add([{f"modaldummy/active/{name}": 1.0 for name in names}])
    assert (flagged.modalities, flagged.fusions) == (names, {})


@pytest.mark.parametrize("second", [1.0, 0.0])
def test_a_fusion_is_trained_where_all_its_modalities_are(second: float) -> None:
    """It is not a modality of its own."""
    norms = {"grad_norm/T1": 3.0, "grad_norm/dMRI": 4.0, "grad_norm/T1-dMRI": 12.0}
    found = told(norms | {"active/T1": 1.0, "active/dMRI": second})
    assert found["trained/T1-dMRI"] == second
    assert found["real_norm"] == (13 if second else 3)
    assert found.get("dummy_norm") == (None if second else pytest.approx(math.hypot(4, 12)))
    assert "contains/T1-dMRI" not in found


@pytest.mark.parametrize("known", [True, False])
def test_a_fusion_without_its_label_was_in_no_batch(known: bool) -> None:
    """Its modalities may have been in different ones. Where it never has one nobody can tell."""
    apart = {"grad/[T1]/a": 3.0, "grad/[dMRI]/b": 3.0, "grad/[inactive]/c": 1e-7}
    norms = {"grad_norm/T1": 3.0, "grad_norm/dMRI": 3.0, "grad_norm/T1-dMRI": 1e-7}
    together = {"grad/[T1-dMRI]/c": 3.0, "grad/[inactive]/d": 1e-7} if known else {}
    found = read(apart | norms, together | norms)
    assert found["trained/T1-dMRI"][0] == (0 if known else 1)


@pytest.mark.parametrize("row", [LABELS | flags("modaldummy/active/"), NORMS | flags("active/")])
def test_keys_of_others_name_no_modality(row: Numbers) -> None:
    """Where flags or labels say which ones there are."""
    found = told(row | {"grad_norm/total": 9.0, "grad/norm": 8.0})
    assert found == told(row) | {"norm/total": 9.0}


def test_a_norm_of_all_gradients_stands_for_the_real_ones() -> None:
    """As trainers log it, where nothing better is there."""
    assert told({"loss": 1.0, "grad_norm": 2.0})["real_norm"] == 2
    assert told({"loss": 1.0, "grad_norm": 2.0} | LABELS)["real_norm"] != 2
