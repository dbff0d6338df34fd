"""The picture of a run: its loss, its gradients by modality, its dummy, and what was found when."""

import textwrap
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modaldummy._diagnose.diagnose import Diagnosis
from modaldummy._diagnose.evidence import Evidence
from modaldummy._diagnose.signals import Column
from modaldummy._errors import first_few
from modaldummy._findings import Finding

# Okabe and Ito's palette, which readers with any colour vision can tell apart; shapes help too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "os^Dv*"
_SEVERITIES = {"error": "#B00020", "warning": "#B36B00", "info": "dimgrey"}
_WELL = "#1B7F3B"
_WINDOW = 9
_NAMED = 5  # findings above the picture


@np.errstate(all="ignore")  # numbers of a log may be of any size
def draw(diagnosis: Diagnosis, title: str, path: str | PathLike[str]) -> None:
    """Write loss, gradient norms and the dummy's share of the loss against the step as a PNG."""
    evidence = diagnosis.evidence
    fractions = evidence.column("fraction")
    has_fraction = bool((np.isfinite(fractions) & (fractions > 0)).any())
    heights = [4, 6, 2][: 2 + has_fraction]
    figure = Figure(figsize=(9, 6.5 + has_fraction), layout="constrained")
    rows: Sequence[Axes] = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_loss(rows[0], evidence)
    _draw_norms(rows[1], evidence)
    if has_fraction:
        _draw_fraction(rows[2], evidence)
    for axes in rows:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark(rows, diagnosis.findings)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontweight="bold")
    heading = rows[0].set_title(_literal(_verdict(diagnosis.findings)), loc="left", fontsize=9)
    heading.set_color(_SEVERITIES[diagnosis.findings[0].severity] if diagnosis.findings else _WELL)
    handles, labels = rows[1].get_legend_handles_labels()
    columns = min(max(len(_styles(evidence)), 1), 6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)


def _literal(text: str) -> str:
    """Text that is drawn as it is: between dollars, names would be read as formulas."""
    return text.replace("$", r"\$")


def _verdict(findings: Sequence[Finding]) -> str:
    """What was found, in a line or two each."""
    if not findings:
        return "Nothing wrong was found."
    lines = []
    for finding in findings:
        start = finding.evidence.get("first_step")
        told = start is None or "step" in finding.message
        when = "" if told else f" from step {start:g} on"
        lines.append(textwrap.shorten(f"{finding.code}{when}: {finding.message}", 118))
    return first_few(lines, _NAMED, "\n")


def _mark(rows: Sequence[Axes], findings: Sequence[Finding]) -> None:
    """A line where each finding begins, with its code."""
    level: dict[float, int] = {}
    for finding in findings:
        start = finding.evidence.get("first_step")
        if start is None or finding.severity == "info":
            continue
        colour = _SEVERITIES[finding.severity]
        for axes in rows:
            axes.axvline(start, color=colour, lw=1.2, ls="--", zorder=0)
        place = level[start] = level.get(start, -1) + 1
        rows[0].annotate(
            finding.code,
            (start, 1),
            (3, -4 - 11 * place),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )


