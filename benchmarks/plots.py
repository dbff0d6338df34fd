"""Pictures of what the benchmarks found."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLOURS = {
    "0 * sum": "#b0b0b0",
    "stack(sum)": "#808080",
    "ours": "#1b6ca8",
    "ours, fused kernels": "#0f3f63",
    "ours, scale=0.0": "#5fa8d3",
    "ours, scale=None": "#f4a259",
    "limit, fill each": "#404040",
}


def draw_sums(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time of forward plus backward as a multiple of the naive loop's, a panel for each mode."""
    rows = [row for row in rows if row["phase"] == "both" and row["contender"] in COLOURS]
    modes = list(dict.fromkeys(row["gradients"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = [name for name in COLOURS if any(row["contender"] == name for row in rows)]
    figure, axes = plt.subplots(len(modes), sharex=True, squeeze=False, figsize=(10, 7))
    width = 0.8 / len(names)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for place, name in enumerate(names):
            own = {
                r["shape"]: r["to_naive"]
                for r in rows
                if (r["gradients"], r["contender"]) == (mode, name)
            }
            where = [index + (place - (len(names) - 1) / 2) * width for index in range(len(shapes))]
            heights = [own.get(shape, float("nan")) for shape in shapes]
            axis.bar(where, heights, width, label=name, color=COLOURS[name])
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylim(0.02, 2)
        axis.yaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_ylabel("time / naive loop")
        axis.set_title({"fresh": "no gradients yet", "accumulate": "adding to gradients"}[mode])
        axis.spines[["top", "right"]].set_visible(False)
    sizes = {row["shape"]: f"{row['tensors']:,} tensors\n{_short(row['elements'])}" for row in rows}
    axes[-1, 0].set_xticks(range(len(shapes)), [f"{shape}\n{sizes[shape]}" for shape in shapes])
    first = rows[0]
    figure.suptitle(
        f"Forward plus backward of the dummy term: {first['device']}, torch {first['torch']}"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit} elements"
    return f"{count} elements"


def draw_drift(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Displacement against inactive steps, a panel for each start: the dummy alone, and held."""
    starts = list(dict.fromkeys(row["start"] for row in rows))
    kinds = list(dict.fromkeys(row["optimizer"] for row in rows))
    colours = {kind: plt.colormaps["tab20"](number % 20) for number, kind in enumerate(kinds)}
    figure, axes = plt.subplots(1, len(starts), sharey=True, squeeze=False, figsize=(13, 6))
    for axis, start in zip(axes[0], starts, strict=True):
        ends = {}
        for kind in kinds:
            steps, moved = _displacements(rows, start, kind, "1e-7")
            axis.plot(steps, moved, color=colours[kind])
            axis.plot(*_displacements(rows, start, kind, "1e-7 + hold"), "k", linewidth=4)
            ends[kind] = moved[-1]
        for kind, height in _spread(ends).items():
            axis.annotate(
                kind,
                (1.02, height),
                xycoords=axis.get_yaxis_transform(),
                color=colours[kind],
                verticalalignment="center",
                fontsize=8,
            )
        axis.axhline(1, color="grey", linestyle=":")
        axis.text(1.2, 1.2, "as large as the weights themselves", color="grey", fontsize=8)
        axis.text(1.2, _ZERO / 4, "with hold: exactly 0, every optimizer", fontweight="bold")
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=_ZERO)
        axis.set_ylim(0, 1e8)
        axis.yaxis.set_major_locator(FixedLocator([0, *(10.0**power for power in range(-8, 9, 2))]))
        axis.set_xlim(1, max(row["steps"] for row in rows))
        axis.set_title(f"a modality {start}")
        axis.set_xlabel("training steps without it")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("displacement of its weights / their size")
    figure.suptitle("What optimizers make of a dummy gradient of 1e-7 (learning rate 1e-4)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_ZERO = 1e-9  # below it the axis is linear, so that it has a place for zero


def _displacements(
    rows: Sequence[dict[str, Any]], start: str, kind: str, dummy: str
) -> tuple[list[int], list[float]]:
    own = [r for r in rows if (r["start"], r["optimizer"], r["dummy"]) == (start, kind, dummy)]
    return [r["steps"] for r in own], [r["displacement_relative"] for r in own]


def _spread(heights: dict[str, float], gap: float = 0.42) -> dict[str, float]:
    """Heights for labels on a logarithmic axis, none within `gap` decades of the next."""
    found: dict[str, float] = {}
    last = math.inf
    for name, height in sorted(heights.items(), key=lambda item: -item[1]):
        last = min(math.log10(max(height, _ZERO)), last - gap)
        found[name] = 10**last
    return found
