"""What rows of logged metrics say, whatever wrote them: one column for each quantity."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from modaldummy._diagnose.history import Row
from modaldummy._diagnose.keys import LOSSES, role_of

Column: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
Flags: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool]]
# Quantity to its values: NaN where a row says nothing about it, infinity where it says NaN or
# infinity.
Columns: TypeAlias = dict[str, Column]

_UNNAMED = ("active", "inactive")  # labels that name no modality; dashboards had both
_FLAGS = {"present", "active"}  # roles of keys that name a modality and nothing else
_SHOWN = 100  # unknown keys that are remembered
_NAMING = {"present", "active", "missing", "norm", "label", "constant"}  # of any modality
MOST = 500  # quantities of modalities that are read: each is a column of thousands of rows


class Signals:
    """Reads rows in chunks, and keeps a sample of up to `room` of them.

    The quantities, a column each: `step`, `loss`; `report/<key>` of a `StepReport`; `grad/ranks`
    and `grad/ratio`; `total`, of all gradients under constant keys; for each modality `norm/<m>`,
    and 1 or 0 for whether the batch contains it, `contains/<m>`, and whether the gradients are of
    it, `trained/<m>`; and what follows from these: `set`, a number for each set of active
    modalities; `real_norm` and `dummy_norm`, of all that was trained and of all that was not;
    `due`, 1 where a dummy gradient should be among what was logged.

    Attributes:
        num_rows: How many rows there were.
        modalities: In the order in which they were met.
        fusions: Tuple keys of a map, such as `T1-dMRI`, to the modalities that they are of.
        ignored: Some keys that mean nothing here.
        is_cut: Whether there were more quantities of modalities than are read.
    """

    def __init__(self, room: int = 20_000) -> None:
        self.num_rows = 0
        self.modalities: list[str] = []
        self.fusions: dict[str, list[str]] = {}
        self.ignored: dict[str, None] = {}
        self.is_cut = False
        self._named: set[str] = set()
        self._met: dict[str, set[str]] = {}
        self._loss: str | None = None
        self._step = np.nan
        self._room = room
        # Rows are kept at random: of every other row, batches that take turns would show one kind.
        self._random = np.random.default_rng(0)
        self._share = 1.0
        self._kept: list[tuple[Column, Columns]] = []

    def add(self, rows: Sequence[Row]) -> Columns:
        """The quantities in these rows, of shape `[rows]` each."""
        columns = self._read(rows)
        self._name()
        columns["step"] = self._steps(columns.get("step", _nothing(len(rows))))
        self.num_rows += len(rows)
        columns |= self._conclude(columns, len(rows))
        self._kept.append(_below(self._share, self._random.random(len(rows)), columns))
        while sum(len(draws) for draws, _ in self._kept) > self._room:
            self._share /= 2
            self._kept = [_below(self._share, *chunk) for chunk in self._kept]
        return columns

    def sample(self) -> Columns:
        """The quantities of the rows that were kept, in order."""
        names = dict.fromkeys(name for _, columns in self._kept for name in columns)
        return {
            name: np.concatenate([c.get(name, _nothing(len(draws))) for draws, c in self._kept])
            for name in names
        }

    def _steps(self, steps: Column) -> Column:
        """Where a row names no step that of the row before; numbers of rows before the first."""
        last = np.maximum.accumulate(np.where(np.isfinite(steps), np.arange(len(steps)), -1))
        steps = np.where(last < 0, self._step, steps[last])
        self._step = float(steps[-1])
        return _first(steps, np.arange(self.num_rows + 1.0, self.num_rows + len(steps) + 1))

    def _read(self, rows: Sequence[Row]) -> Columns:
        """One column for each role and modality that a key of the rows stands for."""
        columns: Columns = {}
        nothing = _nothing(len(rows))
        # Few rows differ in their keys.
        for key in dict.fromkeys(key for keys in dict.fromkeys(map(tuple, rows)) for key in keys):
            role, name = role_of(str(key))
            if not role:
                if len(self.ignored) < _SHOWN:
                    self.ignored[str(key)] = None
                continue
            full = f"{role}/{name}" if name else role
            if role in _NAMING and full not in self._named:
                if len(self._named) == MOST:
                    self.is_cut = True
                    continue
                self._named.add(full)
            values = np.array([_number(row.get(key)) for row in rows])
            if role == "constant":  # each parameter once, while norms share some
                finite = np.where(np.isinf(values), np.nan, values)
                columns["total"] = _hypot([columns.get("total", nothing), finite], len(rows))
            if role == "label":
                columns[full] = _hypot([columns.get(full, nothing), values], len(rows))
            else:
                columns[full] = _first(columns.get(full, nothing), values)
            if role in ("present", "active", "norm", "label") and name not in _UNNAMED:
                self._met.setdefault(name, set()).add(role)
        # Of a table, a row that lacks our keys has NaN for them; we never log that for a flag.
        flags = [v for k, v in columns.items() if k.startswith(("present/", "report/num_"))]
        hole = np.any([np.isinf(flag) for flag in flags] or [np.zeros(len(rows), bool)], axis=0)
        return {name: np.where(hole & np.isinf(v), np.nan, v) for name, v in columns.items()}

    def _name(self) -> None:
        """Tell modalities from fusions, and both from what others log, as `grad_norm/total`."""
        flagged = any(roles & _FLAGS for roles in self._met.values())
        single: list[str] = []
        self.fusions = {}
        # Modalities too may have hyphens: `rs-fMRI`, `T1-rs-fMRI`.
        for name in sorted(self._met, key=len):
            roles = self._met[name]
            parts = [] if roles & _FLAGS else _split(name, single)
            if parts:
                self.fusions[name] = parts
            elif not flagged or roles != {"norm"}:
                single.append(name)
        self.modalities = [name for name in self._met if name in single]

    def _conclude(self, columns: Columns, size: int) -> Columns:
        """What follows from the quantities of each row."""

        def column(name: str) -> Column:
            return columns.get(name, _nothing(size))

        # One loss for the whole history, not now this and now that.
        self._loss = self._loss or next((n for n in LOSSES if f"loss/{n}" in columns), None)
        names = [*self.modalities, *self.fusions]
        inactive, active = column("label/inactive"), column("label/active")
        labels = {name: column(f"label/{name}") for name in names} | {"active": active}
        labelled = _known([inactive, *labels.values()])
        contained, trained = self._flags(column, labels, labelled)
        constants = {name: column(f"constant/{name}") for name in names}
        norms = _norms(column, constants)
        of_active, of_inactive = (
            _hypot([np.where(trained[name] == flag, norms[name], np.nan) for name in names], size)
            for flag in (1, 0)
        )
        # Constant keys count a shared parameter once, norms of modalities more than that.
        ratio = column("grad/ratio")
        dummy = column("total") / np.hypot(1.0, np.where(np.isinf(ratio), np.nan, ratio))
        of_active, of_inactive = _first(dummy * ratio, of_active), _first(dummy, of_inactive)
        logged = labelled | _known([column("whole"), *constants.values(), *norms.values()])
        idle = _known([inactive, *(np.where(flag == 0, 0, np.nan) for flag in trained.values())])
        bits = [contained[name] * 2.0**bit for bit, name in enumerate(self.modalities)]
        return {
            **self._losses(column),
            **{f"contains/{name}": flag for name, flag in contained.items()},
            **{f"trained/{name}": flag for name, flag in trained.items()},
            **{f"size/{name}": _first(norms[name], labels[name]) for name in names},
            "set": np.sum(bits, axis=0) if bits else _nothing(size),
            "real_norm": _first(
                np.where(labelled, _hypot(labels.values(), size), of_active), column("overall")
            ),
            "dummy_norm": np.where(labelled, inactive, of_inactive),
            "due": (idle & logged).astype(float),
        }

    def _losses(self, column: Callable[[str], Column]) -> Columns:
        """The loss, and the dummy's share of it."""
        real, dummy = column("report/real"), np.abs(column("report/dummy"))
        # `wrapper.dummy` knows no real loss: it reports NaN for it, and a dummy all the same.
        alone = np.isinf(real) & np.isfinite(dummy) & (dummy > 0)
        loss = column(f"loss/{self._loss}") if self._loss else np.where(alone, np.nan, real)
        size = np.where(alone & np.isfinite(loss) & (loss != 0), np.abs(loss), np.nan)
        return {"loss": loss, "fraction": np.where(alone, dummy / size, column("report/fraction"))}

    def _flags(
        self, column: Callable[[str], Column], labels: Columns, labelled: Flags
    ) -> tuple[Columns, Columns]:
        """What the batch contains, and what the gradients are of: maybe of more batches."""
        contained, trained = {}, {}
        for name in self.modalities:
            label = np.where(labelled & np.isnan(labels["active"]), ~np.isnan(labels[name]), np.nan)
            label = np.where(~np.isnan(column("whole")), 1.0, label)
            contained[name] = _first(column(f"present/{name}"), column(f"active/{name}"), label)
            trained[name] = _first(label, column(f"active/{name}"), column(f"present/{name}"))
        for name, parts in self.fusions.items():
            trained[name] = np.min([trained[part] for part in parts], axis=0)
            if "label" in self._met[name]:  # its parts may have been in different batches
                alone = labelled & np.isnan(labels[name]) & np.isnan(labels["active"])
                trained[name] = np.where(alone, 0.0, trained[name])
        return contained, trained


