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
from modaldummy._diagnose.signals import Column, Flags
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
    evidence, findings = diagnosis.evidence, diagnosis.findings
    has_fraction = bool(_positive(evidence.column("fraction")).any())
    heights = [4, 6, 2] if has_fraction else [4, 6]
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
    _mark(rows, findings)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontweight="bold")
    colour = _SEVERITIES[findings[0].severity] if findings else _WELL
    lines = [textwrap.shorten(f"{finding.code}: {finding.message}", 118) for finding in findings]
    heading = first_few(lines, _NAMED, "\n") or "Nothing wrong was found."
    rows[0].set_title(_literal(heading), loc="left", fontsize=9, color=colour)
    handles, labels = rows[1].get_legend_handles_labels()
    columns = min(len(_styles(evidence)), 6) or 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)


def _literal(text: str) -> str:
    """Text that is drawn as it is: between dollars, names would be read as formulas."""
    return text.replace("$", r"\$")


def _positive(values: Column) -> Flags:
    """Where a logarithmic scale has a place for the value."""
    return np.isfinite(values) & (values > 0)


def _mark(rows: Sequence[Axes], findings: Sequence[Finding]) -> None:
    """A line wherever findings begin, with their codes."""
    begun: dict[float, list[Finding]] = {}
    for finding in findings:
        if finding.severity != "info" and "first_step" in finding.evidence:
            begun.setdefault(finding.evidence["first_step"], []).append(finding)
    for start, some in begun.items():
        colour = _SEVERITIES[some[0].severity]
        for axes in rows:
            axes.axvline(start, color=colour, lw=1.2, ls="--", zorder=0)
        codes = "\n".join(f" {finding.code}" for finding in some)
        place = rows[0].get_xaxis_transform()
        rows[0].text(start, 1, codes, transform=place, va="top", fontsize=8, color=colour)


def _styles(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Colour and marker of each modality, tuple keys of the map included."""
    names = [*evidence.signals.modalities, *evidence.signals.fusions]
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(names)
    }


def _draw_loss(axes: Axes, evidence: Evidence) -> None:
    """Losses in the colour of the only modality of their batch, grey if there were several."""
    steps, losses, styles = evidence.column("step"), evidence.column("loss"), _styles(evidence)
    contained = {name: evidence.column(f"contains/{name}") == 1 for name in styles}
    number = sum(contained.values(), np.zeros(len(steps)))
    grey: dict[str, Any] = {"color": "grey", "marker": "o"}
    curves = [(name, contained[name] & (number == 1), 2.0, styles[name]) for name in styles]
    curves.append(("several" if number.any() else "loss", number != 1, 1.5, grey))
    for name, group, width, style in curves:
        own = group & np.isfinite(losses)
        if own.any():
            axes.scatter(steps[own], losses[own], s=10, alpha=0.4, lw=0, **style)
            median, colour = _running_median(losses[own]), style["color"]
            axes.plot(steps[own], median, color=colour, lw=width, label=_literal(name))
    _at_edge(axes, steps[np.isinf(losses)], 0.97, "x", "not finite")
    finite = losses[np.isfinite(losses)]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * np.median(finite):
        axes.set_yscale("log")
    elif len(finite) and finite.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("loss\n(line: running median)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def _draw_norms(axes: Axes, evidence: Evidence) -> None:
    """Filled marks while active, hollow ones while inactive."""
    steps, dummy = evidence.column("step"), evidence.column("dummy_norm")
    rest = _positive(dummy)  # of no modality in particular, as of labels
    for name, style in _styles(evidence).items():
        norms, trained = evidence.column(f"size/{name}"), evidence.column(f"trained/{name}")
        for active, face in ((1, style["color"]), (0, "none")):
            own = (trained == active) & _positive(norms)
            if own.any():
                label = f"{_literal(name)} {'active' if active else 'inactive'}"
                axes.scatter(steps[own], norms[own], s=16, facecolors=face, label=label, **style)
        rest &= ~((trained == 0) & _positive(norms))
    if rest.any():
        axes.scatter(steps[rest], dummy[rest], s=16, fc="none", color="grey", label="inactive")
    axes.set_yscale("log")
    due = evidence.column("due") == 1
    missing = due & ~np.isfinite(dummy) & ~np.isinf(evidence.column("loss"))
    broken = np.isinf(evidence.column("real_norm"))
    _at_edge(axes, steps[broken], 0.97, "x", "active, NaN or infinite")
    _at_edge(axes, steps[due & (dummy == 0)], 0.03, "_", "inactive, zero")
    _at_edge(axes, steps[missing], 0.03, "x", "inactive, no gradient")
    axes.set_ylabel("gradient norm (log scale)")


def _draw_fraction(axes: Axes, evidence: Evidence) -> None:
    steps, fractions = evidence.column("step"), evidence.column("fraction")
    own, limit = _positive(fractions), evidence.limits.fraction
    axes.set_yscale("log")
    axes.scatter(steps[own], fractions[own], s=6, color="black", lw=0)
    axes.axhline(limit, color="grey", lw=1, ls=":")
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.text(1, limit, f"bound {limit:g} ", fontsize=8, color="dimgrey", **place)
    axes.set_ylabel("|dummy| / |real|")


def _at_edge(axes: Axes, steps: Column, height: float, marker: str, label: str) -> None:
    """Red marks for what has no place on the scale."""
    if len(steps):
        heights, place = np.full(len(steps), height), axes.get_xaxis_transform()
        red = _SEVERITIES["error"]
        axes.scatter(steps, heights, s=18, marker=marker, color=red, label=label, transform=place)


def _running_median(values: Column) -> Column:
    """Median of each value and as many before it as after it, at most `_WINDOW` in all."""
    last = len(values) - 1
    reach = [min(_WINDOW // 2, place, last - place) for place in range(len(values))]
    return np.array([np.median(values[i - n : i + n + 1]) for i, n in enumerate(reach)])
