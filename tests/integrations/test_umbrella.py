"""The original system, rebuilt: `examples/umbrella` logs, writes and judges as its page says."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainerState

from train import main
from umbrella_config import Config, load_config
from umbrella_generation import Generation
from umbrella_report import judge
from umbrella_scans import load_samples
from umbrella_training import UmbrellaTrainer, make_trainer
from umbrella_words import facts

EXAMPLE = Path(__file__).parents[2] / "examples/umbrella"
STEPS = 24

Row = dict[str, Any]


class Run(NamedTuple):
    config: Config
    trainer: UmbrellaTrainer

    @property
    def rows(self) -> list[Row]:
        """What is logged of the steps."""
        return [row for row in self.trainer.state.log_history if "loss" in row]


def run(name: str, out: Path, *options: str) -> Run:
    """Train for a few steps in this process."""
    usual = [f"out={out}", f"steps={STEPS}", "batch_size=8", "generate_every=10"]
    config = load_config(EXAMPLE / f"{name}.yaml", [*usual, *options])
    trainer = make_trainer(config)
    trainer.train()
    return Run(config, trainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """T1 alone, and T1 and rsfMRI."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("umbrella")
    yield {name: run(name, out / name) for name in ("t1", "t1_fmri")}
    torch.set_num_threads(threads)


def weight_norms(row: Row) -> dict[str, float]:
    return {key: row[key] for key in row if key.startswith("grad/") and key.endswith(".weight")}


def test_keys_of_the_t1_run_are_the_original_ones(runs: dict[str, Run]) -> None:
    """The embedding of T1 under its name, the others as inactive, each at its size."""
    assert [row["step"] for row in runs["t1"].rows] == list(range(1, STEPS + 1))
    for row in runs["t1"].rows:
        real, *dummies = weight_norms(row).items()
        assert real[0] == "grad/[T1]/vision_tower.T1_patch_embed.weight"
        assert real[1] > 1e-3
        # Scale times the root of the number of elements: 64 times those of a patch.
        assert dict(dummies) == pytest.approx(
            {
                "grad/[inactive]/vision_tower.rsfMRI_patch_embed.weight": 1e-7
                * math.sqrt(64 * 120),
                "grad/[inactive]/vision_tower.dMRI_patch_embed.weight": 1e-7 * math.sqrt(64 * 1024),
            },
            rel=1e-4,
        )


def test_where_both_are_in_the_batch_nothing_is_inactive(runs: dict[str, Run]) -> None:
    """Batches of both have keys without labels, batches of one have both labels."""
    held: dict[tuple[bool, bool], list[dict[str, float]]] = {}
    for row in runs["t1_fmri"].rows:
        flags = row["modaldummy/active/T1"] == 1, row["modaldummy/active/rsfMRI"] == 1
        held.setdefault(flags, []).append(weight_norms(row))
    t1, rsfmri = (f"vision_tower.{name}_patch_embed.weight" for name in ("T1", "rsfMRI"))
    labels = {
        (True, True): (f"grad/{t1}", f"grad/{rsfmri}"),
        (True, False): (f"grad/[T1]/{t1}", f"grad/[inactive]/{rsfmri}"),
        (False, True): (f"grad/[inactive]/{t1}", f"grad/[rsfMRI]/{rsfmri}"),
    }
    assert held.keys() == labels.keys()
    for flags, norms in held.items():
        for row in norms:
            assert tuple(row) == labels[flags]
            assert [norm > 1e-4 for norm in row.values()] == list(flags)


def test_each_step_is_counted_and_bounded(runs: dict[str, Run]) -> None:
    for made in runs.values():
        assert [row["missing_gradients"] for row in made.rows] == [0.0] * STEPS
        assert 0 < max(row["modaldummy/fraction"] for row in made.rows) <= 1e-4


def test_a_gradient_that_goes_missing_is_counted(tmp_path: Path, one_thread: None) -> None:
    config = load_config(EXAMPLE / "t1.yaml", [f"out={tmp_path}", "steps=2", "batch_size=2"])
    trainer = make_trainer(config)
    model: Any = trainer.model
    bias = model.vision_tower.dMRI_patch_embed.bias
    bias.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    trainer.train()
    assert [row["missing_gradients"] for row in Run(config, trainer).rows] == [1.0, 1.0]


