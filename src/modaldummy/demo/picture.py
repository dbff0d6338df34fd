"""The picture of a run: what the loss did, and how large each modality's gradient was."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modaldummy.demo.training import Record

# Okabe and Ito's palette, which readers with any colour vision can tell apart; shapes help too.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
_WINDOW = 9


def draw(records: Sequence[Record], modalities: Sequence[str], title: str, path: Path) -> None:
    """Write the loss and the gradient norm of each modality against the step as a PNG."""
    is_whole = all(record[f"grad_norm/{name}"] for record in records for name in modalities)
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(
        2 if is_whole else 3, 1, sharex=True, height_ratios=(4, 6, 1)[: 2 + (not is_whole)]
    )
    losses, norms = rows[:2]
    for name, (colour, marker) in zip(modalities, _STYLES, strict=True):
        steps, errors = _series(records, f"loss/{name}")
        losses.scatter(steps, errors, s=10, marker=marker, color=colour, alpha=0.4, lw=0)
        if steps:
            losses.plot(steps, _running_median(errors), color=colour, lw=2, label=name)
        _draw_norms(norms, records, name, colour, marker)
    losses.axhline(1.0, color="grey", lw=1, ls=":")
    last = len(records)
    losses.text(last, 1.03, "predicting the mean", fontsize=8, color="dimgrey", ha="right")
    losses.set_ylabel("reconstruction error\n(line: running median)")
    losses.legend(loc="lower left", ncols=len(modalities), frameon=False)
    norms.set_ylabel("gradient norm (log scale)")
    if not is_whole:
        _draw_missing(rows[2], records, modalities)
    for axes in rows:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.set_ylim(bottom=0)
    figure.legend(
        *norms.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(modalities),
        frameon=False,
    )
    figure.savefig(path, dpi=120)


def _draw_norms(axes: Axes, records: Sequence[Record], name: str, colour: str, marker: str) -> None:
    """Filled marks while active, hollow ones while inactive."""
    axes.set_yscale("log")
    for active, face in ((1.0, colour), (0.0, "none")):
        chosen = [record for record in records if record[f"active/{name}"] == active]
        steps, values = _series(chosen, f"grad_norm/{name}")
        if values:
            label = f"{name} {'active' if active else 'inactive'}"
            axes.scatter(
                steps, values, s=16, marker=marker, color=colour, facecolors=face, label=label
            )


def _draw_missing(axes: Axes, records: Sequence[Record], modalities: Sequence[str]) -> None:
    """A row of crosses for each modality, where it had no gradient at all."""
    for row, (name, (colour, _)) in enumerate(zip(modalities, _STYLES, strict=True)):
        missing = [record for record in records if record[f"grad_norm/{name}"] is None]
        steps, _ = _series(missing, "step")
        axes.scatter(steps, [row] * len(steps), s=14, marker="x", color=colour, lw=0.8)
    axes.set_yticks(range(len(modalities)), modalities, fontsize=8)
    axes.set_ylim(len(modalities) - 0.5, -0.5)
    axes.set_ylabel("no\ngradient", rotation=0, ha="right", va="center")


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key where it has a value."""
    points = [(record["step"], record[key]) for record in records if record[key] is not None]
    return [step for step, _ in points if step is not None], [v for _, v in points if v is not None]


def _running_median(values: Sequence[float]) -> list[float]:
    """Median of each value and up to `_WINDOW - 1` values before it."""
    ends = range(1, len(values) + 1)
    return [median(values[max(0, end - _WINDOW) : end]) for end in ends]
