"""Batch sampler: the same modalities on every rank, nothing lost, and an exact resume."""

import contextlib
import copy
import enum
import itertools
import json
import math
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from modaldummy import UnsupportedEngineError
from modaldummy._sampler.combinations import share_steps
from modaldummy._sampler.sampler import ModalityBatchSampler

# `test_a_combination_that_is_left_out_warns` checks this warning; other tests may cause it too.
pytestmark = pytest.mark.filterwarnings("ignore:`drop_last=True` leaves out all:UserWarning")

Batches = list[list[int]]
COMBINATIONS: list[Any] = ["T1", "rsfMRI", ("T1", "dMRI"), ()]
TEMPERATURES = [0.5, 1.0, 2.0, math.inf]


def ranks_of(modalities: Any, batch_size: Any, world_size: int, **options: Any) -> list[Batches]:
    """The batches of an epoch of each rank."""
    return [
        drawn(ModalityBatchSampler(modalities, batch_size, **of_rank(rank, world_size), **options))
        for rank in range(world_size)
    ]


def of_rank(rank: int, world_size: int) -> dict[str, Any]:
    return {"rank": rank, "num_replicas": world_size}


def drawn(sampler: ModalityBatchSampler, epoch: int = 0) -> Batches:
    sampler.set_epoch(epoch)
    return list(sampler)


def in_order(ranks: list[Batches], modalities: list[Any]) -> dict[Any, list[int]]:
    """Samples of each combination in the order in which the ranks together take them."""
    found: dict[Any, list[int]] = {}
    for step in zip(*ranks, strict=True):
        for turn in zip(*step, strict=True):
            for sample in turn:
                found.setdefault(modalities[sample], []).append(sample)
    return found


@st.composite
def datasets(draw: st.DrawFn) -> list[Any]:
    """One to four combinations of one to 25 samples each, in any order."""
    combinations = draw(st.lists(st.sampled_from(COMBINATIONS), min_size=1, unique=True))
    entries = [key for key in combinations for _ in range(draw(st.integers(1, 25)))]
    return list(draw(st.permutations(entries)))


batch_sizes = st.integers(1, 5)
world_sizes = st.integers(1, 5)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "temperature": draw(st.sampled_from(TEMPERATURES)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**40)),
        "drop_last": draw(st.booleans()),
    }


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """All that a sampler takes but for the rank; a mix or batches of one combination."""
    modalities, others = draw(datasets()), draw(options())
    size: Any = draw(batch_sizes)
    if draw(st.booleans()):
        size = {key: draw(st.integers(0, 3)) for key in dict.fromkeys(modalities)}
        others["temperature"] = 1.0
    chosen = {"modalities": modalities, "batch_size": size, "world_size": draw(world_sizes)}
    try:
        ranks_of(**chosen, **others)
    except ValueError:  # no batch at all
        assume(False)
    return chosen | others


# --- what all ranks share ---------------------------------------------------------------------


@given(arguments())
def test_every_rank_has_the_same_at_each_step(given_: dict[str, Any]) -> None:
    """As many samples of each combination; what the sampler is for."""
    modalities = given_["modalities"]
    for step in zip(*ranks_of(**given_), strict=True):
        first, *others = [Counter(modalities[sample] for sample in batch) for batch in step]
        assert all(other == first for other in others)
        assert sum(first.values()) > 0
        if isinstance(given_["batch_size"], int):
            assert len(first) == 1


@given(arguments())
def test_the_length_and_the_steps_are_those_that_are_drawn(given_: dict[str, Any]) -> None:
    modalities = given_.pop("modalities")
    world_size = given_.pop("world_size")
    sampler = ModalityBatchSampler(modalities, **of_rank(0, world_size), **given_)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    counts = Counter(key for batch in batches for key in {modalities[sample] for sample in batch})
    assert sampler.steps == {key: counts[key] for key in dict.fromkeys(modalities)}


@given(datasets(), batch_sizes, world_sizes, options())
def test_the_number_of_steps_is_that_of_temperature_1(
    modalities: list[Any], batch_size: int, world_size: int, others: dict[str, Any]
) -> None:
    full = batch_size * world_size
    counts = Counter(modalities).values()
    expected = sum(n // full if others["drop_last"] else math.ceil(n / full) for n in counts)
    assume(expected)
    sampler = ModalityBatchSampler(modalities, batch_size, **of_rank(0, world_size), **others)
    assert len(sampler) == expected


# --- each sample once -------------------------------------------------------------------------


@given(datasets(), batch_sizes, world_sizes, st.booleans(), st.integers(0, 99))
def test_an_epoch_has_each_sample_once(
    modalities: list[Any], batch_size: int, world_size: int, shuffle: bool, seed: int
) -> None:
    """But for the fewest repeats that make a combination divisible by the ranks."""
    ranks = ranks_of(modalities, batch_size, world_size, shuffle=shuffle, seed=seed)
    found = in_order(ranks, modalities)
    for key, number in Counter(modalities).items():
        assert set(found[key]) == {i for i, other in enumerate(modalities) if other == key}
        assert len(found[key]) - number == -number % world_size
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)