def test_adamw_moves_untaught_embeddings_unless_it_is_held(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """With the hold they stay bit for bit; without, AdamW moves them by full steps."""
    moved = {}
    for hold, made in ((True, runs["t1"]), (False, run("t1", tmp_path, "hold=false"))):
        capsys.readouterr()
        judge(made.trainer, made.config)
        lines = capsys.readouterr().out.splitlines()
        moved[hold] = [float(line.split()[-1]) for line in lines if line.startswith("dMRI ")]
        assert any("which no batch taught, did not move" in line for line in lines) == hold
    assert moved[True] == [0]
    assert moved[False][0] > 0.5 * STEPS * 1e-3


def test_generated_text_is_judged_and_written(runs: dict[str, Run]) -> None:
    """Every ten steps and at the end, for each modality that batches contain."""
    for made in runs.values():
        path = Path(made.config.out) / "generated.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["step"], line["modality"]) for line in lines] == [
            (step, name) for step in (10, 20, 24) for name in made.config.modalities
        ]
        for line in lines:
            _, held_out = load_samples(line["modality"])
            assert line["of"] == len(held_out)
            assert {true for _, true in line["shown"]} <= {sample.answer for sample in held_out}
            assert line["right"].keys() == facts(held_out[0].answer).keys()
        assert made.trainer.generation.last == lines[-len(made.config.modalities) :]


def test_a_resumed_run_keeps_the_lines_before_it(tmp_path: Path) -> None:
    """And drops those of steps that come once more."""
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)))
    args: Any = None
    Generation({}, path, 10).on_train_begin(args, TrainerState(global_step=20))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def spoil(kind: str, trainer: UmbrellaTrainer) -> None:
    """Make a run break a promise."""
    model: Any = trainer.model
    log = trainer.state.log_history
    if kind == "missing":
        log[3]["missing_gradients"] = 1.0
    elif kind == "fewer steps":
        del log[3]
    elif kind == "bound":
        log[3]["modaldummy/fraction"] = 1.1e-4
    elif kind == "loss":
        losses = sorted(row["loss"] for row in log[:STEPS])
        for row, loss in zip(log, losses, strict=False):
            row["loss"] = loss
    elif kind == "error":
        log[3]["modaldummy/uncapped"] = math.inf
    elif kind == "moved":
        model.vision_tower.dMRI_patch_embed.bias.data[0] += 1e-6


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("nothing", "yes: the doctor found no error"),
        ("missing", "NO:  1 gradients were missing at 24 steps"),
        ("fewer steps", "NO:  0 gradients were missing at 24 steps"),
        ("bound", "NO:  the dummy was at most 1.10e-04 of the loss"),
        ("loss", "NO:  the loss fell from"),
        ("error", "NO:  the doctor found no error"),
        ("moved", "NO:  rsfMRI and dMRI, which no batch taught, did not move"),
    ],
)
def test_a_broken_promise_is_told(
    kind: str, line: str, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and no other promise is called broken."""
    config, trainer = runs["t1"]
    model: Any = trainer.model
    log, weights = deepcopy(trainer.state.log_history), deepcopy(model.state_dict())
    try:
        spoil(kind, trainer)
        assert judge(trainer, config) == (kind == "nothing")
    finally:
        trainer.state.log_history = log
        model.load_state_dict(weights)
    shown = capsys.readouterr().out
    assert line in shown
    assert shown.count("NO: ") == (kind != "nothing")


def test_the_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """Exit code, table, verdict and files; what is left out of the table was not there."""
    options = [f"out={tmp_path}", "steps=12", "batch_size=8"]
    arguments = [argument for option in options for argument in ("--set", option)]
    assert main(["--config", str(EXAMPLE / "t1_fmri.yaml"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "step 12, rsfMRI: right in 84 crops: drift" in shown
    assert shown.count("yes: ") == 4
    rows = [line.split() for line in shown.splitlines() if line.startswith(("T1 ", "rsfMRI "))]
    assert [row[:2] for row in rows[2:]] == [
        ["T1", "intensity"], ["T1", "brighter"], ["rsfMRI", "drift"], ["rsfMRI", "peak"],
    ]  # fmt: skip
    assert [int(row[1]) + int(row[2]) for row in rows[:2]] == [12, 12]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in row for row in log) == 12


def test_a_wrong_configuration_is_one_sentence() -> None:
    """From the script as a user starts it, with exit code 2."""
    command = [sys.executable, str(EXAMPLE / "train.py"), "--config", str(EXAMPLE / "all.yaml")]
    done = subprocess.run(
        [*command, "--set", "stepps=3"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("There is no key 'stepps'; did you mean 'steps'?")
    assert done.stderr.count("\n") == 1


def test_nothing_to_resume_from_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(EXAMPLE / "all.yaml"), "--set", f"out={tmp_path}", "--resume"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"There is no checkpoint in {tmp_path}/ to resume from.\n"
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