def _styles(evidence: Evidence) -> list[tuple[str, str, str]]:
    """Name, colour and marker of each modality, tuple keys of the map included."""
    names = [*evidence.signals.modalities, *evidence.signals.fusions]
    return [
        (name, _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(names)
    ]


def _draw_loss(axes: Axes, evidence: Evidence) -> None:
    """Losses in the colour of the only modality of their batch, grey if there were several."""
    steps, losses = evidence.column("step"), evidence.column("loss")
    held = {name: evidence.column(f"held/{name}") == 1 for name in evidence.signals.modalities}
    number = np.sum([*held.values(), np.zeros(len(steps))], axis=0)
    rest = np.isfinite(losses)
    for name, colour, marker in _styles(evidence):
        own = held.get(name, rest & False) & (number == 1) & rest
        if own.any():
            axes.scatter(
                steps[own], losses[own], s=10, marker=marker, color=colour, alpha=0.4, lw=0
            )
            axes.plot(
                steps[own], _running_median(losses[own]), color=colour, lw=2, label=_literal(name)
            )
    rest = rest & (number != 1)
    if rest.any():
        label = "several" if number.any() else "loss"
        axes.scatter(steps[rest], losses[rest], s=10, color="grey", alpha=0.4, lw=0)
        axes.plot(steps[rest], _running_median(losses[rest]), color="grey", lw=1.5, label=label)
    _at_edge(axes, steps[np.isinf(losses)], 0.97, "x", _SEVERITIES["error"], "not finite")
    finite = losses[np.isfinite(losses)]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * np.median(finite):
        axes.set_yscale("log")
    elif len(finite) and finite.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("loss\n(line: running median)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def _draw_norms(axes: Axes, evidence: Evidence) -> None:
    """Filled marks while active, hollow ones while inactive."""
    steps, due = evidence.column("step"), evidence.column("due") == 1
    drawn = np.zeros(len(steps), dtype=bool)
    for name, colour, marker in _styles(evidence):
        norms, taught = evidence.column(f"norm/{name}"), evidence.column(f"taught/{name}")
        labels = evidence.column(f"label/{name}")
        norms = np.where(np.isnan(norms) & (taught == 1), labels, norms)
        for active, face in ((1.0, colour), (0.0, "none")):
            own = (taught == active) & np.isfinite(norms) & (norms > 0)
            if own.any():
                drawn |= own & (taught == 0)
                label = f"{_literal(name)} {'active' if active else 'inactive'}"
                axes.scatter(
                    steps[own], norms[own], s=16, marker=marker, color=colour, facecolors=face,
                    label=label,
                )  # fmt: skip
    dummy = evidence.column("dummy_norm")
    rest = np.isfinite(dummy) & (dummy > 0) & ~drawn
    if rest.any():
        axes.scatter(
            steps[rest], dummy[rest], s=16, facecolors="none", color="grey", label="inactive"
        )
    if axes.collections:  # of norms, which are positive
        axes.set_yscale("log")
    red = _SEVERITIES["error"]
    broken = np.isinf(evidence.column("real_norm"))
    _at_edge(axes, steps[broken], 0.97, "x", red, "active, NaN or infinite")
    _at_edge(axes, steps[due & (dummy == 0)], 0.03, "_", red, "inactive, zero")
    none = due & ~np.isfinite(dummy) & ~np.isinf(evidence.column("loss"))
    _at_edge(axes, steps[none], 0.03, "x", red, "inactive, no gradient")
    axes.set_ylabel("gradient norm (log scale)")


def _draw_fraction(axes: Axes, evidence: Evidence) -> None:
    steps, fractions = evidence.column("step"), evidence.column("fraction")
    own = np.isfinite(fractions) & (fractions > 0)
    axes.set_yscale("log")
    axes.scatter(steps[own], fractions[own], s=6, color="black", lw=0)
    limit = evidence.limits.fraction
    axes.axhline(limit, color="grey", lw=1, ls=":")
    axes.text(1, limit, f"bound {limit:g} ", transform=axes.get_yaxis_transform(), fontsize=8,
              color="dimgrey", ha="right", va="bottom")  # fmt: skip
    axes.set_ylabel("|dummy| / |real|")


def _at_edge(
    axes: Axes, steps: Column, height: float, marker: Any, colour: str, label: str
) -> None:
    """Marks for what has no place on the scale."""
    if len(steps):
        axes.scatter(
            steps, np.full(len(steps), height), transform=axes.get_xaxis_transform(),
            s=18, marker=marker, color=colour, lw=0.9, label=label, clip_on=False,
        )  # fmt: skip


def _running_median(values: Column) -> Column:
    """Median of each value and as many before it as after it, at most `_WINDOW` in all."""
    last = len(values) - 1
    reach = [min(_WINDOW // 2, place, last - place) for place in range(len(values))]
    return np.array([np.median(values[i - n : i + n + 1]) for i, n in enumerate(reach)])
