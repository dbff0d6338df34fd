"""The command `python -m modaldummy demo`."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.doctor import verdict
from modaldummy._diagnose.picture import draw
from modaldummy.demo.scans import MODALITIES, SOURCES, load_scans
from modaldummy.demo.summary import ModalitySummary, largest_fraction, table
from modaldummy.demo.training import Training

MAX_FRACTION = 1e-4  # the wrapper's own default


def run(arguments: argparse.Namespace) -> int:
    """Train, print a summary, and write metrics, picture and sources.

    Returns:
        0 on success, 1 if a parameter has missed a gradient or the dummy term was too large, 2 if
        the output cannot be written. A run without the wrapper does not return 1.
    """
    console = Console()
    use_dummy = not arguments.no_dummy
    out: Path = arguments.out or Path("demo-output" if use_dummy else "demo-output-no-dummy")
    present = list(dict.fromkeys(arguments.modalities or MODALITIES))
    training = Training(load_scans(), present, seed=arguments.seed, use_dummy=use_dummy)
    title = f"{arguments.steps} steps {'with' if use_dummy else 'without'} the dummy term"
    one_or_two = "one or two of " if len(present) > 1 else ""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _train(training, arguments.steps, out / "metrics.jsonl")
        (out / "SOURCES.md").write_text(SOURCES, encoding="utf-8")
        diagnosis = examine(out / "metrics.jsonl")
        heading = f"Batches of {one_or_two}{', '.join(present)}: {title}"
        draw(diagnosis, heading, out / "demo.png")
    except OSError as error:
        print(f"Cannot write to {out}: {error}. Choose another folder by --out.", file=sys.stderr)
        return 2
    promises_kept = _report(console, training, title)
    for finding in diagnosis.findings:
        console.print(f"{finding}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(f"The doctor says: {verdict(diagnosis)}", highlight=False)
    console.print(f"Wrote metrics.jsonl, demo.png and SOURCES.md to {out}/", highlight=False)
    return 0 if promises_kept or not use_dummy else 1


def _train(training: Training, steps: int, path: Path) -> None:
    with path.open("w", encoding="utf-8") as log, Progress() as progress:
        task = progress.add_task("training", total=steps)
        for record in training.run(steps):
            log.write(json.dumps(record) + "\n")
            progress.update(task, advance=1, description=f"training, loss {record['loss']:.3f}")


def _report(console: Console, training: Training, title: str) -> bool:
    """Print the table and the numbers below it.

    Returns:
        Whether no parameter has missed a gradient and the dummy term stayed within its bound.
    """
    summaries = [ModalitySummary(training, name) for name in training.wrapper.modalities]
    console.print(table(summaries, title))
    missed = [name for summary in summaries for name in summary.missed]
    console.print(f"{len(missed)} parameters missed a gradient", end=":\n" if missed else ".\n")
    for name in missed:
        console.print(f"  {name}", highlight=False)
    fraction = largest_fraction(training.records)
    if fraction is not None:
        console.print(f"Largest |dummy| / |real|: {fraction:.1e}; the bound is {MAX_FRACTION:.0e}.")
    ratios = [f"{s.name} {s.ratio:,.0f} : 1" for s in summaries if s.ratio is not None]
    if ratios:
        console.print(f"Real : dummy gradient, median norms: {', '.join(ratios)}.")
    return not missed and (fraction or 0.0) <= MAX_FRACTION
