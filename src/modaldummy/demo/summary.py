"""The summary of a run of the demo, as numbers and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from modaldummy.demo.training import Record, Training

_HEADINGS = (
    "elements",
    "steps\nactive",
    "steps\ninactive",
    "gradient norm\nactive",
    "gradient norm\ninactive",
    "parameters\nmissed",
)


@dataclass(frozen=True)
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
    """

    name: str
    num_params: int
    num_elements: int
    active: tuple[float, ...]
    inactive: tuple[float, ...]
    num_inactive: int
    missed: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """Median norm while active divided by the median while inactive; None without both."""
        if not self.active or not self.inactive:
            return None
        return median(self.active) / median(self.inactive)


def summarise(training: Training) -> list[ModalitySummary]:
    """Summarise each modality, in map order."""
    summaries = []
    for name in training.wrapper.modalities:
        parameters = training.wrapper.named_parameters(name)
        active = [record for record in training.records if record[f"active/{name}"]]
        inactive = [record for record in training.records if not record[f"active/{name}"]]
        summaries.append(
            ModalitySummary(
                name=name,
                num_params=len(parameters),
                num_elements=sum(parameter.numel() for parameter in parameters.values()),
                active=_norms(active, name),
                inactive=_norms(inactive, name),
                num_inactive=len(inactive),
                missed=tuple(sorted(training.missed[name])),
            )
        )
    return summaries


def largest_fraction(records: Sequence[Record]) -> float | None:
    """Largest `|dummy| / |real|` of a run; None if it did not use the wrapper."""
    fractions = (record.get("modaldummy/fraction") for record in records)
    return max((fraction for fraction in fractions if fraction is not None), default=None)


def table(summaries: Sequence[ModalitySummary], title: str) -> Table:
    """Make the table that the demo prints."""
    result = Table(
        title=title,
        caption="Gradient norms: smallest - largest. Missed: no gradient after some backward pass.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("modality", no_wrap=True)
    for heading in _HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        inactive = _range(row.inactive) if row.inactive or not row.num_inactive else "none"
        result.add_row(
            row.name,
            f"{row.num_elements:,}",
            str(len(row.active)),
            str(row.num_inactive),
            _range(row.active),
            inactive,
            f"{len(row.missed)} of {row.num_params}",
        )
    return result


def _norms(records: Sequence[Record], name: str) -> tuple[float, ...]:
    norms = (record.get(f"grad_norm/{name}") for record in records)
    return tuple(norm for norm in norms if norm is not None)


def _range(norms: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{norm:.2g}" for norm in (min(norms), max(norms))) if norms else ("-",)
    return " - ".join(ends)
