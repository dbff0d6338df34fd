"""A batch sampler whose batches contain the same modalities on every rank."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Never

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Sampler

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import UnsupportedEngineError, describe
from modaldummy._sampler.combinations import (
    Ints,
    check_int,
    count_steps,
    group_samples,
    order_steps,
    permutations,
    read_sizes,
    read_temperature,
    share_steps,
)

# To be raised if a saved position would give other batches than before.
_VERSION = 1


class ModalityBatchSampler(Sampler[list[int]]):
    r"""Batch sampler that gives all ranks the same modalities at each step.

    .. math:: s_k = S \, n_k^{1/T} / \sum_j n_j^{1/T}, \quad S = \sum_k \lceil n_k / (R b) \rceil

    The modalities of a sample are its combination. Each batch contains samples of one combination
    :math:`k`, which has :math:`n_k` samples and gets :math:`s_k` of the :math:`S` steps, rounded.
    A step takes :math:`b` samples on each of :math:`R` ranks. At temperature :math:`T = 1` an epoch
    contains each sample once. Use it under engines that do not support ranks with different
    modalities: ZeRO-2, ZeRO-3, and FSDP2 with towers that are sharded one by one.

    >>> modalities = ["T1", "T1", ("T1", "dMRI"), "T1", "T1", ("dMRI", "T1")]
    >>> sampler = ModalityBatchSampler(modalities, batch_size=2, shuffle=False)
    >>> list(sampler), sampler.steps
    ([[0, 1], [2, 5], [3, 4]], {'T1': 2, ('T1', 'dMRI'): 1})
    >>> loader = torch.utils.data.DataLoader(modalities, batch_sampler=sampler, collate_fn=list)
    >>> for epoch in range(2):
    ...     sampler.set_epoch(epoch)
    ...     batches = list(loader)
    >>> sampler.load_state_dict(sampler.state_dict(position=1))
    >>> list(sampler)
    [[2, 5], [3, 4]]

    Args:
        modalities: For each sample of the dataset, in its order, a name or an iterable of names;
            ``()`` for a sample without modalities, such as text alone.
        batch_size: Number of samples in a batch of one rank. Or a mix: a mapping such as
            ``{"T1": 6, ("T1", "dMRI"): 2, "dMRI": 0}`` that gives the number of samples of each
            combination in every batch.
        temperature: 1 for shares in proportion to the samples, ``math.inf`` for equal shares.
        shuffle: Whether to draw the samples and the order of combinations anew in each epoch.
        seed: Added to the epoch; the same on all ranks.
        drop_last: Whether to leave out samples that do not fill a batch on every rank.
        num_replicas: Number of ranks; by default that of ``torch.distributed`` by now, else 1.
        rank: By default that of this process.

    Attributes:
        steps: Combination to the number of batches of an epoch that contain it.
        epoch: The epoch that ``set_epoch`` was called with last.

    Raises:
        TypeError: An argument, or an entry of one, has the wrong type.
        ValueError: A number is out of range, a mapping does not fit the dataset, or no batch is
            left.
        RuntimeError: From iteration: ``torch.distributed`` now has another number of ranks.
    """

    def __init__(
        self,
        modalities: Sequence[str | Iterable[str]] | NDArray[Any],
        batch_size: int | Mapping[Any, int],
        *,
        temperature: float = 1.0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"`{name}` must be a bool, got {describe(flag)}.")
        self._samples, checksum = group_samples(modalities)
        is_mix = isinstance(batch_size, Mapping)
        sizes = read_sizes(batch_size, self._samples)
        temperature = read_temperature(temperature, is_mix)
        self._seed = check_int("seed", seed, 0)
        self._uses_default_ranks = num_replicas is None
        self.num_replicas: int
        self.rank: int
        self.num_replicas, self.rank = _check_ranks(num_replicas, rank)
        self._shuffle = shuffle
        counts = {combination: len(self._samples[combination]) for combination in sizes}
        step_sizes = {key: size * self.num_replicas for key, size in sizes.items()}
        steps = count_steps(counts, step_sizes, drop_last)
        # The contents that a batch can have, each a number of samples by combination.
        self._contents = [sizes] if is_mix else [{key: size} for key, size in sizes.items()]
        if is_mix:
            steps = steps.max(keepdims=True)
        elif temperature != 1:
            steps = share_steps(int(steps.sum()), list(counts.values()), temperature)
        self._num_steps = steps
        self.steps: dict[ModalityKey, int] = dict.fromkeys(self._samples, 0)
        for content, number in zip(self._contents, steps.tolist(), strict=True):
            self.steps |= dict.fromkeys(content, number)
        self._repeats_samples = is_mix or temperature != 1
        left_out = [f"{key!r} ({counts[key]})" for key in sizes if not self.steps[key]]
        if left_out:
            warnings.warn(
                f"`drop_last=True` leaves out all samples of {', '.join(left_out)}. A full batch "
                f"on every rank takes {max(step_sizes.values())} samples. Pass `drop_last=False` "
                "or a smaller `batch_size`.",
                stacklevel=2,
            )
        # A saved position is valid only for a sampler with the same settings.
        self._settings = {
            "version": _VERSION,
            "num_samples": sum(map(len, self._samples.values())),
            "modalities": checksum,
            "batch_size": str(sizes) if is_mix else batch_size,
            "temperature": temperature,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "num_replicas": self.num_replicas,
        }
        self.epoch: int = 0
        # First and next batch of the iteration that is running, or that comes next.
        self._begin = self._position = 0
        self._resumed = False

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
        return int(self._num_steps.sum())

    def __iter__(self) -> Iterator[list[int]]:
        # As a generator, all of this waits for the first batch. A DataLoader with workers calls
        # `iter` twice, and the second call must still see the loaded position.
        world_size = _world_size()
        if self._uses_default_ranks and world_size not in (None, self.num_replicas):
            raise RuntimeError(
                f"The sampler was made for {self.num_replicas} ranks, but `torch.distributed` has "
                f"{world_size}. Make it after `init_process_group`, or pass `num_replicas` and "
                "`rank`."
            )
        begin = self._begin if self._resumed else 0
        self._begin, self._position, self._resumed = begin, begin, False
        order, samples = self._plan()
        num_done = np.bincount(order[:begin], minlength=len(self._contents)).tolist()
        for number in order[begin:].tolist():
            batch: list[int] = []
            for combination, size in self._contents[number].items():
                start = num_done[number] * size
                batch += samples[combination][start : start + size].tolist()
            num_done[number] += 1
            self._position += 1
            yield batch

    def _plan(self) -> tuple[Ints, dict[ModalityKey, Ints]]:
        """The plan of an epoch.

        Returns:
            For each step the index of the contents of its batch; and combination to the samples of
            this rank, in the order in which batches take them.
        """
        generator = torch.Generator("cpu").manual_seed((self._seed + self.epoch) % 2**63)
        num_ranks = self.num_replicas
        samples: dict[ModalityKey, Ints] = {}
        for content in self._contents:
            for combination, size in content.items():
                available = self._samples[combination]
                needed = self.steps[combination] * size * num_ranks
                if not self._repeats_samples:
                    needed = min(needed, -(-len(available) // num_ranks) * num_ranks)
                if self._shuffle:
                    rounds = -(-needed // len(available))
                    chosen = permutations(rounds, len(available), generator)[:needed]
                else:
                    first = self.epoch * needed if self._repeats_samples else 0
                    chosen = (np.arange(needed) + first % len(available)) % len(available)
                samples[combination] = available[chosen[self.rank :: num_ranks]]
        return order_steps(self._num_steps, generator if self._shuffle else None), samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, before the loader is iterated. Another epoch starts at its first batch.

        Args:
            epoch: From 0, the same on all ranks; a TypeError or ValueError otherwise.
        """
        if check_int("epoch", epoch, 0) == self.epoch:
            return
        if self._resumed and 0 < self._begin < len(self):
            warnings.warn(
                f"`set_epoch({epoch})` drops the loaded position {self._begin} of epoch "
                f"{self.epoch}. Iterate over that epoch first.",
                stacklevel=2,
            )
        self.epoch = epoch
        self._begin = self._position = 0
        self._resumed = False

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """The position in the epoch, to be saved.

        Args:
            position: Number of batches of this epoch that were trained on. By default the number
                that was drawn. A DataLoader with workers draws batches ahead, and these would be
                skipped.

        Returns:
            Numbers and strings for ``load_state_dict``, the same on all ranks.

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
            ValueError: ``state`` lacks an entry, is out of range, or is from a sampler with other
                settings.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"`state` must be what `state_dict()` returned, got {describe(state)}.")
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(
                f"`state` lacks {', '.join(map(repr, missing))}, got {describe(state)}. Pass what "
                "`state_dict()` returned."
            )
        different = [
            f"`{name}` was {state[name]!r} and is {value!r}"
            for name, value in self._settings.items()
            if state[name] != value
        ]
        if different:
            raise ValueError(
                f"`state` is from a sampler with other settings: {', '.join(different)}. Make the "
                "sampler with the old settings, or start an epoch with `set_epoch`."
            )
        epoch = check_int("state['epoch']", state["epoch"], 0)
        position = check_int("state['position']", state["position"], 0)
        if position > len(self):
            raise ValueError(f"`state['position']` must be at most {len(self)}, got {position}.")
        self.epoch = epoch
        self._begin = self._position = position
        self._resumed = True


def _check_ranks(num_replicas: Any, rank: Any) -> tuple[int, int]:
    world_size = _world_size()
    if num_replicas is None:
        num_replicas = world_size or 1
    if check_int("num_replicas", num_replicas, 1) > 1 and rank is None and world_size is None:
        raise ValueError(
            f"`num_replicas` is {num_replicas}, but `torch.distributed` is not initialized to tell "
            "which rank this is. Pass `rank`, or make the sampler after `init_process_group`."
        )
    if rank is None:
        rank = dist.get_rank() if world_size else 0
    if check_int("rank", rank, 0) >= num_replicas:
        raise ValueError(f"`rank` must be below `num_replicas` ({num_replicas}), got {rank}.")
    return num_replicas, rank


def _world_size() -> int | None:
    """Number of ranks, or None if `torch.distributed` is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else None