@given(datasets(), batch_sizes, world_sizes, st.booleans(), st.integers(0, 99))
def test_without_the_last_batches_all_are_full_and_nothing_is_repeated(
    modalities: list[Any], batch_size: int, world_size: int, shuffle: bool, seed: int
) -> None:
    full = batch_size * world_size
    assume(max(Counter(modalities).values()) >= full)
    ranks = ranks_of(modalities, batch_size, world_size, shuffle=shuffle, seed=seed, drop_last=True)
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    samples = Counter(sample for batches in ranks for batch in batches for sample in batch)
    assert set(samples.values()) == {1}
    kept = Counter(modalities[sample] for sample in samples)
    for key, number in Counter(modalities).items():
        assert kept[key] == number - number % full


@given(arguments())
def test_a_combination_starts_again_only_after_all_its_samples(given_: dict[str, Any]) -> None:
    modalities = given_["modalities"]
    counts = Counter(modalities)
    for key, samples in in_order(ranks_of(**given_), modalities).items():
        number = counts[key]
        for start in range(0, len(samples), number):
            turn = samples[start : start + number]
            assert len(set(turn)) == len(turn)


@given(datasets(), batch_sizes, world_sizes, st.booleans())
def test_each_combination_is_split_as_by_the_sampler_of_torch(
    modalities: list[Any], batch_size: int, world_size: int, drop_last: bool
) -> None:
    """Padded, dropped and dealt out like `DistributedSampler`; then cut into batches."""
    full = batch_size * world_size
    assume(not drop_last or max(Counter(modalities).values()) >= full)
    for rank, batches in enumerate(
        ranks_of(modalities, batch_size, world_size, shuffle=False, drop_last=drop_last)
    ):
        for key in dict.fromkeys(modalities):
            own = [place for place, other in enumerate(modalities) if other == key]
            theirs: DistributedSampler[int] = DistributedSampler(
                Scans(own), world_size, rank, shuffle=False, drop_last=drop_last
            )
            dealt = [own[place] for place in theirs]
            cut = [dealt[i : i + batch_size] for i in range(0, len(dealt), batch_size)]
            expected = [batch for batch in cut if not drop_last or len(batch) == batch_size]
            assert [batch for batch in batches if modalities[batch[0]] == key] == expected


# --- shares -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    st.integers(0, 2000),
    st.sampled_from([5e-324, 1e-3, 0.5, 1.5, 2.0, 1e300, math.inf]),
)
def test_shares_are_right_to_within_a_step(
    counts: list[int], more: int, temperature: float
) -> None:
    """Of what is left once the smallest combinations, one after the other, have got a step each."""
    steps = share_steps(len(counts) + more, counts, temperature).tolist()
    assert sum(steps) == len(counts) + more
    ranked = sorted(range(len(counts)), key=counts.__getitem__)
    weights = [math.exp(math.log(n / max(counts)) / temperature) for n in counts]
    left, whole = len(counts) + more, math.fsum(weights)
    while ranked and left * weights[ranked[0]] < whole * (1 - 1e-9):
        smallest = ranked.pop(0)
        assert steps[smallest] == 1
        left, whole = left - 1, math.fsum(weights[key] for key in ranked)
    for key in ranked:
        assert abs(steps[key] - left * weights[key] / whole) < 1 + 1e-6
        assert steps[key] >= 1


@pytest.mark.parametrize(
    ("counts", "num_steps", "temperature", "expected"),
    [
        ([700, 200, 100], 10, 1.0, [7, 2, 1]),
        ([700, 200, 100], 9, math.inf, [3, 3, 3]),
        ([700, 200, 100], 10, math.inf, [4, 3, 3]),
        ([900, 100], 8, 2.0, [6, 2]),  # 30 to 10
        ([900, 100], 8, 0.5, [7, 1]),  # 81 to 1, of which one is at least given
        ([1000, 1, 1, 1], 13, 1.0, [10, 1, 1, 1]),
        ([5, 5, 5, 5], 4, math.inf, [1, 1, 1, 1]),
        ([5, 4, 3, 2], 2, 1.0, [1, 1, 0, 0]),  # too few steps for all
    ],
)
def test_shares_by_hand(
    counts: list[int], num_steps: int, temperature: float, expected: list[int]
) -> None:
    assert share_steps(num_steps, counts, temperature).tolist() == expected


@given(st.permutations(range(6)))
def test_shares_do_not_hang_on_the_last_bit(order: list[int]) -> None:
    """Logarithms differ between machines; ties go to the first combinations all the same."""
    noisy = [1000 + 1e-10 * place for place in order]
    assert share_steps(9, noisy, 2.0).tolist() == [2, 2, 2, 1, 1, 1]  # type: ignore[arg-type]


