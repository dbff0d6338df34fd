"""The command `python -m modaldummy demo`."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from modaldummy.demo.picture import draw
from modaldummy.demo.scans import MODALITIES, SOURCES, load_scans
from modaldummy.demo.summary import largest_fraction, summarise, table
from modaldummy.demo.training import Training

BOUND = 1e-4


def run(arguments: argparse.Namespace) -> int:
    """Train, print what happened, write metrics, picture and sources; 0 if the promises held."""
    console = Console()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    present = arguments.modalities or MODALITIES
    use_dummy = not arguments.no_dummy
    training = Training(load_scans(), present, seed=arguments.seed, use_dummy=use_dummy)
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as log, Progress() as progress:
        task = progress.add_task("training", total=arguments.steps)
        for record in training.run(arguments.steps):
            log.write(json.dumps(record) + "\n")
            progress.update(task, advance=1, description=f"training, loss {record['loss']:.3f}")
    (out / "SOURCES.md").write_text(SOURCES, encoding="utf-8")
    title = f"{arguments.steps} steps, {'with' if use_dummy else 'without'} the dummy term"
    draw(
        training.records, MODALITIES, f"Batches of {', '.join(present)}: {title}", out / "demo.png"
    )
    held = _report(console, training, title)
    console.print(f"Wrote metrics.jsonl, demo.png and SOURCES.md to {out}/", highlight=False)
    return 0 if held or not use_dummy else 1


def _report(console: Console, training: Training, title: str) -> bool:
    """Print the table and the figures under it; whether every gradient arrived in bounds."""
    summaries = summarise(training)
    console.print(table(summaries, title))
    missed = [name for summary in summaries for name in summary.missed]
    console.print(f"{len(missed)} parameters missed a gradient", end=".\n" if not missed else ":\n")
    for name in missed:
        console.print(f"  {name}", highlight=False)
    fraction = largest_fraction(training.records)
    if fraction is None:
        return not missed
    console.print(f"Largest |dummy| / |real|: {fraction:.1e}; the bound is {BOUND:.0e}.")
    ratios = [f"{s.name} {s.ratio:,.0f} : 1" for s in summaries if s.ratio is not None]
    if ratios:
        console.print(f"Real : dummy gradient, median norms: {', '.join(ratios)}.")
    return not missed and fraction <= BOUND
