"""Batch sampler: the same modalities on every rank, each sample once, and an exact resume."""

import copy
import enum
import itertools
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modaldummy import ModalityBatchSampler, UnsupportedEngineError

# `test_a_combination_that_is_left_out_warns` checks this warning; other tests may cause it too.
pytestmark = pytest.mark.filterwarnings("ignore:`drop_last=True` leaves out all:UserWarning")

MODALITIES = ["T1"] * 5 + ["dMRI"] * 4
BASE: dict[str, Any] = {"modalities": MODALITIES, "batch_size": 2, "num_replicas": 2, "rank": 0}
COMBINATIONS: list[Any] = ["T1", "rsfMRI", ("T1", "dMRI"), ()]


@st.composite
def settings(draw: st.DrawFn, /, **fixed: Any) -> dict[str, Any]:
    """All arguments but the rank, such that an epoch has at least one batch."""
    entries = [key for key in COMBINATIONS for _ in range(draw(st.integers(0, 25)))]
    assume(entries)
    drawn: dict[str, Any] = {
        "modalities": list(draw(st.permutations(entries))),
        "batch_size": draw(st.integers(1, 5)),
        "num_replicas": draw(st.integers(1, 5)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**80)),
        "drop_last": draw(st.booleans()),
    }
    drawn |= fixed
    full = drawn["batch_size"] * drawn["num_replicas"]
    assume(not drawn["drop_last"] or max(Counter(entries).values()) >= full)
    return drawn


def samplers_of(options: dict[str, Any]) -> list[ModalityBatchSampler]:
    """The sampler of each rank."""
    return [ModalityBatchSampler(**options, rank=rank) for rank in range(options["num_replicas"])]


