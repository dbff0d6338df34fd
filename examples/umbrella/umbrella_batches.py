"""Batches keyed by modality: which samples they hold, and how these are put together."""

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from umbrella_scans import Sample
from umbrella_words import END, PAD, encode, prompt_of

IGNORED = -100

Batch = dict[str, dict[str, Tensor]]


class ModalitySampler(Sampler[int]):
    """Places of samples, batch after batch, of one modality or of several.

    A batch is drawn from the seed and its number alone: whoever skips the first hundred, as the
    Trainer does where it resumes, gets the others unchanged; so does who asks for more. It is for
    a loader with the same `batch_size`; accelerate deals its batches out to the ranks in turn, so
    that these differ, which DDP supports. Under an engine that does not, `ModalityBatchSampler` of
    the package gives all ranks the same.

    Args:
        modalities: Of each sample, in the order of the dataset.
        batch_size: Samples of a batch.
        num_batches: Batches of all ranks together.
        mixed_share: Share of batches with several modalities.
        seed: Another one draws other batches.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        *,
        batch_size: int,
        num_batches: int,
        mixed_share: float,
        seed: int,
    ) -> None:
        self._places: dict[str, list[int]] = {}
        for place, name in enumerate(modalities):
            self._places.setdefault(name, []).append(place)
        self._batch_size, self._num_batches = batch_size, num_batches
        self._mixed_share, self._seed = mixed_share, seed

    def __len__(self) -> int:
        return self._num_batches * self._batch_size

    def __iter__(self) -> Iterator[int]:
        for number in range(self._num_batches):
            yield from self.batch(number)

    def batch(self, number: int) -> list[int]:
        """Places of the samples of one batch; several modalities have equally many, but for one."""
        draw = random.Random(f"{self._seed} {number}")
        names = list(self._places)
        if len(names) > 1 and draw.random() < self._mixed_share:
            held = draw.sample(names, draw.randint(2, len(names)))
        else:
            held = [draw.choice(names)]
        return [
            draw.choice(self._places[held[place % len(held)]]) for place in range(self._batch_size)
        ]


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch to learn from: modality to its images and texts.

    Returns:
        Modality to `pixel_values`, `[samples, ...]`, and to `input_ids`, `attention_mask` and
        `labels`, `[samples, tokens]`: prompt, answer and end; the labels of the prompt and of what
        is padded are -100.
    """
    return _grouped(samples, answered=True)


def ask(samples: Sequence[Sample]) -> Batch:
    """The same without answers and labels, to be answered."""
    return _grouped(samples, answered=False)


def _grouped(samples: Sequence[Sample], *, answered: bool) -> Batch:
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.modality, []).append(sample)
    return {name: _together(name, own, answered) for name, own in by_name.items()}


def _together(modality: str, samples: Sequence[Sample], answered: bool) -> dict[str, Tensor]:
    prompt = encode(prompt_of(modality))
    answers = [[*encode(sample.answer), END] if answered else [] for sample in samples]
    tokens = pad_sequence([torch.tensor(prompt + answer) for answer in answers], True, PAD)
    batch = {
        "pixel_values": torch.stack([sample.pixel_values for sample in samples]),
        "input_ids": tokens,
        "attention_mask": (tokens != PAD).long(),
    }
    if answered:
        labels = [torch.tensor([IGNORED] * len(prompt) + answer) for answer in answers]
        batch["labels"] = pad_sequence(labels, True, IGNORED)
    return batch


def to_device(batch: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> Batch:
    """A batch on another device."""
    return {
        name: {key: value.to(device) for key, value in part.items()} for name, part in batch.items()
    }
