"""The summary of a run of the demo, as numbers and as a table."""

from collections.abc import Sequence
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from modaldummy.demo.training import Record, Training

_HEADINGS = ["elements", "steps\nactive", "steps\ninactive"]
_HEADINGS += ["gradient norm\nactive", "gradient norm\ninactive", "parameters\nmissed"]
_CAPTION = "Gradient norms: smallest - largest. Missed: no gradient after some backward pass."


class ModalitySummary:
    """Gradient norms of one modality over a run.

    Attributes:
        name: The modality.
        num_params: Its number of parameters.
        num_elements: Number of elements of these parameters.
        active: Gradient norms at the steps where it was active.
        inactive: Gradient norms at the steps where it was inactive and had a gradient.
        num_inactive: Number of steps where it was inactive, with a gradient or without.
        missed: Names of its parameters that had no gradient after some backward pass.
        ratio: Median norm while active divided by the median while inactive; None without both.
    """

    def __init__(self, training: Training, name: str) -> None:
        parameters = training.wrapper.named_parameters(name)
        active = [record for record in training.records if record[f"active/{name}"]]
        inactive = [record for record in training.records if not record[f"active/{name}"]]
        self.name = name
        self.num_params = len(parameters)
        self.num_elements = sum(parameter.numel() for parameter in parameters.values())
        self.active = _logged(active, f"grad_norm/{name}")
        self.inactive = _logged(inactive, f"grad_norm/{name}")
        self.num_inactive = len(inactive)
        self.missed = sorted(training.missed[name])
        self.ratio: float | None = None
        if self.active and self.inactive:
            self.ratio = median(self.active) / median(self.inactive)


def largest_fraction(records: Sequence[Record]) -> float | None:
    """Largest `|dummy| / |real|` of a run; None if it did not use the wrapper."""
    return max(_logged(records, "modaldummy/fraction"), default=None)


def table(summaries: Sequence[ModalitySummary], title: str) -> Table:
    """Make the table that the demo prints."""
    columns = [Column(heading, justify="right", no_wrap=True) for heading in _HEADINGS]
    result = Table(Column("modality", no_wrap=True), *columns, title=title, caption=_CAPTION)
    result.box, result.pad_edge, result.collapse_padding = SIMPLE_HEAD, False, True
    for row in summaries:
        counts = [f"{row.num_elements:,}", str(len(row.active)), str(row.num_inactive)]
        missed = f"{len(row.missed)} of {row.num_params}"
        result.add_row(row.name, *counts, _range(row.active), _range(row.inactive), missed)
    return result


def _logged(records: Sequence[Record], key: str) -> list[float]:
    """The numbers that were recorded at a key."""
    return [value for record in records if (value := record.get(key)) is not None]


def _range(norms: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{norm:.2g}" for norm in (min(norms), max(norms))) if norms else ("none",)
    return " - ".join(ends)
