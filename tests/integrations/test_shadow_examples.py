"""Examples for a shadow are found among the samples of a dataset."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from modaldummy.integrations.shadow_examples import find_examples

NAMES = ("image", "audio")


def sample(**sizes: int) -> dict[str, Any]:
    return {"text": torch.ones(3)} | {name: torch.ones(size) for name, size in sizes.items()}


def listed(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch in which each modality is a list."""
    names = dict.fromkeys(name for each in samples for name in each)
    return {name: [each[name] for each in samples if name in each] for name in names}


def modalities_of(batch: dict[str, Any]) -> set[str]:
    return set(NAMES) & batch.keys()


def found(dataset: Any, collate: Any = listed) -> list[Any]:
    return find_examples(dataset, collate, modalities_of, NAMES)


def test_the_smallest_of_each_modality_make_a_batch() -> None:
    dataset = [sample(), sample(image=9), sample(audio=5), sample(image=4), sample(audio=7)]
    (batch,) = found(dataset)
    assert [len(each) for each in batch["image"]] == [4]
    assert [len(each) for each in batch["audio"]] == [5]


def test_one_sample_may_contain_all() -> None:
    (batch,) = found([sample(image=3, audio=3), sample(image=9, audio=9)])
    assert [len(each) for each in batch["image"]] == [3]


def test_samples_are_repeated_for_a_batch_of_some_size() -> None:
    """Batch norm in training mode takes no single sample."""
    (batch,) = find_examples([sample(image=3, audio=3)], listed, modalities_of, NAMES, 2)
    assert len(batch["image"]) == 2
    apart = [sample(image=4), sample(audio=5)]
    batches = find_examples(apart, default_data_collator, modalities_of, NAMES, 2)
    assert [len(batch["text"]) for batch in batches] == [2, 2]


def test_a_collator_that_cannot_mix_gets_one_sample_at_a_time() -> None:
    """That of transformers takes the keys of the first sample."""
    first, second = found([sample(image=4), sample(audio=5)], default_data_collator)
    assert first.keys() == {"text", "image"}
    assert second.keys() == {"text", "audio"}


def test_a_collator_may_take_entries_away() -> None:
    def taking(samples: list[dict[str, Any]]) -> Any:
        return listed([{name: each.pop(name) for name in list(each)} for each in samples])

    dataset = [sample(image=4), sample(audio=5)]
    assert modalities_of(found(dataset, taking)[0]) == set(NAMES)
    assert all(dataset)


class ByIndex:
    """A dataset as torch has it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> dict[str, Any]:
        return [sample(image=4), sample(audio=5)][place]


class Endless:
    """Has a sample with audio only after so many others."""

    def __init__(self, place: int) -> None:
        self.place, self.num_read = place, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.num_read += 1
            yield sample(audio=4) if self.num_read == self.place else sample(image=4)


def test_datasets_are_read_by_index_or_in_order() -> None:
    assert len(found(ByIndex())) == 1
    late = Endless(500)
    assert len(found(late)) == 1
    assert late.num_read <= 501


def test_a_modality_that_no_sample_contains_is_named() -> None:
    endless = Endless(5000)
    with pytest.raises(ValueError, match="None of the first 1,000 samples contains audio"):
        found(endless)
    assert endless.num_read == 1000
    with pytest.raises(ValueError, match="None of the first 1 samples contains audio"):
        found([sample(image=4)])


def test_random_numbers_are_the_same_afterwards() -> None:
    class Augmented(ByIndex):
        def __getitem__(self, place: int) -> dict[str, Any]:
            noise = random.random() + np.random.rand()  # noqa: NPY002
            return super().__getitem__(place) | {"noise": torch.rand(1) + noise}

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def seed() -> None:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    seed()
    expected = drawn()
    seed()
    found(Augmented())
    assert drawn() == expected