def epoch_of(sampler: ModalityBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


# --- one epoch ------------------------------------------------------------------------------------


@given(settings())
def test_each_step_has_one_combination_on_all_ranks(options: dict[str, Any]) -> None:
    """As many samples of it on each rank, and as many steps as the sampler says."""
    samplers, modalities = samplers_of(options), options["modalities"]
    steps: Counter[Any] = Counter()
    for batches in zip(*samplers, strict=True):
        (combination,) = {modalities[sample] for batch in batches for sample in batch}
        assert len({len(batch) for batch in batches}) == 1
        steps[combination] += 1
    for sampler in samplers:
        assert sampler.steps == {key: steps[key] for key in dict.fromkeys(modalities)}
        assert len(sampler) == steps.total()


@given(settings())
def test_an_epoch_contains_each_sample_once(options: dict[str, Any]) -> None:
    """With the fewest repeats that give each rank the same number; `drop_last` repeats nothing."""
    modalities, num_ranks = options["modalities"], options["num_replicas"]
    ranks = [list(sampler) for sampler in samplers_of(options)]
    drawn = Counter(sample for batches in ranks for batch in batches for sample in batch)
    full = options["batch_size"] * num_ranks
    num_steps = 0
    for key, number in Counter(modalities).items():
        counts = [drawn[sample] for sample, other in enumerate(modalities) if other == key]
        if options["drop_last"]:
            assert sum(counts) == number - number % full
            assert max(counts) <= 1
            num_steps += number // full
        else:
            assert sum(counts) == math.ceil(number / num_ranks) * num_ranks
            assert 1 <= min(counts) <= max(counts) <= min(counts) + 1
            num_steps += math.ceil(number / full)
    assert len(ranks[0]) == num_steps
    assert all(1 <= len(batch) <= options["batch_size"] for batch in ranks[0])


@given(settings(shuffle=False))
def test_without_shuffle_samples_come_in_order_and_combinations_are_spread(
    options: dict[str, Any],
) -> None:
    """Ranks take turns; the start of an epoch has about its share of each combination."""
    samplers, modalities = samplers_of(options), options["modalities"]
    turns = [turn for batches in zip(*samplers, strict=True) for turn in zip(*batches, strict=True)]
    combinations = [modalities[batch[0]] for batch in samplers[0]]
    for key, number in samplers[0].steps.items():
        members = [sample for sample, other in enumerate(modalities) if other == key]
        drawn = [sample for turn in turns for sample in turn if modalities[sample] == key]
        assert drawn == (members * len(samplers))[: len(drawn)]
        share = number / len(combinations)
        for step in range(len(combinations)):
            slack = 0.5 + share * len(samplers[0].steps) / 2 + 1e-9
            assert abs(combinations[:step].count(key) - share * step) <= slack


def test_shuffle_mixes_the_combinations_and_their_samples() -> None:
    modalities = ["T1"] * 40 + ["dMRI"] * 40
    changes = []
    for seed in range(20):
        batches = list(ModalityBatchSampler(modalities, 4, seed=seed))
        combinations = [modalities[batch[0]] for batch in batches]
        changes.append(sum(key != other for key, other in itertools.pairwise(combinations)))
        assert any(batch != sorted(batch) for batch in batches)
    assert 8 < sum(changes) / 20 < 12  # Of 19: 10 are expected, and 1 without mixing.


@given(st.integers(0, 2**80), st.integers(1, 2**80))
def test_seed_and_epoch_decide_everything(seed: int, epoch: int) -> None:
    """The random numbers of training do not matter, and stay as they are."""
    sampler = ModalityBatchSampler(["T1"] * 30 + ["dMRI"] * 30, 4, seed=seed)
    before = torch.get_rng_state()
    first, other = epoch_of(sampler, 0), epoch_of(sampler, epoch)
    assert torch.equal(torch.get_rng_state(), before)
    assert first != other
    assert epoch_of(sampler, 0) == first
    assert sampler.epoch == 0
    assert epoch_of(ModalityBatchSampler(["T1"] * 30 + ["dMRI"] * 30, 4, seed=seed), epoch) == other
    assert list(ModalityBatchSampler(["T1"] * 30 + ["dMRI"] * 30, 4, seed=seed + 1)) != first


def test_many_samples_make_few_objects() -> None:
    """An epoch is planned in arrays, and lists are made one at a time."""
    iterator = iter(ModalityBatchSampler(["T1", "dMRI"] * 50_000, 4))
    tracemalloc.start()
    next(iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 * 80


# --- entries of `modalities` ----------------------------------------------------------------------


class Modality(str, enum.Enum):  # noqa: UP042  # Unlike StrEnum it prints as Modality.SCAN.
    SCAN = "T1"


def test_a_name_may_be_written_in_many_ways() -> None:
    forms: list[Any] = ["T1", ("T1",), ["T1", "T1"], {"T1"}, frozenset(["T1"]), {"T1": 0}.keys()]
    forms += [np.array(["T1"]), np.str_("T1"), (name for name in ["T1"]), Modality.SCAN]
    sampler = ModalityBatchSampler(forms, 10, shuffle=False)
    assert list(sampler) == [list(range(10))]
    assert [(type(key), key) for key in sampler.steps] == [(str, "T1")]


@pytest.mark.parametrize(
    "modalities",
    [
        [("dMRI", "T1"), "T1", ["T1", "dMRI", "T1"], {"T1"}],
        np.array([["T1", "dMRI"], ["T1", "T1"], ["dMRI", "T1"], ["T1", "T1"]]),
    ],
    ids=["list", "array"],
)
def test_samples_with_the_same_names_have_the_same_combination(modalities: Any) -> None:
    sampler = ModalityBatchSampler(modalities, 5, shuffle=False)
    assert list(sampler) == [[0, 2], [1, 3]]
    assert sampler.steps == {("T1", "dMRI"): 1, "T1": 1}


# --- saving and resuming --------------------------------------------------------------------------


@given(settings(), st.integers(0, 3), st.data())
def test_resuming_is_exact(options: dict[str, Any], epoch: int, data: st.DataObject) -> None:
    """On every rank, from the state that any rank saved; the next epochs begin at their start."""
    samplers = samplers_of(options)
    whole = [epoch_of(copy.deepcopy(sampler), epoch) for sampler in samplers]
    position = data.draw(st.integers(0, len(whole[0])))
    saver = data.draw(st.sampled_from(samplers))
    saver.set_epoch(epoch)
    iterator = iter(saver)
    before = [next(iterator) for _ in range(position)]
    assert before == whole[saver.rank][:position]
    state = json.loads(json.dumps(saver.state_dict()))
    assert (state["epoch"], state["position"]) == (epoch, position)
    for sampler, expected in zip(samplers_of(options), whole, strict=True):
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state
        if data.draw(st.booleans()):
            sampler.set_epoch(epoch)
        assert len(sampler) == len(expected)
        assert list(copy.deepcopy(sampler)) == list(sampler) == expected[position:]
        assert sampler.state_dict()["position"] == len(expected)
        assert list(sampler) == expected
        sampler.set_epoch(epoch + 1)
        assert sampler.state_dict()["position"] == 0
        assert list(sampler) == epoch_of(samplers[sampler.rank], epoch + 1)


def test_only_a_loaded_position_is_resumed() -> None:
    """An iteration that stops early is not; a state may be loaded while one runs."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    whole = list(sampler)
    iterator = iter(sampler)
    assert [next(iterator), next(iterator)] == whole[:2]
    assert sampler.state_dict()["position"] == 2
    state = sampler.state_dict(1)
    assert list(sampler) == whole
    sampler.load_state_dict(state)
    assert list(sampler) == whole[1:]


def test_a_position_that_is_dropped_warns() -> None:
    """As under a trainer that counts epochs from 0 again; not if the epoch was over or new."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    whole, state = list(sampler), sampler.state_dict()
    sampler.load_state_dict(state | {"epoch": 3, "position": 2})
    with pytest.warns(UserWarning, match=r"drops the loaded position 2 of epoch 3") as found:
        sampler.set_epoch(0)
    assert found[0].filename == __file__
    assert list(sampler) == whole
    for position in (0, 5):
        sampler.load_state_dict(state | {"epoch": 3, "position": position})
        sampler.set_epoch(4)


# --- loaders, trainers and process groups ---------------------------------------------------------


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_loader_resumes_after_the_batches_that_were_trained(
    num_workers: int, persistent: bool
) -> None:
    """Workers draw ahead, so the loop passes its position; the loader calls `iter` twice then."""
    dataset: Any = list(range(22))
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": persistent}

    def make() -> tuple[ModalityBatchSampler, DataLoader[int]]:
        sampler = ModalityBatchSampler(["T1"] * 13 + ["dMRI"] * 9, 2)
        return sampler, DataLoader(dataset, batch_sampler=sampler, **workers)

    sampler, loader = make()
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in loader])
    assert epochs == [epoch_of(make()[0], epoch) for epoch in range(2)]
    iterator = iter(loader)
    trained = [next(iterator).tolist() for _ in range(3)]
    state = sampler.state_dict(3)
    assert sampler.state_dict()["position"] == (7 if num_workers else 3)
    other, rest = make()
    other.load_state_dict(state)
    other.set_epoch(1)
    assert trained + [batch.tolist() for batch in rest] == epochs[1]
    assert [batch.tolist() for batch in rest] == epochs[1]


