"""What logged metrics say of modalities: which a batch held, and which the gradients are of."""

import itertools
import math
from typing import TypeAlias

import numpy as np
import pytest

from modaldummy import gradient_norms
from modaldummy._diagnose.signals import Signals
from tests.diagnose.test_signals import read, told
from tests.zoo import ZOO

INF, NAN = math.inf, math.nan
Numbers: TypeAlias = dict[str, float]

ALL = ("T1", "rsfMRI", "dMRI")
NORMS = {"grad_norm/T1": 3.0, "grad_norm/rsfMRI": 4e-7, "grad_norm/dMRI": 3e-7}
FLAGS = {"T1": 1.0, "rsfMRI": 0.0, "dMRI": 0.0}
LABELS = {
    "grad/[T1]/T1.weight": 3.0,
    "grad/[T1]/T1.bias": 4.0,
    "grad/[inactive]/rsfMRI.weight": 4e-7,
    "grad/[inactive]/dMRI.weight": 3e-7,
}


def flags(before: str, **values: float) -> Numbers:
    return {f"{before}{name}": value for name, value in (FLAGS | values).items()}


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
    found = told(read({prefix + key: value for key, value in row.items()}))
    assert found["real_norm"] == pytest.approx(real)
    assert found["dummy_norm"] == pytest.approx(5e-7)
    assert [found[f"held/{name}"] for name in ALL] == [1, 0, 0]
    assert [found[f"taught/{name}"] for name in ALL] == [1, 0, 0]
    assert found["due"] == 1
    assert found["labelled"] == (real == 5)


def test_a_batch_with_everything_has_no_labels_and_no_dummy() -> None:
    found = told(read({"grad/T1.weight": 3.0, "grad/dMRI.weight": 3.0} | NORMS))
    assert [found[f"held/{name}"] for name in ALL] == [1, 1, 1]
    assert found["real_norm"] == pytest.approx(3.0)
    assert found["due"] == found["labelled"] == 0
    assert "dummy_norm" not in found


def test_a_step_without_gradients_logged_has_no_dummy_due() -> None:
    assert told(read({"loss": 1.0, **flags("modaldummy/active/")}))["due"] == 0


def test_a_dummy_that_is_missing_is_due() -> None:
    """With labels it is left out, with constant keys NaN, which is infinity here."""
    labels = {key: value for key, value in LABELS.items() if "inactive" not in key}
    found = told(read(labels | flags("modaldummy/active/")))
    assert "dummy_norm" not in found
    assert found["due"] == 1
    constant = {"grad/T1/w": 3.0, "grad/dMRI/w": NAN, "grad_norm/T1": 3.0, "grad_norm/dMRI": NAN}
    found = told(read(constant | flags("active/")))
    assert found["dummy_norm"] == INF
    assert found["due"] == 1
    found = told(read(constant | flags("active/") | {"grad_missing/dMRI": 1.0}))
    assert "dummy_norm" not in found
    assert found["due"] == 1


def test_constant_keys_of_a_frozen_modality() -> None:
    """Its norm is NaN and its parameters have no keys, whether it is active or not."""
    constant = {"grad/dMRI/w": 3e-7, "grad/rsfMRI/w": 4e-7} | NORMS | {"grad_norm/T1": NAN}
    found = told(read(constant | flags("active/")))
    assert "real_norm" not in found
    assert found["dummy_norm"] == pytest.approx(5e-7)
    found = told(read(constant | flags("active/", T1=0.0, dMRI=1.0)))
    assert found["real_norm"] == pytest.approx(3e-7)
    assert found["dummy_norm"] == pytest.approx(4e-7)


def test_constant_keys_of_modalities_that_share_parameters() -> None:
    """Their norms count these more than once, the real ones as dummies too; the ratio does not."""
    row = {"grad/T1/trunk": 4.0, "grad/T1/w": 3.0, "grad/dMRI/w": 5e-7, "grad/dMRI/b": NAN}
    row |= {"grad_norm/T1": 5.0, "grad_norm/rsfMRI": 4.0, "grad_norm/dMRI": 4.0, "grad_ratio": 1e7}
    row |= flags("active/", rsfMRI=1.0)
    found = told(read(row))
    assert found["real_norm"] == pytest.approx(5.0)
    assert found["dummy_norm"] == pytest.approx(5e-7)
    found = told(read(row | {"grad_ratio": NAN}))
    assert found["real_norm"] == pytest.approx(math.hypot(5, 4))
    assert found["dummy_norm"] == 4


