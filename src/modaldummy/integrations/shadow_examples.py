"""Finds batches of a dataset that together contain every modality, for a shadow to record."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from modaldummy._shadow.trees import leaves_of

_NUM_SAMPLES = 64  # the smallest are looked for among this many
_MAX_SAMPLES = 1000  # if none of those has a modality, it is looked for among this many


def find_examples(
    dataset: Iterable[Any],
    collate: Callable[[list[Any]], Any],
    modalities_of: Callable[[Any], Collection[str]],
    modalities: Sequence[str],
    min_size: int = 1,
) -> list[Any]:
    """Batches of the smallest of the first samples that contain each modality.

    If `collate` can put all these samples into a batch that contains every modality, it is the only
    one. Otherwise there is a batch for each sample. The global random states stay as they are.

    Args:
        dataset: Its samples; a dataset without `__iter__` is read by index.
        collate: Makes a batch of a list of samples.
        modalities_of: The modalities that a batch contains.
        modalities: All modalities.
        min_size: Of a batch, for which samples are repeated.

    Raises:
        ValueError: No sample was found with one of the modalities.
    """
    smallest: dict[str, tuple[int, Any]] = {}
    num_read = 0
    with _same_random_state():
        for sample in islice(_samples_of(dataset), _MAX_SAMPLES):
            if num_read >= _NUM_SAMPLES and smallest.keys() >= set(modalities):
                break
            num_read += 1
            batch = collate([_copy_of(sample)])
            size = _num_elements(batch)
            for name in modalities_of(batch):
                if name not in smallest or size < smallest[name][0]:
                    smallest[name] = size, sample
        if missing := [name for name in modalities if name not in smallest]:
            raise ValueError(
                f"None of the first {num_read:,} samples contains {', '.join(missing)}."
            )
        samples = list({id(sample): sample for _, sample in smallest.values()}.values())
        repeated = samples * min_size if len(samples) < min_size else samples
        together = _collated_together(collate, repeated)
        if together is not None and set(modalities_of(together)) >= set(modalities):
            return [together]
        return [collate([_copy_of(sample) for _ in range(min_size)]) for sample in samples]


def _samples_of(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "__iter__"):
        return iter(dataset)
    return (dataset[place] for place in range(len(dataset)))


def _copy_of(sample: Any) -> Any:
    """A shallow copy of a sample, from which a collator may take entries."""
    return dict(sample) if isinstance(sample, Mapping) else sample


def _collated_together(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    try:
        return collate([_copy_of(sample) for sample in samples])
    except (KeyError, RuntimeError, TypeError, ValueError):  # they differ in keys or in shapes
        return None


def _num_elements(batch: Any) -> int:
    leaves = (leaf for _, leaf in leaves_of(batch))
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Whatever the `with` block draws, random numbers after it are those without it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # of all that draws
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