def test_a_second_split_over_ranks_is_refused() -> None:
    """Each rank would get every other of its own batches, and other modalities than the rest."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    dataset: Any = list(range(9))
    loader = DataLoader(dataset, batch_sampler=sampler)
    assert len(list(Accelerator(cpu=True).prepare(loader))) == 5  # A single rank splits nothing.
    for split in (
        lambda: prepare_data_loader(loader, num_processes=2, process_index=0),
        lambda: hasattr(sampler, "batch_size"),  # What Lightning does first.
    ):
        with pytest.raises(UnsupportedEngineError, match=r"use_distributed_sampler=False.*prepare"):
            split()


def test_lightning_finds_set_epoch() -> None:
    """It calls `loader.batch_sampler.sampler.set_epoch`."""
    sampler = ModalityBatchSampler(["T1"] * 9, 2)
    sampler.sampler.set_epoch(3)
    assert sampler.epoch == 3


def begin_rank_1_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


@pytest.mark.parametrize(
    ("given_", "expected"), [({}, (1, 4)), ({"rank": 3}, (3, 4)), ({"num_replicas": 2}, (1, 2))]
)
def test_ranks_are_those_of_torch_distributed(
    monkeypatch: pytest.MonkeyPatch, given_: dict[str, Any], expected: tuple[int, int]
) -> None:
    alone = ModalityBatchSampler(MODALITIES, 2)
    assert (alone.rank, alone.num_replicas) == (0, 1)
    begin_rank_1_of_4(monkeypatch)
    sampler = ModalityBatchSampler(MODALITIES, 2, **given_)
    assert (sampler.rank, sampler.num_replicas) == expected
    assert list(sampler)


def test_a_sampler_that_is_older_than_the_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks would train on the same samples."""
    early = ModalityBatchSampler(MODALITIES, 2)
    chosen = ModalityBatchSampler(MODALITIES, 2, num_replicas=1)
    begin_rank_1_of_4(monkeypatch)
    with pytest.raises(RuntimeError, match=r"made for 1 ranks, but .* has 4\. Make it after"):
        next(iter(early))
    assert list(chosen)


# --- refusals -------------------------------------------------------------------------------------


def make(**changed: Any) -> ModalityBatchSampler:
    return ModalityBatchSampler(**BASE | changed)


def load(**changed: Any) -> ModalityBatchSampler:
    sampler = make()
    sampler.load_state_dict(sampler.state_dict() | changed)
    return sampler


def adopt(**changed: Any) -> None:
    """Load a state into a sampler with other settings."""
    make(**changed).load_state_dict(make().state_dict() | {"position": 1})


def save(position: Any, begin: int = 0) -> None:
    """Ask for the state at a position, after two batches were drawn from `begin` on."""
    sampler = load(position=begin)
    iterator = iter(sampler)
    next(iterator), next(iterator)
    sampler.state_dict(position)