@pytest.mark.parametrize("name", ZOO)
def test_labels_and_constant_keys_say_the_same(name: str) -> None:
    """Of whatever is frozen, tied, shared or joint, for each batch that holds something."""
    names = ZOO[name]().wrapper().modalities
    for number in range(1, len(names) + 1):
        for active in itertools.combinations(names, number):
            case = ZOO[name]()
            wrapper = case.wrapper()
            wrapper.total(case.real({*active}), active).backward()
            assert wrapper.last is not None
            report = wrapper.last.as_dict()
            labels = told(read(gradient_norms(wrapper) | report))
            constant = told(read(gradient_norms(wrapper, label=False) | report))
            for norm in ("real_norm", "dummy_norm"):
                assert constant.get(norm) == pytest.approx(labels.get(norm)), (active, norm)


def test_gradients_that_are_not_finite() -> None:
    for value in (NAN, "NaN", INF):
        assert told(read(LABELS | {"grad/[T1]/T1.bias": value}))["real_norm"] == INF
        assert told(read(LABELS | {"grad/[inactive]/x": value}))["dummy_norm"] == INF


def test_large_gradients_do_not_overflow() -> None:
    found = told(read({"grad/[T1]/a": 3e200, "grad/[T1]/b": 4e200}))
    assert found["real_norm"] == pytest.approx(5e200)


def test_labels_of_a_window_and_the_report_of_its_last_batch() -> None:
    """With accumulation the gradients are of all batches, and the report of the last one."""
    labels = LABELS | {"grad/[dMRI]/dMRI.weight": 12.0}
    found = told(read(labels | NORMS | flags("modaldummy/active/", T1=0.0, rsfMRI=1.0)))
    assert [found[f"held/{name}"] for name in ALL] == [0, 1, 0]
    assert [found[f"taught/{name}"] for name in ALL] == [1, 0, 1]
    assert found["real_norm"] == pytest.approx(13.0)
    constant = NORMS | flags("active/", dMRI=1.0) | flags("modaldummy/active/", T1=0.0)
    found = told(read(constant))
    assert [found[f"held/{name}"] for name in ALL] == [0, 0, 0]
    assert [found[f"taught/{name}"] for name in ALL] == [1, 0, 1]
    assert found["dummy_norm"] == pytest.approx(4e-7)


def test_labels_that_name_no_modality() -> None:
    """`[active]` and `[inactive]`, as dashboards from before this library have them."""
    signals = Signals()
    columns = signals.add([{"grad/[active]/T1_embed": 3.0, "grad/[inactive]/dMRI_embed": 4e-7}])
    assert signals.modalities == []
    assert told(columns)["real_norm"] == 3
    assert told(columns)["dummy_norm"] == pytest.approx(4e-7)
    assert "set" not in told(columns)
    found = told(read({"grad/[active]/T1_embed": 3.0} | NORMS))
    assert not found.keys() & {"held/T1", "taught/T1"}


@pytest.mark.parametrize(
    ("names", "modalities", "fusions"),
    [
        (["T1", "dMRI", "T1-dMRI"], ["T1", "dMRI"], {"T1-dMRI": ["T1", "dMRI"]}),
        (["T1-dMRI", "dMRI", "T1"], ["dMRI", "T1"], {"T1-dMRI": ["T1", "dMRI"]}),
        (["T1", "rs-fMRI"], ["T1", "rs-fMRI"], {}),
        (["T1", "rs-fMRI", "T1-rs-fMRI"], ["T1", "rs-fMRI"], {"T1-rs-fMRI": ["T1", "rs-fMRI"]}),
        (["a-a", "a"], ["a"], {"a-a": ["a", "a"]}),
        (
            ["a-b-c", "a", "b", "c", "a-b"],
            ["a", "b", "c"],
            {"a-b": ["a", "b"], "a-b-c": ["a", "b", "c"]},
        ),
        (["a", "a-b", "b-c", "a-b-c"], ["a", "a-b", "b-c"], {"a-b-c": ["a", "b-c"]}),
        (["a", "b-c", "a-b-cd"], ["a", "b-c", "a-b-cd"], {}),
    ],
)
def test_fusions_are_names_of_modalities_joined_by_hyphens(
    names: list[str], modalities: list[str], fusions: dict[str, list[str]]
) -> None:
    signals = Signals()
    signals.add([{f"grad_norm/{name}": 1.0 for name in names}])
    assert signals.modalities == modalities
    assert signals.fusions == fusions


