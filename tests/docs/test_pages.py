"""The documentation: snippets run, tables are true, links lead somewhere."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixing import WAYS
from modaldummy import active_modalities
from modaldummy.demo.scans import SOURCES
from show_silent_mixing import cell as worst_of

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SNIPPETS = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES
}

_INTERVAL = ("", "_low", "_high")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page]], ids=relative)
def test_snippets_run(page: Path) -> None:
    """From top to bottom of a page, as a reader would type them; then the tests in them."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for code in SNIPPETS[page]:
        exec(compile(code, str(page), "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert bool(tests) == (page.name == "property-test-your-model.md")
    for test in tests:
        test()


def test_there_are_snippets() -> None:
    """Otherwise the test above would pass on a page without any."""
    pages = {relative(page) for page in PAGES if SNIPPETS[page]}
    assert pages == {
        "README.md",
        "docs/index.md",
        "docs/explanation/when-not-to-use-it.md",
        "docs/how-to/accelerate.md",
        "docs/how-to/any-model.md",
        "docs/how-to/batches.md",
        "docs/how-to/compile.md",
        "docs/how-to/ddp.md",
        "docs/how-to/fsdp.md",
        "docs/how-to/hold.md",
        "docs/how-to/hugging-face.md",
        "docs/how-to/lightning.md",
        "docs/how-to/loggers.md",
        "docs/how-to/monitor.md",
        "docs/how-to/property-test-your-model.md",
        "docs/how-to/your-own-loop.md",
        "docs/reference/batch-metadata.md",
        "docs/reference/diagnose.md",
        "docs/reference/preflight.md",
        "docs/tutorial.md",
    }


def test_the_cost_table_is_that_of_the_results() -> None:
    """Medians of forward plus backward, as the benchmark wrote them."""
    with (ROOT / "benchmarks/results/bench_sum-cpu.csv").open(newline="") as file:
        measured = {
            (row["contender"], row["shape"]): float(row["p50_ms"])
            for row in csv.DictReader(file)
            if (row["gradients"], row["phase"]) == ("fresh", "both")
        }
    page = (ROOT / "docs/explanation/cost.md").read_text()
    (header,) = re.findall(r"^\| in ms \| (.+) \|$", page, re.M)
    shapes = [cell.strip("` ") for cell in header.split("|")]
    rows = re.findall(
        r"^\| (naive loop|stack\(sum\)|ours[^|]*|limit[^|]*) \| ([\d. |]+) \|$", page, re.M
    )
    assert len(rows) == 7
    for name, cells in rows:
        for shape, cell in zip(shapes, cells.split("|"), strict=True):
            assert float(cell) == pytest.approx(measured[name.strip(), shape], abs=0.006)


def test_the_table_of_training_steps_is_that_of_the_results() -> None:
    """Medians, and ratios within a round with their intervals, as the benchmark wrote them."""
    with (ROOT / "benchmarks/results/bench_step-cpu.csv").open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    page = (ROOT / "docs/explanation/cost.md").read_text()
    table = page.partition("| / bare (95 %) |")[2].partition("\n\n")[0]
    ratio = r" \| ([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    found = re.findall(r"^\| ([^|-][^|]*) \| ([\d.]+)" + 2 * ratio, table, re.M)
    assert [name for name, *_ in found] == [name for name in rows if "all active" not in name]
    keys = ["p50_ms", *(f"to_{base}{end}" for base in ("bare", "naive") for end in _INTERVAL)]
    for name, *cells in found:
        wanted = [float(rows[name][key]) for key in keys]
        assert [float(cell) for cell in cells] == [
            pytest.approx(number, abs=0.06 if key == "p50_ms" else 0.0006)
            for key, number in zip(keys, wanted, strict=True)
        ]


def test_the_cost_in_the_readme_is_that_of_the_results() -> None:
    with (ROOT / "benchmarks/results/bench_sum-cpu.csv").open(newline="") as file:
        measured = {
            (row["contender"], row["shape"]): f"{float(row['to_naive']):.2f}"
            for row in csv.DictReader(file)
            if (row["gradients"], row["phase"]) == ("fresh", "both")
        }
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [
        (measured["ours", shape], measured["ours, scale=None", shape])
        for shape in ("small", "vit_b", "patches")
    ]


def test_the_table_of_watching_is_that_of_the_results() -> None:
    """Medians, and the ratio to the loop within a round, as the benchmark wrote them."""
    with (ROOT / "benchmarks/results/bench_monitor-cpu.csv").open(newline="") as file:
        rows = {(row["case"], row["contender"]): row for row in csv.DictReader(file)}
    page = (ROOT / "docs/how-to/monitor.md").read_text()
    table = page.partition("| times the loop's speed |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| ([^|-][^|]*)" + r" \| ([\d.]+)" * 4 + r" \|$", table, re.M)
    assert [case for case, *_ in found] == list(dict.fromkeys(case for case, _ in rows))
    for case, *cells, speed in found:
        for name, cell in zip(("loop", "foreach", "gradient_norms"), cells, strict=True):
            assert float(cell) == pytest.approx(float(rows[case, name]["p50_ms"]), abs=0.006)
        assert float(speed) == pytest.approx(
            1 / float(rows[case, "gradient_norms"]["to_loop"]), abs=0.06
        )


def test_the_table_of_silent_mixing_is_that_of_the_results() -> None:
    """Each cell the worst of its cases, as the benchmark wrote them."""
    with (ROOT / "benchmarks/results/show_silent_mixing-cpu.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        for name in ("error", "largest_gradient"):
            row[name] = float(row[name]) if row[name] else None
    page = (ROOT / "docs/explanation/ranks.md").read_text()
    table = page.partition("| engine | no help |")[2].partition("\n\n")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    expected = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        expected.append([engine, *(worst_of([r for r in own if r["way"] == way]) for way in WAYS)])
    assert found == expected


def test_the_table_of_steps_under_ddp_is_that_of_the_results() -> None:
    """Medians of ratios and their intervals, and what the text says of them."""
    with (ROOT / "benchmarks/results/bench_ddp-cpu.csv").open(newline="") as file:
        rows = {(row["contender"], row["shape"], row["ranks"]): row for row in csv.DictReader(file)}

    def ratios(contender: str, base: str) -> list[float]:
        columns = [(shape, ranks) for shape in ("vit", "norms") for ranks in "24"]
        return [float(rows[contender, *column][base]) for column in columns]

    page = (ROOT / "docs/explanation/ranks.md").read_text()
    table = page.partition("| contender |")[2].partition("\n\n")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    assert [name for name, *_ in found] == list(dict.fromkeys(name for name, _, _ in rows))
    for name, *cells in found:
        numbers = [re.findall(r"\d+\.?\d*", cell) for cell in cells]
        for key, place in {"": 0, "_low": 1, "_high": 2}.items():
            own = [float(three[min(place, len(three) - 1)]) for three in numbers]
            assert own == pytest.approx(ratios(name, f"to_find_unused{key}"), abs=0.0051), name
    ours = (
        ratios("ours", "to_find_unused")[:2] + ratios("ours, gradient_only", "to_find_unused")[:2]
    )
    assert [f"{ratio:.2f}" for ratio in ours] == ["1.14", "1.07", "1.07", "1.04"]
    to_naive = ratios("ours, scale=None", "to_naive")
    assert [f"{ratio:.2f}" for ratio in to_naive] == ["0.93", "0.94", "0.81", "0.79"]
    peaks = {n: float(rows[n, "vit", "2"]["peak_MB"]) for n, shape, _ in rows if shape == "vit"}
    assert round(peaks.pop("find_unused_parameters")) == 423
    assert (round(min(peaks.values())), round(max(peaks.values()))) == (483, 490)


def test_the_drift_table_is_that_of_the_results() -> None:
    """Displacements after the most steps, as the benchmark wrote them; with hold all are zero."""
    with (ROOT / "benchmarks/results/bench_drift-cpu.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["steps"] == "10000"]
    measured = {
        (row["optimizer"], row["start"], row["dummy"]): float(row["displacement_lr"])
        for row in rows
    }
    still = [row for row in rows if row["dummy"] == "1e-7 + hold"]
    assert {(row["displacement_lr"], row["state_untouched"]) for row in still} == {("0", "True")}
    page = (ROOT / "docs/explanation/what-a-dummy-gradient-does.md").read_text()
    table = page.partition("| with hold |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| (\w.*?)" + r" \| ([^|]+)" * 4 + r" \| 0 \|$", table, re.M)
    assert [name for name, *_ in found] == list(dict.fromkeys(row["optimizer"] for row in rows))
    columns = [(s, d) for s in ("never active", "trained before") for d in ("1e-7", "0.0")]
    for name, *cells in found:
        for column, cell in zip(columns, cells, strict=True):
            value = float(cell.replace(",", ""))
            assert value == pytest.approx(measured[name, *column], rel=0.05), (name, column)


def metadata_rows() -> list[tuple[str, str]]:
    page = (ROOT / "docs/reference/batch-metadata.md").read_text()
    rows = re.findall(r"^\|[^|]+\| `(.+?)` \| ([\w, ]+) \|$", page, re.M)
    assert len(rows) >= 12
    return rows


@pytest.mark.parametrize(("example", "active"), metadata_rows())
def test_the_metadata_table_is_true(example: str, active: str) -> None:
    names: dict[str, Any] = {"torch": torch, "x": torch.ones(2), "y": torch.ones(2)}
    batch = eval(example, names)
    expected = () if active == "none" else tuple(active.split(", "))
    assert active_modalities(batch, ["T1", "rsfMRI", "dMRI"]) == expected


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_every_page_can_be_reached_from_the_first() -> None:
    first = ROOT / "docs/index.md"
    linked = {
        (first.parent / t).resolve() for t in re.findall(r"\]\(([^)]+\.md)\)", first.read_text())
    }
    own = {page for page in linked if page.is_relative_to(first.parent)}
    assert set(ROOT.glob("docs/**/*.md")) == own | {first}


def test_sources_of_the_scans_are_the_ones_that_the_demo_writes() -> None:
    assert (ROOT / "docs/reference/scans.md").read_text() == SOURCES


def test_the_readme_shows_the_loop_as_python() -> None:
    """The diff of the training loop, applied, is a loop that compiles."""
    diff = re.search(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert diff is not None
    added = [line[1:] for line in diff.group(1).splitlines() if not line.startswith("-")]
    compile("\n".join(added), "README.md", "exec")