def test_a_temperature_balances_combinations() -> None:
    modalities = ["T1"] * 900 + ["dMRI"] * 100
    steps = [
        ModalityBatchSampler(modalities, 10, temperature=temperature).steps
        for temperature in (0.5, 1.0, 2.0, math.inf)
    ]
    assert steps == [
        {"T1": 99, "dMRI": 1},  # 81 to 1
        {"T1": 90, "dMRI": 10},
        {"T1": 75, "dMRI": 25},
        {"T1": 50, "dMRI": 50},
    ]


def test_a_combination_that_gets_fewer_steps_shows_another_part_in_each_epoch() -> None:
    modalities = ["T1"] * 900 + ["dMRI"] * 100
    sampler = ModalityBatchSampler(modalities, 10, temperature=math.inf)
    parts = [{i for batch in drawn(sampler, epoch) for i in batch if i < 900} for epoch in (0, 1)]
    assert [len(part) for part in parts] == [500, 500]
    assert 150 < len(parts[0] & parts[1]) < 400  # 278 are to be expected


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_shuffling_a_combination_continues_after_the_last_epoch(world_size: int) -> None:
    """So that nothing is never seen."""
    modalities = ["T1"] * 50 + ["dMRI"] * 4
    samplers = [
        ModalityBatchSampler(
            modalities, 2, temperature=math.inf, shuffle=False, **of_rank(rank, world_size)
        )
        for rank in range(world_size)
    ]
    found: dict[str, list[int]] = {"T1": [], "dMRI": []}
    for epoch in range(4):
        ranks = [drawn(sampler, epoch) for sampler in samplers]
        for key, samples in in_order(ranks, modalities).items():
            found[key] += samples
    assert found["T1"] == [i % 50 for i in range(len(found["T1"]))]
    assert found["dMRI"] == [50 + i % 4 for i in range(len(found["dMRI"]))]
    assert len(found["T1"]) > 50


# --- a mix ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 4), (True, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_mix_ends_with_the_combination_that_lasts_longest(
    drop_last: bool, steps: int, shuffle: bool
) -> None:
    """All batches hold it, in the order of the mapping; the rest repeats."""
    modalities = ["T1"] * 15 + [("T1", "dMRI")] * 4 + ["text"] * 3
    mix: dict[Any, int] = {("dMRI", "T1"): 1, "T1": 2, "text": 0}
    ranks = ranks_of(modalities, mix, 2, drop_last=drop_last, shuffle=shuffle)
    for batches in ranks:
        assert len(batches) == steps
        for batch in batches:
            assert [modalities[i] for i in batch] == [("T1", "dMRI"), "T1", "T1"]
    found = in_order(ranks, modalities)
    assert len(set(found["T1"])) == (12 if drop_last else 15)
    assert len(set(found["T1", "dMRI"])) == 4
    sampler = ModalityBatchSampler(modalities, mix, drop_last=drop_last, **of_rank(0, 2))
    assert sampler.steps == {"T1": steps, ("T1", "dMRI"): steps, "text": 0}


# --- order ------------------------------------------------------------------------------------


@given(datasets(), batch_sizes)
def test_without_shuffling_combinations_are_spread(modalities: list[Any], batch_size: int) -> None:
    """The start of an epoch has half a step more or less for each combination, at most."""
    sampler = ModalityBatchSampler(modalities, batch_size, shuffle=False)
    combinations = [modalities[batch[0]] for batch in sampler]
    for key, number in sampler.steps.items():
        share = number / len(combinations)
        for step in range(len(combinations)):
            expected = share * step
            slack = 0.5 + share * len(sampler.steps) / 2
            assert abs(combinations[:step].count(key) - expected) <= slack + 1e-9


def test_combinations_take_turns_without_shuffling() -> None:
    modalities = ["T1"] * 6 + ["dMRI"] * 3
    found = [modalities[i] for (i,) in ModalityBatchSampler(modalities, 1, shuffle=False)]
    assert found == ["T1", "dMRI", "T1"] * 3


def test_shuffling_mixes_the_combinations_and_their_samples() -> None:
    modalities = ["T1"] * 40 + ["dMRI"] * 40
    changes = []
    for seed in range(20):
        batches = list(ModalityBatchSampler(modalities, 4, seed=seed))
        combinations = [modalities[batch[0]] for batch in batches]
        changes.append(sum(key != other for key, other in itertools.pairwise(combinations)))
        assert any(batch != sorted(batch) for batch in batches)
    assert 8 < sum(changes) / 20 < 12  # of 19; 10 are to be expected, 1 without mixing


