"""Batches that hold the same modalities at the same step on every rank."""

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
from modaldummy._sampler.sample_kinds import (
    Ints,
    allot,
    check_int,
    count_steps,
    group_samples,
    order_steps,
    permutations,
    read_sizes,
    read_temperature,
)

# Another version of the plan would draw other batches for a saved position.
_VERSION = 1


class ModalityBatchSampler(Sampler[list[int]]):
    r"""Batch sampler whose batches hold one kind of sample, the same on every rank at each step.

    .. math:: s_k = S \, n_k^{1/T} / \sum_j n_j^{1/T}, \quad S = \sum_k \lceil n_k / (R b) \rceil

    A kind is a set of modalities, a name or a tuple of names. Of the :math:`S` steps of an epoch
    kind :math:`k`, of :math:`n_k` samples, gets :math:`s_k`, rounded; at temperature :math:`T = 1`
    its own term of :math:`S`. Each takes :math:`b` samples on each of :math:`R` ranks. For engines
    that cannot bear ranks with different modalities: ZeRO-2, ZeRO-3, FSDP2 of single towers.

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

    An epoch has each sample once, but for up to :math:`R - 1` of a kind that are repeated; the last
    batch of a kind may be smaller. With another temperature, or a mix, all are full: a kind begins
    anew once it has been seen, or is seen in part. Batches are split over ranks already: pass
    ``use_distributed_sampler=False`` to Lightning, and do not let accelerate prepare the loader.

    Args:
        modalities: For each sample of the dataset, in its order, a name or an iterable of names;
            an empty one for a sample without modalities, such as text alone.
        batch_size: Samples of a batch on each rank. Or a mapping of each kind to how many, such as
            ``{"T1": 6, ("T1", "dMRI"): 2, "dMRI": 0}``: all batches then are of this mix, and an
            epoch ends when the kind that lasts longest has been seen once.
        temperature: 1 for shares in proportion to the samples, ``math.inf`` for equal ones; the
            number of steps is the same. A kind gets at least one, where there are enough.
        shuffle: Draw samples and the order of kinds anew in each epoch. Else they come in order,
            kinds evenly spread; one repeated, or seen in part, goes on where an epoch ended.
        seed: Added to the epoch; the same on all ranks.
        drop_last: Leave out what fills no batch on every rank; warns where that is a whole kind.
        num_replicas: Number of ranks; by default that of ``torch.distributed`` by now, else 1.
        rank: By default that of this process.

    Attributes:
        steps: How many batches of an epoch hold each kind.
        epoch: What ``set_epoch`` was told last.

    Raises:
        TypeError: An argument, or an entry of one, is of another type.
        ValueError: A number is out of range, a mapping has other kinds, or there is no batch.
        RuntimeError: From iteration: ``torch.distributed`` has another number of ranks by now.
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
        self._places, checksum = group_samples(modalities)
        mix = isinstance(batch_size, Mapping)
        sizes = read_sizes(batch_size, self._places)
        temperature = read_temperature(temperature, mix)
        self._seed = check_int("seed", seed, 0)
        self._looked_up = num_replicas is None
        self.num_replicas: int
        self.rank: int
        self.num_replicas, self.rank = _check_ranks(num_replicas, rank)
        self._shuffle = shuffle
        counts = {kind: len(self._places[kind]) for kind in sizes}
        full = {kind: size * self.num_replicas for kind, size in sizes.items()}
        steps = count_steps(counts, full, drop_last)
        # What a step draws; several kinds only in a mix.
        self._recipes = [sizes] if mix else [{kind: size} for kind, size in sizes.items()]
        if mix:
            steps = steps.max(keepdims=True)
        elif temperature != 1:
            steps = allot(int(steps.sum()), list(counts.values()), temperature)
        self._num_steps = steps
        self.steps: dict[ModalityKey, int] = dict.fromkeys(self._places, 0)
        for recipe, number in zip(self._recipes, steps.tolist(), strict=True):
            self.steps |= dict.fromkeys(recipe, number)
        self._goes_on = mix or temperature != 1
        unseen = [f"{kind!r} ({counts[kind]})" for kind in sizes if not self.steps[kind]]
        if unseen:
            warnings.warn(
                f"`drop_last=True` leaves these kinds of samples out of every epoch: "
                f"{', '.join(unseen)}; a full batch on every rank takes {max(full.values())}. Pass "
                "`drop_last=False` or a smaller `batch_size`.",
                stacklevel=2,
            )
        # What a saved position is worth nothing without.
        self._identity = {
            "version": _VERSION,
            "num_samples": sum(map(len, self._places.values())),
            "modalities": checksum,
            "batch_size": str(sizes) if mix else batch_size,
            "temperature": temperature,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "num_replicas": self.num_replicas,
        }
        self.epoch: int = 0
        self._begin = self._position = 0  # of the iteration that is under way, or that comes next
        self._resumed = False

    @property
    def sampler(self) -> "ModalityBatchSampler":
        """Itself, since of a batch sampler Lightning calls only ``sampler.set_epoch``."""
        return self

    @property
    def batch_size(self) -> Never:
        """An UnsupportedEngineError, because of huggingface/accelerate#4075 on GitHub."""
        raise UnsupportedEngineError(
            "A trainer asks ModalityBatchSampler for its `batch_size`, to split batches over ranks "
            "that are split already; with Lightning pass `use_distributed_sampler=False`, and with "
            "accelerate leave the loader out of `prepare` and move its batches to the device."
        )

    def __len__(self) -> int:
        """Batches of each rank in a whole epoch."""
        return int(self._num_steps.sum())

    def __iter__(self) -> Iterator[list[int]]:
        # All of this waits for the first batch: a DataLoader with workers calls `iter` twice.
        world_size = _world_size()
        if self._looked_up and world_size not in (None, self.num_replicas):
            raise RuntimeError(
                f"The sampler was made for {self.num_replicas} ranks, and `torch.distributed` has "
                f"{world_size}; make it after `init_process_group`, or pass `num_replicas` and "
                "`rank`."
            )
        begin = self._begin if self._resumed else 0
        self._begin, self._position, self._resumed = begin, begin, False
        order, own = self._plan()
        done = np.bincount(order[:begin], minlength=len(self._recipes)).tolist()
        for number in order[begin:].tolist():
            batch: list[int] = []
            for kind, size in self._recipes[number].items():
                batch += own[kind][done[number] * size : (done[number] + 1) * size].tolist()
            done[number] += 1
            self._position += 1
            yield batch

    def _plan(self) -> tuple[Ints, dict[ModalityKey, Ints]]:
        """Which recipe each step follows, and the samples of this rank by kind."""
        generator = torch.Generator("cpu").manual_seed((self._seed + self.epoch) % 2**63)
        ranks = self.num_replicas
        own: dict[ModalityKey, Ints] = {}
        for recipe in self._recipes:
            for kind, size in recipe.items():
                places = self._places[kind]
                drawn = self.steps[kind] * size * ranks
                if not self._goes_on:
                    drawn = min(drawn, -(-len(places) // ranks) * ranks)
                if self._shuffle:
                    turns = -(-drawn // len(places))
                    chosen = permutations(turns, len(places), generator)[:drawn]
                else:
                    first = self.epoch * drawn if self._goes_on else 0
                    chosen = (np.arange(drawn) + first % len(places)) % len(places)
                own[kind] = places[chosen[self.rank :: ranks]]
        return order_steps(self._num_steps, generator if self._shuffle else None), own

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch before the loader is iterated; a new one starts at its first batch.

        Args:
            epoch: From 0, the same on all ranks; a TypeError or ValueError otherwise.
        """
        if check_int("epoch", epoch, 0) == self.epoch:
            return
        if self._resumed and 0 < self._begin < len(self):
            warnings.warn(
                f"`set_epoch({epoch})` drops the position {self._begin} of epoch {self.epoch} that "
                "was loaded; iterate that epoch first.",
                stacklevel=2,
            )
        self.epoch = epoch
        self._begin = self._position = 0
        self._resumed = False

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the epoch is, to be saved.

        Args:
            position: Batches of this epoch that have been trained on. By default those drawn, of
                which some may wait in a DataLoader with workers, and would be skipped.

        Returns:
            Numbers and strings for ``load_state_dict``, the same on all ranks.

        Raises:
            ValueError: ``position`` is beyond what was drawn, or before what was loaded.
        """
        if position is None:
            position = self._position
        elif not self._begin <= check_int("position", position, 0) <= self._position:
            raise ValueError(
                f"`position` must be from {self._begin} to {self._position}, the batches of epoch "
                f"{self.epoch} that were drawn, counted from its start, got {position}."
            )
        return {"epoch": self.epoch, "position": position, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind a saved position; later ones start at 0.

        Args:
            state: From ``state_dict``; ``set_epoch`` keeps the position if told the same epoch.

        Raises:
            TypeError: ``state`` is no mapping, or a number in it no int.
            ValueError: It lacks something, is out of range, or of a sampler made otherwise.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"`state` must be what `state_dict()` returned, got {describe(state)}.")
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(
                f"`state` lacks {', '.join(map(repr, missing))}; pass what `state_dict()` "
                f"returned, got {describe(state)}."
            )
        other = [
            f"`{name}` was {state[name]!r} and is {value!r}"
            for name, value in self._identity.items()
            if state[name] != value
        ]
        if other:
            raise ValueError(
                f"`state` is of another sampler: {', '.join(other)}; make the sampler as it was, "
                "or start an epoch anew with `set_epoch`."
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
            f"`num_replicas` is {num_replicas}, and `torch.distributed` is not initialized to tell "
            "which rank this is; pass `rank`, or make the sampler after `init_process_group`."
        )
    if rank is None:
        rank = dist.get_rank() if world_size else 0
    if check_int("rank", rank, 0) >= num_replicas:
        raise ValueError(f"`rank` must be below `num_replicas` ({num_replicas}), got {rank}.")
    return num_replicas, rank


def _world_size() -> int | None:
    """How many ranks there are, if `torch.distributed` knows."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else None
