"""What a history of training shows, gathered in one pass and bounded memory."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from modaldummy._diagnose.history import Row, join_parts
from modaldummy._diagnose.signals import Column, Columns, Flags, Signals
from modaldummy._errors import close_match
from modaldummy._findings import Finding
from modaldummy._numbers import check_number

_CHUNK = 4096


@dataclass(frozen=True)
class Thresholds:
    """Numbers that a diagnosis goes by.

    Attributes:
        early: A loss that is not finite among so many first ones was so at once.
        least: Fewer losses than this say nothing about their course.
        decrease: The loss has to fall by this share of its first values.
        unrest: It is not steady where, in its second half, a quarter of the steps between means of
            16 batches are this multiple of the means, what the batches contain being equal.
        factor: Norms of dummy gradients may be so many times too large or too small.
        clipped: Below this share of what they should be, they have been clipped away.
        broken: This share of steps, but for those at the start, may have a real gradient that is
            not finite, as those have that a GradScaler skips.
        fraction: Bound on `|dummy| / |real|`.
        large_fraction: Where exceeding it is an error.
        ratio: Of real to dummy gradient norm, for orientation.
        single: More than this share of batches with a single modality is worth a word.
    """

    early: int = 5
    least: int = 20
    decrease: float = 0.01
    unrest: float = 1.5
    factor: float = 2.0
    clipped: float = 0.01
    broken: float = 0.05
    fraction: float = 1e-4
    large_fraction: float = 1e-2
    ratio: float = 1e4
    single: float = 0.95

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """The usual ones but for those that are `given`.

        Raises:
            TypeError: There is no such threshold, or one is not a number.
            ValueError: One is not a finite number above 0.
        """
        names = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in names:
                match = close_match(name, names)
                hint = f"; did you mean {match!r}?" if match else "."
                raise TypeError(f"There is no threshold {name!r}{hint} There are: {names}.")
            check_number(name, value, positive=True)
        return cls(**given)


@dataclass
class Tally:
    """How often something was seen, and how often and where it was so.

    Attributes:
        seen: Rows that tell.
        hits: Rows of these where it was so.
        first: Step of the first hit; `place` is how many rows had told before.
        lead: Hits before the first row that tells otherwise; `run`: those after the last one.
    """

    seen: int = 0
    hits: int = 0
    first: float = math.nan
    place: int = 0
    lead: int = 0
    run: int = 0

    @property
    def share(self) -> float:
        """Hits of what was seen."""
        return self.hits / self.seen if self.seen else 0.0

    def add(self, steps: Column, hit: Flags, seen: Flags) -> None:
        """Count the rows of a chunk that were `seen`."""
        hit, steps = hit[seen], steps[seen]
        hits, others = np.flatnonzero(hit), np.flatnonzero(~hit)
        if len(hits) and not self.hits:
            self.first, self.place = float(steps[hits[0]]), self.seen + int(hits[0])
        if self.lead == self.seen:
            self.lead += int(others[0]) if len(others) else len(hit)
        self.run = len(hit) - 1 - int(others[-1]) if len(others) else self.run + len(hit)
        self.seen += len(hit)
        self.hits += len(hits)


class Evidence:
    """A history as far as a diagnosis needs it.

    Attributes:
        limits: What the tallies and checks go by.
        scale: The scale of the wrapper.
        signals: What the rows said; knows the modalities.
        tallies: Counts of all rows, by name.
        largest: Largest finite `fraction` of all rows, and its step, `largest_step`.
        sample: The quantities of up to 20,000 rows, all of them where there are fewer.
    """

    def __init__(self, rows: Iterable[Row], scale: float | None, limits: Thresholds) -> None:
        self.limits = limits
        self.scale = scale
        self.signals = Signals()
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.largest, self.largest_step = 0.0, math.nan
        whole = join_parts(rows)
        while chunk := list(islice(whole, _CHUNK)):
            with np.errstate(all="ignore"):  # numbers of a log may be of any size
                self._count(self.signals.add(chunk))
        self.sample: Columns = self.signals.sample()

    def column(self, name: str) -> Column:
        """A quantity of the sample."""
        return self.sample.get(name, np.full_like(self.sample["step"], np.nan))

    def _count(self, columns: Columns) -> None:
        steps, nothing = columns["step"], np.full(len(columns["step"]), np.nan)

        def count(name: str, hit: Flags, seen: Flags) -> None:
            self.tallies[name].add(steps, hit, seen)

        for name in ("loss", "report/uncapped", "real_norm"):
            values = columns.get(name, nothing)
            count(f"{name} broken", np.isinf(values), ~np.isnan(values))
        fraction, finite = columns["fraction"], np.isfinite(columns["fraction"])
        count("fraction above", fraction > self.limits.fraction * (1 + 1e-6), finite)
        top = np.where(finite, fraction, 0.0).argmax()
        if finite[top] and fraction[top] > self.largest:
            self.largest, self.largest_step = float(fraction[top]), float(steps[top])
        dummy = columns["dummy_norm"]
        due = (columns["due"] > 0) & ~(columns.get("report/num_params", nothing) == 0)
        count("dummy missing", np.isnan(dummy), due)
        empty = columns.get("report/num_elements", nothing) == 0  # as of sparse embeddings alone
        count("dummy zero", dummy == 0, due & np.isfinite(dummy) & ~empty)
        flags = [columns[f"contains/{name}"] for name in self.signals.modalities]
        sizes = [columns[f"size/{name}"] for name in self.signals.modalities]
        logged: Flags = np.any([~np.isnan(size) for size in [nothing, *sizes]], axis=0)
        for name, flag, size in zip(self.signals.modalities, flags, sizes, strict=True):
            count(f"contains/{name}", flag == 1, ~np.isnan(flag))
            count(f"silent/{name}", np.isnan(size) | (size == 0), (flag == 1) & logged)
            # Frozen parameters have neither: a zero gradient is one that was computed.
            trainable = (flag == 1) & (size == 0) | (flag == 0) & (size > 0)
            count(f"trainable/{name}", trainable, logged)
        number = np.sum(flags or [nothing], axis=0)
        count("single", number == 1, ~np.isnan(number))


class Sign(NamedTuple):
    """A check that found nothing wrong.

    Attributes:
        text: What it saw.
        numbers: The same for programs.
    """

    text: str
    numbers: dict[str, Any]


# Of a check that could not be made, what the history lacks.
Outcome: TypeAlias = Finding | Sign | str