@given(st.integers(0, 2**31), st.integers(1, 2**31))
def test_epochs_and_seeds_differ_and_are_repeatable(seed: int, epoch: int) -> None:
    modalities = ["T1"] * 30 + ["dMRI"] * 30
    sampler = ModalityBatchSampler(modalities, 4, seed=seed)
    first, other = drawn(sampler), drawn(sampler, epoch)
    assert first != other
    assert sampler.epoch == epoch
    assert drawn(sampler) == first
    assert drawn(ModalityBatchSampler(modalities, 4, seed=seed), epoch) == other
    assert drawn(ModalityBatchSampler(modalities, 4, seed=seed + epoch)) == other
    list(ModalityBatchSampler(modalities, 4, seed=seed + 2**80))


def test_random_numbers_of_training_are_left_alone() -> None:
    before = torch.get_rng_state()
    list(ModalityBatchSampler(["T1"] * 9, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_or_dtype_changes_nothing() -> None:
    expected = list(ModalityBatchSampler(["T1"] * 99, 2))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert list(ModalityBatchSampler(["T1"] * 99, 2)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


# --- entries ----------------------------------------------------------------------------------


class Modality(str, enum.Enum):  # noqa: UP042  # unlike StrEnum prints as Modality.T1
    T1 = "T1"


@pytest.mark.parametrize(
    "entry",
    [
        "T1",
        ("T1",),
        ["T1", "T1"],
        {"T1"},
        frozenset(["T1"]),
        np.array(["T1"]),
        np.str_("T1"),
        (name for name in ["T1"]),
        {"T1": 0}.keys(),
        Modality.T1,
    ],
    ids=[
        "name",
        "tuple",
        "list",
        "set",
        "frozenset",
        "array",
        "numpy",
        "generator",
        "keys",
        "enum",
    ],
)
def test_a_name_may_be_written_in_many_ways(entry: Any) -> None:
    sampler = ModalityBatchSampler([entry, "T1"], 2)
    assert sampler.steps == {"T1": 1}
    assert [type(key) for key in sampler.steps] == [str]


def test_samples_with_the_same_set_of_names_are_of_one_combination() -> None:
    modalities = [("dMRI", "T1"), {"T1", "dMRI"}, (), [], "dMRI", ["T1", "dMRI", "T1"]]
    sampler = ModalityBatchSampler(modalities, 5, shuffle=False)
    assert sampler.steps == {("T1", "dMRI"): 1, (): 1, "dMRI": 1}
    assert list(sampler) == [[0, 1, 5], [2, 3], [4]]


@pytest.mark.parametrize(
    ("given_", "steps"),
    [
        (np.array(["T1", "dMRI", "T1"]), {"T1": 2, "dMRI": 1}),
        (np.array([["T1", "dMRI"], ["T1", "T1"], ["dMRI", "T1"]]), {("T1", "dMRI"): 2, "T1": 1}),
        (np.array(["T1", ("T1", "dMRI"), ""], dtype=object)[:2], {"T1": 1, ("T1", "dMRI"): 1}),
        (("T1",), {"T1": 1}),
    ],
    ids=["array", "two columns", "objects", "tuple"],
)
def test_other_types_of_sequences(given_: Any, steps: dict[Any, int]) -> None:
    sampler = ModalityBatchSampler(given_, 1)
    assert sampler.steps == steps
    assert all(type(name) is str for key in sampler.steps for name in key)


# --- saving and resuming ----------------------------------------------------------------------


@given(arguments(), st.integers(0, 3), st.data())
def test_resuming_is_exact(given_: dict[str, Any], epoch: int, data: st.DataObject) -> None:
    """On every rank, from the state that any rank saved; the next epochs begin at their start."""
    world_size = given_.pop("world_size")
    samplers = [
        ModalityBatchSampler(**given_, **of_rank(rank, world_size)) for rank in range(world_size)
    ]
    whole = [drawn(copy.deepcopy(sampler), epoch) for sampler in samplers]
    position = data.draw(st.integers(0, len(whole[0])))
    saver = samplers[data.draw(st.integers(0, world_size - 1))]
    saver.set_epoch(epoch)
    iterator = iter(saver)
    before = [next(iterator) for _ in range(position)]
    state = json.loads(json.dumps(saver.state_dict()))
    assert (state["epoch"], state["position"]) == (epoch, position)
    for rank, expected in enumerate(whole):
        sampler = ModalityBatchSampler(**given_, **of_rank(rank, world_size))
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state
        if data.draw(st.booleans()):
            sampler.set_epoch(epoch)
        assert len(sampler) == len(expected)
        after = list(sampler)
        assert after == expected[position:]
        if sampler.rank == saver.rank:
            assert before + after == expected
        assert sampler.state_dict()["position"] == len(expected)
        assert list(sampler) == expected
        sampler.set_epoch(epoch + 1)
        assert sampler.state_dict()["position"] == 0
        assert list(sampler) == drawn(samplers[rank], epoch + 1)


def test_a_state_passes_the_safe_loader_of_torch(tmp_path: Path) -> None:
    modalities = ["T1", ("T1", "dMRI")]
    for size, temperature in ((2, math.inf), ({"T1": 1, ("T1", "dMRI"): 2}, 1.0)):
        sampler = ModalityBatchSampler(modalities, size, temperature=temperature)
        torch.save(sampler.state_dict(), tmp_path / "state.pt")
        sampler.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_an_iteration_that_stops_midway_is_not_resumed() -> None:
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    whole = list(sampler)
    next(iter(sampler))
    assert sampler.state_dict()["position"] == 1
    assert list(sampler) == whole


def test_a_state_may_be_loaded_midway() -> None:
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    iterator = iter(sampler)
    batches = [next(iterator), next(iterator)]
    state = sampler.state_dict(1)
    assert sampler.state_dict()["position"] == 2
    sampler.load_state_dict(state)
    assert next(iter(sampler)) == batches[1]


def test_a_copy_of_a_sampler_goes_on_by_itself() -> None:
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    whole = list(sampler)
    sampler.load_state_dict(sampler.state_dict() | {"position": 2})
    assert list(copy.deepcopy(sampler)) == whole[2:]
    assert list(sampler) == whole[2:]


def test_a_position_that_is_dropped_warns() -> None:
    """As under a trainer that counts epochs from 0 again; not where the epoch was over."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    state = sampler.state_dict()
    sampler.load_state_dict(state | {"epoch": 3, "position": 2})
    with pytest.warns(UserWarning, match=r"drops the loaded position 2 of epoch 3") as found:
        sampler.set_epoch(0)
    assert found[0].filename == __file__
    assert list(sampler) == drawn(ModalityBatchSampler(["T1"] * 9, 2))
    for position in (0, 5):
        sampler.load_state_dict(state | {"epoch": 3, "position": position})
        sampler.set_epoch(4)


MODALITIES: list[Any] = ["T1"] * 5 + ["dMRI"] * 4
BASE: dict[str, Any] = {
    "modalities": MODALITIES,
    "batch_size": 2,
    "temperature": 1.0,
    "shuffle": True,
    "seed": 0,
    "drop_last": False,
    "num_replicas": 2,
    "rank": 0,
}
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "longer": ({"modalities": [*MODALITIES, "T1"]}, ["`num_samples` was 9 and is 10"]),
    "in another order": ({"modalities": [*MODALITIES[3:], *["T1"] * 3]}, ["`modalities` was"]),
    "renamed": ({"modalities": ["T2"] * 5 + ["dMRI"] * 4}, ["`modalities` was"]),
    "another batch size": ({"batch_size": 3}, ["`batch_size` was 2 and is 3"]),
    "a mix": ({"batch_size": {"T1": 1, "dMRI": 1}}, ["`batch_size` was 2 and is \"{'T1': 1, 'dM"]),
    "another temperature": ({"temperature": math.inf}, ["`temperature` was 1.0 and is inf"]),
    "unshuffled": ({"shuffle": False}, ["`shuffle` was True and is False"]),
    "another seed": ({"seed": 7}, ["`seed` was 0 and is 7"]),
    "another end": ({"drop_last": True}, ["`drop_last` was False and is True"]),
    "more ranks": ({"num_replicas": 4}, ["`num_replicas` was 2 and is 4"]),
    "several": ({"num_replicas": 4, "seed": 7}, ["`num_replicas` was 2", "`seed` was 0"]),
}


@pytest.mark.parametrize(("changed", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_a_state_of_another_sampler_is_refused(changed: dict[str, Any], words: list[str]) -> None:
    """A silent wrong resume would be worse; and the sampler is left as it was."""
    state = ModalityBatchSampler(**BASE).state_dict() | {"position": 1}
    sampler = ModalityBatchSampler(**BASE | changed)
    with pytest.raises(
        ValueError, match=r"other settings.*with the old settings, or start"
    ) as error:
        sampler.load_state_dict(state)
    assert all(word in str(error.value) for word in words)
    assert sampler.state_dict()["position"] == 0
    ModalityBatchSampler(**BASE | {"rank": 1}).load_state_dict(state)


def test_a_state_of_another_version_of_the_plan_is_refused() -> None:
    sampler = ModalityBatchSampler(**BASE)
    with pytest.raises(ValueError, match="`version` was 0 and is 1"):
        sampler.load_state_dict(sampler.state_dict() | {"version": 0})


# --- loaders and trainers ---------------------------------------------------------------------


class Scans(Dataset[int]):
    """Numbered; each item is its own number."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> int:
        return self.items[index]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader_resumes_behind_the_batches_that_were_trained(
    num_workers: int, persistent: bool
) -> None:
    """Workers draw ahead, so that the loop says where it is; `iter` is called twice for them."""
    modalities = ["T1"] * 13 + [("T1", "dMRI")] * 9

    def loader() -> tuple[ModalityBatchSampler, DataLoader[int]]:
        sampler = ModalityBatchSampler(modalities, 2)
        return sampler, DataLoader(
            Scans(list(range(22))),
            batch_sampler=sampler,
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
        )

    sampler, batches = loader()
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in batches])
    assert epochs == [drawn(ModalityBatchSampler(modalities, 2), epoch) for epoch in range(2)]
    trained, state = [], None
    for number, batch in enumerate(batches, start=1):
        trained.append(batch.tolist())
        if number == 3:
            state = sampler.state_dict(number)
            assert sampler.state_dict()["position"] == (7 if num_workers else 3)
            break
    assert state is not None
    other, rest = loader()
    other.load_state_dict(state)
    other.set_epoch(1)
    assert trained + [batch.tolist() for batch in rest] == epochs[1]
    assert [batch.tolist() for batch in rest] == epochs[1]


def test_a_second_split_over_ranks_is_refused() -> None:
    """Each rank would get every other batch of its own, and so another modality than the rest."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    loader = DataLoader(Scans(list(range(9))), batch_sampler=sampler)
    assert len(list(Accelerator(cpu=True).prepare(loader))) == 5  # alone it changes nothing
    for split in (
        lambda: prepare_data_loader(loader, num_processes=2, process_index=0),
        lambda: hasattr(sampler, "batch_size"),  # how Lightning begins
    ):
        with pytest.raises(UnsupportedEngineError, match="use_distributed_sampler=False") as error:
            split()
        assert "leave the loader out of `prepare`" in str(error.value)


def test_a_trainer_finds_set_epoch_where_it_looks() -> None:
    """At `loader.batch_sampler.sampler`, as in `_set_sampler_epoch` of Lightning."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    loader = DataLoader(Scans(list(range(9))), batch_sampler=sampler)
    loader.batch_sampler.sampler.set_epoch(3)  # type: ignore[union-attr]
    assert sampler.epoch == 3


@contextlib.contextmanager
def group(rank: int, world_size: int) -> Iterator[None]:
    """A process group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_ranks_are_those_of_torch_distributed() -> None:
    modalities = ["T1"] * 9
    with group(1, 4):
        sampler = ModalityBatchSampler(modalities, 2)
        assert (sampler.num_replicas, sampler.rank) == (4, 1)
        batches = list(sampler)
        assert ModalityBatchSampler(modalities, 2, rank=3).num_replicas == 4
        assert ModalityBatchSampler(modalities, 2, num_replicas=2).rank == 1
        alone = ModalityBatchSampler(modalities, 2, num_replicas=1, rank=0)
        assert len(list(alone)) == 5
    assert batches == ranks_of(modalities, 2, 4)[1]
    assert list(sampler) == batches  # also when the group is gone
    alone = ModalityBatchSampler(modalities, 2)
    assert (alone.num_replicas, alone.rank) == (1, 0)


def test_a_sampler_that_is_older_than_the_group_is_refused() -> None:
    """All ranks would train on the same samples."""
    early = ModalityBatchSampler(["T1"] * 9, 2)
    chosen = ModalityBatchSampler(["T1"] * 9, 2, num_replicas=1)
    with group(1, 4):
        message = r"made for 1 ranks, but .* has 4\. Make it after"
        with pytest.raises(RuntimeError, match=message) as error:
            next(iter(early))
        assert "`num_replicas`" in str(error.value)
        assert len(list(chosen)) == 5
    with group(0, 1):
        assert len(list(early)) == 5


# --- what is refused --------------------------------------------------------------------------


def make(**changed: Any) -> Callable[[], Any]:
    return lambda: ModalityBatchSampler(**BASE | changed)


def load(**changed: Any) -> Callable[[], Any]:
    sampler = ModalityBatchSampler(**BASE)
    return lambda: sampler.load_state_dict(sampler.state_dict() | changed)


def ask(position: Any, begin: int = 0) -> Callable[[], Any]:
    """A position where 2 batches more were drawn."""
    sampler = ModalityBatchSampler(**BASE)
    sampler.load_state_dict(sampler.state_dict() | {"position": begin})
    iterator = iter(sampler)
    next(iterator), next(iterator)
    return lambda: sampler.state_dict(position)


KNOWN = "Combinations in the dataset:"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "a bare name": (
        make(modalities="T1"),
        TypeError,
        ["`modalities`", "for each sample", "'T1'"],
    ),
    "a mapping": (make(modalities={"T1": 3}), TypeError, ["`modalities`", "sequence", "dict"]),
    "a set": (make(modalities={"T1", "dMRI"}), TypeError, ["`modalities`", "sequence", "set"]),
    "a generator": (make(modalities=iter(["T1"])), TypeError, ["`modalities`", "list_iterator"]),
    "a number": (make(modalities=3), TypeError, ["`modalities`", "3 (int)"]),
    "a sampler": (
        make(modalities=DistributedSampler(Scans([1]), 1, 0)),
        TypeError,
        ["`modalities`", "DistributedSampler"],
    ),
    "no samples": (make(modalities=[]), ValueError, ["`modalities` is empty", "each sample"]),
    "an empty array": (make(modalities=np.array([])), ValueError, ["`modalities` is empty"]),
    "an entry that is a number": (
        make(modalities=["T1", 3]),
        TypeError,
        ["Entry 1 of `modalities`", "a name or an iterable of names", "3 (int)"],
    ),
    "an entry that is None": (make(modalities=[None]), TypeError, ["Entry 0", "None"]),
    "an entry with a number": (make(modalities=[["T1", 3]]), TypeError, ["Entry 0", "['T1', 3]"]),
    "an entry that is nested": (make(modalities=[[["T1"]]]), TypeError, ["Entry 0", "[['T1']]"]),
    "an entry of bytes": (make(modalities=[b""]), TypeError, ["Entry 0", "b''"]),
    "an entry that is a mapping": (
        make(modalities=[("T1",), {"T1": False}]),
        TypeError,
        ["Entry 1", "dict", "'T1'"],
    ),
    "entries of a tensor": (
        make(modalities=torch.tensor([[True, False]])),
        TypeError,
        ["Entry 0", "a Tensor of shape [2]"],
    ),
    "an empty name": (make(modalities=[""]), ValueError, ["Entry 0", "''", "Pass () for none"]),
    "an empty name among others": (make(modalities=[["T1", ""]]), ValueError, ["Entry 0", "''"]),
    "a batch size that is a bool": (
        make(batch_size=True),
        TypeError,
        ["`batch_size` must be an int", "mapping", "True (bool)"],
    ),
    "a batch size that is a float": (make(batch_size=2.0), TypeError, ["`batch_size`", "2.0"]),
    "a batch size that is None": (make(batch_size=None), TypeError, ["`batch_size`", "None"]),
    "a batch size of 0": (make(batch_size=0), ValueError, ["`batch_size` must be 1 or more", "0"]),
    "a negative batch size": (make(batch_size=-2), ValueError, ["`batch_size`", "-2"]),
    "an unknown combination": (
        make(batch_size={"t1": 2, "dMRI": 1}),
        ValueError,
        ["`batch_size` names 't1'", "did you mean 'T1'?", f"{KNOWN} 'T1', 'dMRI'."],
    ),
    "an unknown combination of several": (
        make(batch_size={("dMRI", "T1"): 2}),
        ValueError,
        [
            "names ('dMRI', 'T1'), which is not the combination of any sample",
            f"{KNOWN} 'T1', 'dMRI'.",
        ],
    ),
    "a combination that is like none": (
        make(batch_size={"xyz": 2}),
        ValueError,
        [f"names 'xyz', which is not the combination of any sample. {KNOWN}"],
    ),
    "a missing combination": (
        make(batch_size={"T1": 2}),
        ValueError,
        ["`batch_size` lacks 'dMRI'", "or 0 to leave it out", f"{KNOWN} 'T1', 'dMRI'."],
    ),
    "no combinations": (make(batch_size={}), ValueError, ["`batch_size` lacks 'T1', 'dMRI'"]),
    "a combination twice": (
        make(batch_size={"T1": 2, ("T1",): 1, "dMRI": 1}),
        ValueError,
        ["`batch_size` names 'T1' twice"],
    ),
    "a combination that is a number": (
        make(batch_size={1: 2}),
        TypeError,
        ["key of `batch_size`", "1"],
    ),
    "a combination with a float": (
        make(batch_size={"T1": 2.0, "dMRI": 1}),
        TypeError,
        ["`batch_size['T1']` must be an int, got 2.0"],
    ),
    "a combination with a negative number": (
        make(batch_size={"T1": -1, "dMRI": 1}),
        ValueError,
        ["`batch_size['T1']` must be 0 or more, got -1"],
    ),
    "a mix of nothing": (
        make(batch_size={"T1": 0, "dMRI": 0}),
        ValueError,
        ["`batch_size` is 0 for each combination", "at least 1"],
    ),
    "a mix with a temperature": (
        make(batch_size={"T1": 1, "dMRI": 1}, temperature=2),
        ValueError,
        ["`temperature` must be 1.0 if `batch_size` is a mapping", "got 2"],
    ),
    "a temperature of 0": (make(temperature=0), ValueError, ["`temperature`", "above 0", "got 0"]),
    "a negative temperature": (make(temperature=-1.0), ValueError, ["`temperature`", "got -1.0"]),
    "a temperature that is NaN": (make(temperature=math.nan), ValueError, ["`temperature`", "nan"]),
    "a temperature that is a word": (
        make(temperature="inf"),
        TypeError,
        ["`temperature` must be a number", "'inf'"],
    ),
    "a temperature that is a bool": (make(temperature=True), TypeError, ["True (bool)"]),
    "shuffle that is a word": (make(shuffle="no"), TypeError, ["`shuffle` must be a bool", "'no'"]),
    "drop_last that is a number": (make(drop_last=1), TypeError, ["`drop_last`", "1 (int)"]),
    "a seed that is a float": (make(seed=1.5), TypeError, ["`seed` must be an int", "1.5"]),
    "a negative seed": (make(seed=-1), ValueError, ["`seed` must be 0 or more", "-1"]),
    "no ranks": (make(num_replicas=0), ValueError, ["`num_replicas` must be 1 or more", "got 0"]),
    "ranks that are a float": (make(num_replicas=2.0), TypeError, ["`num_replicas`", "2.0"]),
    "a rank too high": (
        make(rank=2),
        ValueError,
        ["`rank` must be below `num_replicas` (2), got 2"],
    ),
    "a negative rank": (make(rank=-1), ValueError, ["`rank` must be 0 or more", "-1"]),
    "a rank that is a bool": (make(rank=True), TypeError, ["`rank`", "True (bool)"]),
    "a rank without a number of ranks": (
        make(num_replicas=None, rank=1),
        ValueError,
        ["`rank` must be below `num_replicas` (1), got 1"],
    ),
    "a number of ranks without a rank": (
        make(rank=None),
        ValueError,
        ["`num_replicas` is 2", "Pass `rank`", "init_process_group"],
    ),
    "no full batch": (
        make(batch_size=3, drop_last=True),
        ValueError,
        ["`drop_last=True` leaves no batch", "all ranks", "'T1' has 5 of 6, 'dMRI' has 4 of 6"],
    ),
    "no full batch of a mix": (
        make(batch_size={"T1": 3, "dMRI": 0}, drop_last=True),
        ValueError,
        ["leaves no batch", "'T1' has 5 of 6.", "Pass `drop_last=False` or a smaller"],
    ),
    "an epoch that is a float": (
        lambda: ModalityBatchSampler(**BASE).set_epoch(1.0),  # type: ignore[arg-type]
        TypeError,
        ["`epoch` must be an int", "1.0"],
    ),
    "a negative epoch": (
        lambda: ModalityBatchSampler(**BASE).set_epoch(-1),
        ValueError,
        ["`epoch` must be 0 or more", "-1"],
    ),
    "no state": (
        lambda: ModalityBatchSampler(**BASE).load_state_dict(3),  # type: ignore[arg-type]
        TypeError,
        ["`state` must be what `state_dict()` returned", "3 (int)"],
    ),
    "the state of something else": (
        lambda: ModalityBatchSampler(**BASE).load_state_dict({"epoch": 1, "position": 2}),
        ValueError,
        ["`state` lacks 'version', 'num_samples'", "Pass what `state", "['epoch', 'position']"],
    ),
    "a state past the end": (
        load(position=4),
        ValueError,
        ["`state['position']` must be at most 3", "got 4"],
    ),
    "a state before the start": (load(position=-1), ValueError, ["`state['position']`", "-1"]),
    "a state with half a batch": (load(position=0.5), TypeError, ["`state['position']`", "0.5"]),
    "a state with a negative epoch": (load(epoch=-1), ValueError, ["`state['epoch']`", "-1"]),
    "a position that was not drawn": (
        ask(3),
        ValueError,
        ["`position` must be from 0 to 2", "epoch 0", "got 3"],
    ),
    "a position since the resume": (
        ask(0, begin=1),
        ValueError,
        ["`position` must be from 1 to 3", "counted from its start", "got 0"],
    ),
    "a position that is a float": (ask(1.0), TypeError, ["`position` must be an int", "1.0"]),
    "a negative position": (ask(-1), ValueError, ["`position` must be 0 or more", "-1"]),
}


@pytest.mark.parametrize(("call", "error_type", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_to_do(
    call: Callable[[], Any], error_type: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error_type) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("temperature", [1.0, math.inf])
def test_a_combination_that_is_left_out_warns(temperature: float) -> None:
    """Where the user made the sampler; `drop_last=False` is a way out."""
    modalities = ["T1"] * 4 + ["dMRI"] * 3 + [()]
    with pytest.warns(UserWarning, match="`drop_last=True` leaves out all samples") as found:
        sampler = ModalityBatchSampler(modalities, 4, drop_last=True, temperature=temperature)
    assert "'dMRI' (3), () (1). A full batch on every rank takes 4 s" in str(found[0].message)
    assert found[0].filename == __file__
    assert sampler.steps == {"T1": 1, "dMRI": 0, (): 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModalityBatchSampler(modalities, 4, temperature=temperature)
        ModalityBatchSampler(modalities, 2, drop_last=True, temperature=math.inf)
        ModalityBatchSampler(modalities, {"T1": 1, "dMRI": 1, (): 0}, drop_last=True)


def test_many_samples_make_few_objects() -> None:
    """Whole arrays of them; lists of numbers only as they are handed out."""
    sampler = ModalityBatchSampler(["T1", "dMRI"] * 50_000, 4)
    iterator = iter(sampler)
    tracemalloc.start()
    next(iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 * 80
