"""Pictures of what the benchmarks found."""

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