def _norms(column: Callable[[str], Column], constants: Columns) -> Columns:
    """Norm of each modality; nothing where constant keys say NaN since there is no gradient."""
    constant = _known([column("step") * np.nan, *constants.values()])
    norms = {}
    for name, values in constants.items():
        norm, frozen = column(f"norm/{name}"), constant & np.isnan(values)
        missing = column(f"missing/{name}") > 0
        norms[name] = np.where(np.isinf(norm) & (frozen | missing), np.nan, norm)
    return norms


def _number(value: Any) -> float:
    """A number as it is, NaN where there is none, infinity for one that is not finite."""
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf
    except (ValueError, TypeError, RuntimeError):  # the last is of tensors
        return math.nan
    return number if math.isfinite(number) else math.inf


def _split(name: str, words: Sequence[str]) -> list[str]:
    """Two or more of `words` that are `name` when joined by hyphens; none if it is not so.

    From its end on, each part once: there are more ways to split it than can be tried.
    """
    parts: list[str] = []
    rests: dict[int, list[str]] = {}
    for start in reversed([0, *(hyphen.end() for hyphen in re.finditer("-", name))]):
        begins = [word for word in words if name.startswith(f"{word}-", start)]
        ways = ([word, *rests[start + len(word) + 1]] for word in begins)
        parts = next((way for way in ways if len(way) > 1), [])
        rests[start] = [name[start:]] if name[start:] in words else parts
    return parts


def _nothing(size: int) -> Column:
    return np.full(size, np.nan)


def _first(*columns: Column) -> Column:
    """Of each row what the first column says that says something."""
    values = columns[-1]
    for column in reversed(columns[:-1]):
        values = np.where(np.isnan(column), values, column)
    return values


def _known(columns: Iterable[Column]) -> Flags:
    """Where any of the columns says something."""
    known: Flags = np.any([~np.isnan(column) for column in columns], axis=0)
    return known


def _hypot(columns: Iterable[Column], size: int) -> Column:
    """Root of the sum of squares of what is there; NaN where nothing is."""
    table = np.stack([_nothing(size), *columns])
    total = np.hypot.reduce(np.where(np.isnan(table), 0.0, table))
    return np.where(np.isnan(table).all(axis=0), np.nan, total)


def _below(share: float, draws: Column, columns: Columns) -> tuple[Column, Columns]:
    """Draws below `share`, and the rows that go with them."""
    kept = draws < share
    return draws[kept], {name: values[kept] for name, values in columns.items()}