NO_SEQUENCES: list[Any] = ["T1", {"T1": 3}, {"T1", "dMRI"}, iter(["T1"]), 3]
NO_NAMES: list[Any] = [3, None, "", ["T1", 3], [["T1"]], b"", {"T1": 1}, torch.tensor([True])]
LEFT_OUT = r"leaves out all samples of 'T1' \(5\), 'dMRI' \(4\)\. A full batch .* takes 6 samples"


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *[(make, {"modalities": x}, TypeError, "`modalities` must be a seq") for x in NO_SEQUENCES],
        *[(make, {"modalities": ["T1", x]}, TypeError, "Entry 1 .* Pass ()") for x in NO_NAMES],
        (make, {"modalities": np.array([])}, ValueError, "`modalities` is empty"),
        (make, {"batch_size": {"T1": 2}}, TypeError, "`batch_size` must be an int"),
        (make, {"batch_size": 0}, ValueError, "`batch_size` must be 1 or more"),
        (make, {"batch_size": 3, "drop_last": True}, ValueError, LEFT_OUT),
        (make, {"shuffle": "no"}, TypeError, "`shuffle` must be a bool"),
        (make, {"drop_last": 1}, TypeError, "`drop_last` must be a bool"),
        (make, {"seed": -1}, ValueError, "`seed` must be 0 or more"),
        (make, {"num_replicas": 0}, ValueError, "`num_replicas` must be 1 or more"),
        (make, {"rank": -1}, ValueError, "`rank` must be 0 or more"),
        (make, {"rank": 2}, ValueError, r"`rank` must be below `num_replicas` \(2\), got 2"),
        (make, {"rank": None}, ValueError, "`num_replicas` is 2.*Pass `rank`"),
        (make().set_epoch, {"epoch": -1}, ValueError, "`epoch` must be 0 or more"),
        (adopt, {"modalities": [*MODALITIES, "T1"]}, ValueError, "`num_samples` was 9 and is 10"),
        (adopt, {"modalities": MODALITIES[3:] + ["T1"] * 3}, ValueError, "`modalities` was"),
        (adopt, {"modalities": ["T2"] * 5 + ["dMRI"] * 4}, ValueError, "`modalities` was"),
        (
            adopt,
            {"batch_size": 3, "num_replicas": 4},
            ValueError,
            "was 2 and is 3, .*was 2 and is 4",
        ),
        (adopt, {"shuffle": False}, ValueError, "`shuffle` was True and is False"),
        (adopt, {"drop_last": True}, ValueError, "`drop_last` was False and is True"),
        (adopt, {"seed": 7}, ValueError, "`seed` was 0 and is 7.*sampler with the old settings"),
        (make().load_state_dict, {"state": 3}, TypeError, "`state` must be what"),
        (make().load_state_dict, {"state": {}}, ValueError, "`version` was None and is 1"),
        (load, {"position": 4}, ValueError, r"`state\['position'\]` must be at most 3, got 4"),
        (load, {"position": 0.5}, TypeError, r"`state\['position'\]` must be an int"),
        (load, {"epoch": -1}, ValueError, r"`state\['epoch'\]` must be 0 or more"),
        (save, {"position": 3}, ValueError, "must be from 0 to 2, got 3.*epoch 0 were drawn"),
        (save, {"position": 0, "begin": 1}, ValueError, "must be from 1 to 3, got 0"),
        (save, {"position": 1.0}, TypeError, "`position` must be an int"),
    ],
)
def test_refusals_say_what_to_do(
    function: Callable[..., Any], arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**arguments)


def test_a_refused_state_changes_nothing_and_that_of_another_rank_is_not_refused() -> None:
    sampler = make(rank=1)
    with pytest.raises(ValueError, match="at most 3"):
        sampler.load_state_dict(sampler.state_dict() | {"epoch": 2, "position": 4})
    assert sampler.state_dict() == make().state_dict()
    sampler.load_state_dict(make().state_dict() | {"position": 1})
    assert sampler.state_dict()["position"] == 1


def test_a_combination_that_is_left_out_warns() -> None:
    """In the line of the user who made the sampler."""
    modalities = ["T1"] * 4 + ["dMRI"] * 3 + [()]
    with pytest.warns(UserWarning, match="`drop_last=True` leaves out all samples") as found:
        sampler = ModalityBatchSampler(modalities, 4, drop_last=True)
    assert "'dMRI' (3), () (1). A full batch on every rank takes 4 s" in str(found[0].message)
    assert found[0].filename == __file__
    assert sampler.steps == {"T1": 1, "dMRI": 0, (): 0}