@pytest.mark.parametrize("second", [1.0, 0.0])
def test_a_fusion_is_taught_where_all_its_modalities_are(second: float) -> None:
    """It is no modality of its own."""
    norms = {"grad_norm/T1": 3.0, "grad_norm/dMRI": 4.0, "grad_norm/T1-dMRI": 12.0}
    found = told(read(norms | {"active/T1": 1.0, "active/dMRI": second}))
    assert found["taught/T1-dMRI"] == second
    assert found["real_norm"] == (13 if second else 3)
    assert found.get("dummy_norm") == (None if second else pytest.approx(math.hypot(4, 12)))
    assert "held/T1-dMRI" not in found
    labels = {"grad/[T1]/a": 3.0, "grad/[dMRI]/b": 4.0, "grad/[T1-dMRI]/c": 12.0}
    assert told(read(norms | labels))["real_norm"] == 13


def test_each_set_of_modalities_has_a_number() -> None:
    sets = read(*(flags("active/", T1=a, dMRI=b) for a in (0.0, 1.0) for b in (0.0, 1.0)))["set"]
    assert len(set(sets)) == 4
    assert np.isnan(read({"loss": 1.0})["set"]).all()
    assert np.isnan(read({"active/T1": 1.0}, {"loss": 1.0})["set"]).tolist() == [False, True]


def test_keys_of_others_name_no_modality() -> None:
    """Where flags or labels say which ones there are."""
    foreign = {"grad_norm/total": 9.0, "grad/norm": 8.0}
    for row in (LABELS | flags("modaldummy/active/"), NORMS | flags("active/")):
        signals = Signals()
        signals.add([row | foreign])
        assert "total" not in signals.modalities
        assert told(read(row | foreign)) == told(read(row)) | {"norm/total": 9.0}


def test_a_norm_of_all_gradients_stands_for_the_real_ones() -> None:
    """As trainers log it, where nothing better is there."""
    assert told(read({"loss": 1.0, "grad_norm": 2.0}))["real_norm"] == 2
    assert told(read({"loss": 1.0, "grad_norm": 2.0} | LABELS))["real_norm"] != 2


def test_a_row_of_a_table_that_lacks_our_keys() -> None:
    """It has NaN for them, also for flags, which are never NaN: it says nothing."""
    row = {"loss": 1.0, "modaldummy/real": 1.0} | flags("modaldummy/active/") | NORMS
    hole = dict.fromkeys(row, NAN)
    found = read(row, hole)
    assert np.isnan(found["loss"]).tolist() == [False, True]
    assert np.isnan(found["norm/T1"]).tolist() == [False, True]


@pytest.mark.parametrize("known", [True, False])
def test_a_fusion_without_its_label_was_in_no_batch(known: bool) -> None:
    """Its modalities may have been in different ones. Where it never has one nobody can tell."""
    apart = {"grad/[T1]/a": 3.0, "grad/[dMRI]/b": 3.0, "grad/[inactive]/c": 1e-7}
    norms = {"grad_norm/T1": 3.0, "grad_norm/dMRI": 3.0, "grad_norm/T1-dMRI": 1e-7}
    together = {"grad/[T1-dMRI]/c": 3.0, "grad/[inactive]/d": 1e-7} if known else {}
    found = told(read(apart | norms, together | norms))
    assert found["taught/T1-dMRI"] == (0 if known else 1)


def test_a_flag_names_a_modality_and_no_fusion() -> None:
    signals = Signals()
    signals.add([{f"modaldummy/active/{name}": 1.0 for name in ("T1", "post", "T1-post")}])
    assert signals.modalities == ["T1", "post", "T1-post"]
    assert signals.fusions == {}
