"""What a hold costs under DeepSpeed's ZeRO: the optimizer's step, and the whole training step.

A model has three towers and a trunk, and every batch, on both ranks, has one modality, so that the
towers of the other two are held. All parameters are in one group of AdamW, or each tower is a group
of its own. Each contender is compared with the one of the same groups without a hold. ZeRO-3 has a
shadow, which it needs for a dummy term.

Ranks wait for each other before each step, and its time is that of the slowest rank. `peak` is the
memory that torch allocates in `engine.step()` on rank 1, at its highest, beyond what it had before.
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench_step import NAMES, TOKENS, Model, interval, with_interval
from from_tests import Fleet, deepspeed_on_cpus
from measure import (
    Contender,
    Times,
    environment,
    keep_memory,
    percentiles,
    print_environment,
    result_path,
    take_turns,
    work,
    write_csv,
)
from modaldummy import DummyLossWrapper, hold_inactive, shadow_inactive

CPU = torch.device("cpu")
LIMIT = 3600  # seconds for all rounds of a stage
STAGES = (1, 3)
# Whether each tower has a parameter group, and whether it is held.
CONTENDERS = {
    "one group": (False, False),
    "one group, hold": (False, True),
    "a group for each tower": (True, False),
    "a group for each tower, hold": (True, True),
}
BASES = {f"{name}, hold": name for name in ("one group", "a group for each tower")}


def main() -> None:
    """Measure at each stage, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)  # as each rank, for the rows
    rows = [row for stage in STAGES for row in measure(stage, given)]
    print_tables(rows)
    if given.csv is not None:
        write_csv(result_path(given.csv, "bench_zero_hold.csv", CPU), rows)


def measure(stage: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each contender."""
    with Fleet(2, limit=LIMIT, quiet=True) as fleet:
        ranks = fleet.ask(measured, stage, given.width, given.batch, given.rounds)
    times = {name: [rank[name][0] for rank in ranks] for name in CONTENDERS}
    both = {name: np.max([each.both for each in times[name]], axis=0) for name in CONTENDERS}
    step = {name: np.max([each.backward for each in times[name]], axis=0) for name in CONTENDERS}
    rows = []
    for name in CONTENDERS:
        row: dict[str, Any] = {"stage": stage, "contender": name} | percentiles(both[name])
        row |= {f"optimizer_{key}": ms for key, ms in percentiles(step[name]).items()}
        base = BASES.get(name, name)
        for kind, found in {"training_step": both, "optimizer_step": step}.items():
            ratios = found[name] / found[base]
            low, high = interval(ratios)
            row |= {kind: float(np.median(ratios)), f"{kind}_low": low, f"{kind}_high": high}
        row |= {"peak_MB": ranks[1][name][1] / 1e6, "held": ranks[1][name][2]}
        row |= {"rounds": given.rounds, "width": given.width, "batch": given.batch}
        rows.append(row | environment(CPU))
    return rows


def measured(
    rank: int, stage: int, width: int, size: int, rounds: int
) -> dict[str, tuple[Times, int, float]]:
    """Times, memory of `engine.step()` and the held share of each contender on this rank."""
    trainings = {
        name: Training(stage, width, size, has_groups=has_groups, hold=hold)
        for name, (has_groups, hold) in CONTENDERS.items()
    }
    times = take_turns({name: one.contender for name, one in trainings.items()}, rounds, CPU)
    found = {}
    for name, one in trainings.items():
        step = Contender(lambda: None, one.contender.backward, one.contender.forward)
        found[name] = times[name], work(step, CPU).peak_bytes, one.share_held()
    return found


class Training:
    """A model in an engine; forward and backward of a batch, then `engine.step()`."""

    def __init__(self, stage: int, width: int, size: int, *, has_groups: bool, hold: bool) -> None:
        torch.manual_seed(0)
        self._model = Model(width)
        self._engine = engine(self._model, stage, has_groups)
        self._batch = {"T1": torch.randn(size, *TOKENS["T1"])}
        self._labels = torch.randint(10, (size,))
        self._wrapper = DummyLossWrapper(self._engine, {n: f"towers.{n}" for n in NAMES})
        if stage == 3:
            example = {name: torch.randn(1, 1, TOKENS[name][1]) for name in NAMES}
            shadow_inactive(self._wrapper, self._engine, examples=[(example,)])
        self._hold = hold_inactive(self._wrapper, self._engine) if hold else None
        self.contender = Contender(self._learn, lambda _: self._engine.step(), dist.barrier)

    def _learn(self) -> None:
        real = nn.functional.cross_entropy(self._engine(self._batch), self._labels)
        total: Tensor = self._wrapper.total(real, self._batch)
        self._engine.backward(total)

    def share_held(self) -> float:
        """Of all elements of parameters, those that the last step held."""
        named = self._engine.named_parameters()
        sizes: dict[str, int] = {name: getattr(p, "ds_numel", p.numel()) for name, p in named}
        held = () if self._hold is None else self._hold.held
        return sum(sizes[name] for name in held) / sum(sizes.values())


def engine(model: Model, stage: int, has_groups: bool) -> Any:
    """DeepSpeed's engine around the model."""
    parts = [*model.towers.values(), model.trunk] if has_groups else [model]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    groups = [{"params": list(part.parameters())} for part in parts]
    made, *_ = deepspeed_on_cpus().initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-4), config=config
    )
    return made


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Medians, and ratios with their intervals."""
    print_environment(rows[0])
    print(f"\n2 ranks, gloo, {rows[0]['rounds']} rounds\n")
    print("| stage | contender | held | step ms | ratio | optimizer ms | ratio | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["stage"], row["contender"], f"{row['held']:.0%}", f"{row['p50_ms']:.0f}"]
        cells += [with_interval(row, "training_step"), f"{row['optimizer_p50_ms']:.1f}"]
        cells += [with_interval(row, "optimizer_step"), f"{row['peak_MB']:.1f}"]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
