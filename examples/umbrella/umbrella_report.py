"""What a run promised, and whether it held."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from modaldummy import Finding, diagnose
from umbrella_config import Config
from umbrella_scans import load_samples
from umbrella_training import UmbrellaTrainer, make_model
from umbrella_words import facts

BOUND = 1e-4
_ENDS = 20  # losses at either end of a run that are compared

Rows = Sequence[Mapping[str, Any]]


def judge(trainer: UmbrellaTrainer, config: Config) -> bool:
    """Print what happened; whether all promises held, the same answer on all ranks."""
    model: Any = trainer.model
    rows = [row for row in trainer.state.log_history if "loss" in row]
    moved = _moved(model, config)
    findings = diagnose(trainer.state.log_history, scale=config.scale)
    trained = {name for row in rows for name in config.towers if row[f"modaldummy/active/{name}"]}
    own = {
        "steps": len(rows),
        "missing": sum(row["missing_gradients"] for row in rows),
        "fraction": max(row["modaldummy/fraction"] for row in rows),
        "losses": _ends([row["loss"] for row in rows]),
        "trained": trained,
        "errors": sum(finding.severity == "error" for finding in findings),
        "parameters": nn.utils.parameters_to_vector(model.parameters()).detach().cpu(),
    }
    promises = _promises(gather_object([own]), moved, config)
    if trainer.is_world_process_zero():
        print(*_table(rows, moved, config), sep="\n")
        print(*_facts(trainer), sep="\n")
        print(*_doctor(findings), sep="\n")
        for promise, held in promises.items():
            print("yes:" if held else "NO: ", promise)
        print(f"Wrote trainer_state.json and generated.jsonl to {Path(config.out)}/")
    return all(promises.values())


def _promises(
    ranks: list[dict[str, Any]], moved: Mapping[str, float], config: Config
) -> dict[str, bool]:
    num_missing = sum(int(own["missing"]) for own in ranks)
    fraction = max(own["fraction"] for own in ranks)
    first, last = ranks[0]["losses"]
    never = [n for n in config.towers if not any(n in own["trained"] for own in ranks)]
    whole = all(own["steps"] == config.steps for own in ranks)
    promises = {
        f"{num_missing} gradients were missing at {config.steps} steps": not num_missing and whole,
        f"the dummy was at most {fraction:.2e} of the loss": fraction <= BOUND,
        f"the loss fell from {first:.3f} to {last:.3f}": last < first,
        "the doctor found no error": not any(own["errors"] for own in ranks),
    }
    if config.hold and never:
        still = all(moved[name] == 0 for name in never)
        promises[f"{' and '.join(never)}, which no batch trained, did not move"] = still
    if len(ranks) > 1:
        same = all(torch.equal(own["parameters"], ranks[0]["parameters"]) for own in ranks)
        promises["all ranks end with the same parameters"] = same
    return promises


def _moved(model: Any, config: Config) -> dict[str, float]:
    """The farthest that a parameter of each modality has gone."""
    before = dict(make_model(config).named_parameters())
    return {
        name: max(
            _distance(parameter, before[key])
            for key, parameter in model.named_parameters()
            if key.startswith(f"vision_tower.{name}_")
        )
        for name in config.towers
    }


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().cpu() - other.detach()).abs().max())


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    length = min(_ENDS, max(1, len(losses) // 2))
    return mean(losses[:length]), mean(losses[-length:])


def _table(rows: Rows, moved: Mapping[str, float], config: Config) -> list[str]:
    lines = ["modality   steps: active  inactive      norm: active          inactive    moved"]
    for name in config.towers:
        norms: dict[bool, list[float]] = {True: [], False: []}
        for row in rows:
            norm = row.get(f"grad_norm/{name}", math.nan)  # NaN where no parameter has a gradient
            norms[row[f"modaldummy/active/{name}"] == 1].append(norm)
        counts = f"{len(norms[True]):>13}{len(norms[False]):>10}"
        ranges = f"{_range(norms[True]):>18}{_range(norms[False]):>18}"
        lines.append(f"{name:<8}{counts}{ranges}{moved[name]:>9.2g}")
    return lines


def _range(norms: Sequence[float]) -> str:
    known = [norm for norm in norms if not math.isnan(norm)]
    if not known:
        return "-"
    low, high = f"{min(known):.2g}", f"{max(known):.2g}"
    return low if low == high else f"{low} to {high}"


def _facts(trainer: UmbrellaTrainer) -> list[str]:
    """How often generated text was right, beside what always saying the same word would score."""
    lines = ["held-out crops            right   commonest word"]
    for line in trainer.generation.last:
        train, held_out = load_samples(line["modality"])
        for fact, right in line["right"].items():
            said = Counter(facts(sample.answer)[fact] for sample in train)
            word = said.most_common(1)[0][0]
            score = sum(facts(sample.answer)[fact] == word for sample in held_out)
            what = f"{line['modality']} {fact}"
            lines.append(f"{what:<20}{right:>4} of {line['of']:>3}   {score:>4} ({word})")
    return lines


def _doctor(findings: Sequence[Finding]) -> list[str]:
    healthy = all(finding.severity == "info" for finding in findings)
    codes = ", ".join(finding.code for finding in findings)
    said = "The doctor says: healthy." if healthy else f"The doctor found: {codes}."
    return [*map(str, findings), said]
