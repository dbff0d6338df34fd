"""A batch sampler whose batches contain the same modalities on every rank."""

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Never, TypeAlias

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Sampler

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._group import num_ranks
from modaldummy._numbers import check_bool, check_int

# To be raised if a saved position would give other batches than before.
_VERSION = 1

_Ints: TypeAlias = NDArray[np.int64]


class ModalityBatchSampler(Sampler[list[int]]):
    """Batch sampler that gives all ranks the same modalities at each step.

    The modalities of a sample are its combination. Each batch contains samples of one combination,
    the same on all ranks. An epoch contains each sample once. Use it under engines that do not
    support ranks with different modalities: ZeRO-2, ZeRO-3, and FSDP with towers that are sharded
    one by one.

    >>> modalities = ["T1", "T1", ("T1", "dMRI"), "T1", "T1", ("dMRI", "T1")]
    >>> sampler = ModalityBatchSampler(modalities, batch_size=2, shuffle=False)
    >>> list(sampler), sampler.steps
    ([[0, 1], [2, 5], [3, 4]], {'T1': 2, ('T1', 'dMRI'): 1})
    >>> from torch.utils.data import DataLoader
    >>> loader = DataLoader(modalities, batch_sampler=sampler, collate_fn=list)
    >>> for epoch in range(2):
    ...     sampler.set_epoch(epoch)
    ...     batches = list(loader)
    >>> sampler.load_state_dict(sampler.state_dict(position=1))
    >>> list(sampler)
    [[2, 5], [3, 4]]

    Args:
        modalities: For each sample of the dataset, in its order, a name or an iterable of names;
            ``()`` for a sample without modalities, such as text alone.
        batch_size: Number of samples in a batch of one rank.
        shuffle: Whether to draw the samples and the order of combinations anew in each epoch.
        seed: Together with the epoch, the start of the random numbers; the same on all ranks.
        drop_last: Whether to leave out samples that do not fill a batch on every rank.
        num_replicas: Number of ranks; by default that of ``torch.distributed`` by now, else 1.
        rank: By default that of this process.

    Attributes:
        steps: Combination to the number of batches of an epoch that contain it.
        epoch: The epoch that ``set_epoch`` was called with last.

    Raises:
        TypeError: An argument, or an entry of one, has the wrong type.
        ValueError: A number is out of range, or no batch is left.
        RuntimeError: From iteration: ``torch.distributed`` now has another number of ranks.
    """

    def __init__(
        self,
        modalities: Sequence[str | Iterable[str]] | NDArray[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self._samples = _group_samples(modalities)
        self._batch_size = check_int("batch_size", batch_size, 1)
        self._shuffle = check_bool("shuffle", shuffle)
        self._seed = check_int("seed", seed, 0)
        self._uses_default_ranks = num_replicas is None
        self.num_replicas: int
        self.rank: int
        self.num_replicas, self.rank = _check_ranks(num_replicas, rank)
        self.steps: dict[ModalityKey, int] = self._count_steps(check_bool("drop_last", drop_last))
        # A saved position is valid only for a sampler with the same settings.
        self._settings = {
            "version": _VERSION,
            "num_samples": len(modalities),
            "modalities": _checksum(self._samples),
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "num_replicas": self.num_replicas,
        }
        self.epoch: int = 0
        # Steps of the epoch: where the next iteration begins, where the last one began, and how
        # far it has come.
        self._next_begin = self._begin = self._position = 0

    @property
    def sampler(self) -> "ModalityBatchSampler":
        """The object itself, because Lightning calls ``batch_sampler.sampler.set_epoch``."""
        return self

    @property
    def batch_size(self) -> Never:
        """An UnsupportedEngineError, because of huggingface/accelerate#4075 on GitHub."""
        raise UnsupportedEngineError(
            "A trainer asks ModalityBatchSampler for its `batch_size`, to split batches over ranks "
            "a second time. With Lightning pass `use_distributed_sampler=False`. With accelerate "
            "leave the loader out of `prepare` and move its batches to the device."
        )

    def __len__(self) -> int:
        """Number of batches of each rank in a whole epoch."""
        return sum(self.steps.values())

    def __iter__(self) -> Iterator[list[int]]:
        # As a generator, all of this waits for the first batch. A DataLoader with workers calls
        # `iter` twice, and the second call must still see the loaded position.
        world_size = num_ranks(None)
        if self._uses_default_ranks and world_size not in (1, self.num_replicas):
            raise RuntimeError(
                f"The sampler was made for {self.num_replicas} ranks, but `torch.distributed` has "
                f"{world_size}. Make it after `init_process_group`, or pass `num_replicas` and "
                "`rank`."
            )
        self._begin = self._position = self._next_begin
        self._next_begin = 0
        for batch in self._batches()[self._begin :]:
            self._position += 1
            yield batch.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, before the loader is iterated. Another epoch starts at its first batch.

        Args:
            epoch: From 0, the same on all ranks; a TypeError or ValueError otherwise.
        """
        if check_int("epoch", epoch, 0) == self.epoch:
            return
        if 0 < self._next_begin < len(self):
            warnings.warn(
                f"`set_epoch({epoch})` drops the loaded position {self._next_begin} of epoch "
                f"{self.epoch}. Iterate over that epoch first.",
                stacklevel=2,
            )
        self.epoch = epoch
        self._next_begin = self._begin = self._position = 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """The position in the epoch, to be saved.

        Args:
            position: Number of batches of this epoch that were trained on. By default the number
                that was drawn. A DataLoader with workers draws batches ahead, and these would be
                skipped.

        Returns:
            Numbers for ``load_state_dict``, the same on all ranks.

        Raises:
            ValueError: ``position`` is after the last batch drawn, or before the loaded position.
        """
        if position is None:
            position = self._position
        elif not self._begin <= check_int("position", position, 0) <= self._position:
            raise ValueError(
                f"`position` must be from {self._begin} to {self._position}, got {position}. These "
                f"batches of epoch {self.epoch} were drawn, counted from its start."
            )
        return {"epoch": self.epoch, "position": position, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved position in the next iteration; later ones start at 0.

        Args:
            state: From ``state_dict``. A ``set_epoch`` with the same epoch keeps the position.

        Raises:
            TypeError: ``state`` is not a mapping, or a number in it is not an int.
            ValueError: ``state`` is out of range, or is from a sampler with other settings.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"`state` must be what `state_dict()` returned, got {describe(state)}.")
        different = [
            f"`{name}` was {state.get(name)!r} and is {value!r}"
            for name, value in self._settings.items()
            if state.get(name) != value
        ]
        if different:
            raise ValueError(
                f"`state` is from a sampler with other settings: {', '.join(different)}. Make the "
                "sampler with the old settings, or start an epoch with `set_epoch`."
            )
        epoch = check_int("state['epoch']", state.get("epoch"), 0)
        position = check_int("state['position']", state.get("position"), 0)
        if position > len(self):
            raise ValueError(f"`state['position']` must be at most {len(self)}, got {position}.")
        self.epoch = epoch
        self._next_begin = self._begin = self._position = position

    def _count_steps(self, drop_last: bool) -> dict[ModalityKey, int]:
        """Number of batches of each combination in an epoch."""
        full = self._batch_size * self.num_replicas
        counts = {key: len(samples) for key, samples in self._samples.items()}
        # Rounded down to full batches, or up.
        steps = {key: n // full if drop_last else -(-n // full) for key, n in counts.items()}
        left_out = [f"{key!r} ({counts[key]})" for key, number in steps.items() if not number]
        if left_out:
            text = (
                f"`drop_last=True` leaves out all samples of {', '.join(left_out)}. A full batch "
                f"on every rank takes {full} samples. Pass `drop_last=False` or a smaller "
                "`batch_size`."
            )
            if not any(steps.values()):
                raise ValueError(text)
            warnings.warn(text, stacklevel=3)
        return steps

    def _batches(self) -> list[_Ints]:
        """The samples of each batch of this rank in the current epoch."""
        generator = np.random.default_rng((self._seed, self.epoch)) if self._shuffle else None
        batches: list[_Ints] = []
        for combination, samples in self._samples.items():
            padded = -(-len(samples) // self.num_replicas) * self.num_replicas
            full = self.steps[combination] * self._batch_size * self.num_replicas
            shuffled = samples if generator is None else generator.permutation(samples)
            # Repeats the first samples if there are fewer than that.
            of_this_rank = np.resize(shuffled, min(padded, full))[self.rank :: self.num_replicas]
            starts = range(0, len(of_this_rank), self._batch_size)
            batches += [of_this_rank[start : start + self._batch_size] for start in starts]
        if generator is not None:
            order = generator.permutation(len(batches))
        else:  # combinations evenly spread
            middles = [(np.arange(steps) + 0.5) / steps for steps in self.steps.values() if steps]
            order = np.argsort(np.concatenate(middles), kind="stable")
        return [batches[index] for index in order]


def _check_ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Number of ranks, and the rank of this process, both of `torch.distributed` by default."""
    world_size = num_ranks(None)
    if num_replicas is None:
        num_replicas = world_size
    if check_int("num_replicas", num_replicas, 1) > 1 and rank is None and world_size == 1:
        raise ValueError(
            f"`num_replicas` is {num_replicas}, but without `torch.distributed` nothing tells "
            "which rank this is. Pass `rank`, or make the sampler after `init_process_group`."
        )
    if rank is None:
        rank = dist.get_rank() if world_size > 1 else 0
    if check_int("rank", rank, 0) >= num_replicas:
        raise ValueError(f"`rank` must be below `num_replicas` ({num_replicas}), got {rank}.")
    return num_replicas, rank


def _group_samples(modalities: Any) -> dict[ModalityKey, _Ints]:
    """Combination of modalities to the indices of its samples, both in dataset order.

    Args:
        modalities: For each sample a name or an iterable of names.
    """
    if isinstance(modalities, (str, bytes, Mapping)) or not (
        hasattr(modalities, "__len__") and hasattr(modalities, "__getitem__")
    ):
        raise TypeError(
            "`modalities` must be a sequence with a name or an iterable of names for each sample "
            f"of the dataset, got {describe(modalities)}."
        )
    if not len(modalities):
        raise ValueError("`modalities` is empty. Pass one entry for each sample of the dataset.")
    entries = modalities.tolist() if isinstance(modalities, np.ndarray) else modalities
    samples: dict[ModalityKey, list[int]] = {}
    for index, entry in enumerate(entries):
        samples.setdefault(_combination_of(entry, index), []).append(index)
    return {key: np.array(indices) for key, indices in samples.items()}


def _combination_of(entry: Any, index: int) -> ModalityKey:
    """A name, or a sorted tuple of different names."""
    is_single = isinstance(entry, (str, bytes, Mapping)) or not isinstance(entry, Iterable)
    names = (entry,) if is_single else tuple(entry)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"Entry {index} of `modalities` must be a name or an iterable of names, got "
            f"{describe(entry)}. Pass () for a sample without modalities."
        )
    # Plain strings, because members of a string Enum print differently. Sorted, because a set of
    # names has another order in each process.
    plain = sorted({str.__str__(name) for name in names})
    return plain[0] if len(plain) == 1 else tuple(plain)


def _checksum(samples: Mapping[ModalityKey, _Ints]) -> int:
    """A number that changes if samples, their order or their modalities change."""
    checksum = zlib.crc32(repr(list(samples)).encode())
    for indices in samples.values():
        checksum = zlib.crc32(indices.tobytes(), checksum)
    return checksum
