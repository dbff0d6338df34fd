"""Healthy runs, each in a way of its own: no diagnosis may find anything."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from modaldummy import DummyLossWrapper
from tests.diagnose.clinic import Record, Run, plain

History = tuple[Iterable[Record], dict[str, Any]]
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)


def clipped(run: Run, before: bool) -> Iterable[Record]:
    """Gradients are clipped to a norm that is often exceeded; logged before or after."""
    for step in range(run.steps):
        active = run.active(step)
        total = run.wrapper.total(run.loss(active), active)
        total.backward()
        row = run.record(step, total) if before else {}
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        yield row or run.record(step, total)
        run.step()


def accumulated(run: Run) -> Iterable[Record]:
    """Four micro-batches a step; what any of them held was active."""
    for step in range(run.steps):
        window: set[str] = set()
        for part in range(4):
            active = run.active(step + part // 2)
            window |= {*active}
            total = run.wrapper.total(run.loss(active), active)
            (total / 4).backward()
        yield run.record(step, total, active=list(window))
        run.step()


def scaled(run: Run) -> Iterable[Record]:
    """In float16 with a GradScaler, which starts too large and skips some steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    for step in range(run.steps):
        active = run.active(step)
        with torch.autocast("cpu", torch.float16):
            loss = run.loss(active)
        total = run.wrapper.total(loss.float(), active)
        scaler.scale(total).backward()
        yield run.record(step, total, scaler=scaler)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()


def autocast(run: Run) -> Iterable[Record]:
    for step in range(run.steps):
        active = run.active(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(active)
        total = run.wrapper.total(loss.float(), active)
        total.backward()
        yield run.record(step, total)
        run.step()


def warmed_up(run: Run) -> Iterable[Record]:
    schedule = torch.optim.lr_scheduler.LinearLR(run.optimizer, 0.01, total_iters=50)
    for row in plain(run):
        yield row
        if row["step"]:
            schedule.step()


def every_tenth(run: Run) -> Iterable[Record]:
    """Most steps are not logged."""
    return (row for row in plain(run) if row["step"] % 10 == 3)


def sparsely(run: Run) -> Iterable[Record]:
    """The loss at each step, gradients at some, an evaluation now and then."""
    for row in plain(run):
        if row["step"] % 5:
            row = {name: row[name] for name in ("step", "loss")}
        yield row | ({"eval_loss": 7.0} if row["step"] % 25 == 0 else {})


def with_foreign_keys(run: Run) -> Iterable[Record]:
    """What other code logs beside it."""
    return (row | {"grad_norm/total": 1.0, "grad/norm": 2.0, "lr": 0.1} for row in plain(run))


def as_table(run: Run) -> Iterable[Record]:
    """As pandas hands rows out: NaN where a row has no such key, as one of an evaluation."""
    rows = list(plain(run))
    keys = {key for row in rows for key in row} | {"eval_loss"}
    hole = dict.fromkeys(keys, math.nan)
    for row in rows:
        yield hole | {key: row.get(key, math.nan) for key in row}
        if row["step"] % 30 == 0:
            yield hole | {"step": row["step"], "eval_loss": 1.0}


def frozen(run: Run) -> Iterable[Record]:
    """One tower is frozen, and has no gradient when it is active either."""
    run.model.towers["dMRI"].requires_grad_(False)
    return plain(run)


def thawed(run: Run) -> Iterable[Record]:
    """One tower is frozen for the first third."""
    tower = run.model.towers["dMRI"].requires_grad_(False)
    for row in plain(run):
        yield row
        if row["step"] == run.steps // 3:
            tower.requires_grad_(True)


def with_fusion(run: Run) -> Iterable[Record]:
    """A module that only batches with both of two modalities use."""
    run.model.fusion = fusion = nn.Linear(8, 8)
    spec: dict[Any, str] = {name: f"towers.{name}" for name in run.names}
    run.wrapper = DummyLossWrapper(run.model, spec | {("T1", "dMRI"): "fusion"})
    run.optimizer = SGD(run.model.parameters(), run.lr)

    def fused(batch: Any) -> Any:
        hidden = torch.stack([run.model.towers[n](data) for n, data in batch.items()]).mean(0)
        if {"T1", "dMRI"} <= batch.keys():
            hidden = hidden + fusion(hidden)
        return run.model.trunk(hidden)[:, 0]

    run.model.forward = fused  # type: ignore[method-assign]
    return plain(run)


def with_embedding(run: Run) -> Iterable[Record]:
    """A modality of codes: its dummy gradient is empty, and has norm 0."""
    run.model.towers["codes"] = nn.Embedding(5, 8, sparse=True)
    run.names = ["T1", "codes"]
    spec = {name: f"towers.{name}" for name in run.names}
    run.wrapper = DummyLossWrapper(run.model, spec)
    run.optimizer = SGD(run.model.parameters(), run.lr)
    batch = run.batch

    def with_codes(active: Iterable[str]) -> Any:
        data, target = batch(name for name in active if name != "codes")
        if "codes" in active:
            data["codes"] = (2 * target).round().clamp(-2, 2).long() + 2
        return data, target

    run.batch = with_codes  # type: ignore[method-assign]
    return plain(run)


def by_hand(run: Run) -> Iterable[Record]:
    """The dummy alone is added to the loss."""
    for step in range(run.steps):
        active = run.active(step)
        total = run.loss(active) + run.wrapper.dummy(active)
        total.backward()
        yield run.record(step, total)
        run.step()


def classified(run: Run) -> Iterable[Record]:
    """Cross-entropy of the sign of the target."""
    for step in range(run.steps):
        active = run.active(step)
        data, target = run.batch(active)
        label = (target > 0).float()
        loss = nn.functional.binary_cross_entropy_with_logits(run.model(data), label)
        total = run.wrapper.total(loss, active)
        total.backward()
        yield run.record(step, total)
        run.step()


def negative(run: Run, scale: float = 10.0) -> Iterable[Record]:
    """A likelihood: the loss starts above 0 and ends near it, or below."""
    run.model.log_scale = nn.Parameter(torch.ones(()))
    run.optimizer = SGD(run.model.parameters(), 0.02)
    for step in range(2 * run.steps):
        active = run.active(step)
        data, target = run.batch(active)
        error = (run.model(data) - target / scale).square() * torch.exp(-2 * run.model.log_scale)
        total = run.wrapper.total((error / 2 + run.model.log_scale).mean(), active)
        total.backward()
        yield run.record(step, total)
        run.step()


def nearly_always_all(step: int, names: list[str]) -> list[str]:
    return names[:1] if step == 1 else names


def in_phases(step: int, names: list[str]) -> list[str]:
    """First one modality, then the next, then all: a curriculum."""
    return [names[step // 50]] if step < 100 else names


HEALTHY: dict[str, Callable[[], History]] = {
    "SGD": lambda: (plain(Run()), {}),
    "SGD, constant keys": lambda: (plain(Run(label=False, seed=1)), {}),
    "SGD with momentum and decay": lambda: (plain(Run(make=momentum, lr=0.02)), {}),
    "AdamW": lambda: (plain(Run(make=AdamW, lr=0.01)), {}),
    "AdamW with hold": lambda: (plain(Run(make=AdamW, lr=0.01, hold=True)), {}),
    "RMSprop": lambda: (plain(Run(make=torch.optim.RMSprop, lr=0.003)), {}),
    "small learning rate": lambda: (plain(Run(lr=0.003, steps=300)), {}),
    "learned at once, then a plateau": lambda: (plain(Run(lr=0.15, steps=800)), {}),
    "batches of four": lambda: (plain(Run(size=4, lr=0.02, steps=400)), {}),
    "batches of one": lambda: (plain(Run(size=1, lr=0.01, steps=600)), {}),
    "a loss that becomes 0": lambda: (
        plain(Run(noise=0.0, schedule=nearly_always_all, steps=400, make=momentum, lr=0.02)),
        {},
    ),
    "noisy target": lambda: (plain(Run(noise=1.0, steps=300)), {}),
    "float64": lambda: (plain(Run(dtype=torch.float64)), {}),
    "bfloat16 autocast": lambda: (autocast(Run()), {}),
    "a sparse embedding alone": lambda: (with_embedding(Run()), {}),
    "a small dummy added by hand": lambda: (by_hand(Run()), {}),
    "GradScaler": lambda: (scaled(Run(seed=2)), {}),
    "clipped, logged before": lambda: (clipped(Run(), before=True), {}),
    "clipped, logged after": lambda: (clipped(Run(), before=False), {}),
    "accumulation": lambda: (accumulated(Run(steps=80)), {}),
    "warm-up": lambda: (warmed_up(Run(steps=200)), {}),
    "every tenth step": lambda: (every_tenth(Run(steps=600)), {}),
    "forty rows": lambda: (every_tenth(Run(steps=400, seed=4)), {}),
    "with keys of others": lambda: (with_foreign_keys(Run()), {}),
    "keys of others, constant keys": lambda: (with_foreign_keys(Run(label=False)), {}),
    "rows of a table": lambda: (as_table(Run(label=False)), {}),
    "gradients at some steps": lambda: (sparsely(Run(steps=200)), {}),
    "a frozen tower": lambda: (frozen(Run()), {}),
    "a tower that thaws": lambda: (thawed(Run()), {}),
    "a fusion": lambda: (with_fusion(Run(steps=200)), {}),
    "cross-entropy": lambda: (classified(Run(lr=0.2)), {}),
    "a loss below zero": lambda: (negative(Run()), {}),
    "a loss that ends near zero": lambda: (negative(Run(seed=1), scale=1.0), {}),
    "a curriculum": lambda: (plain(Run(schedule=in_phases)), {}),
    "two modalities": lambda: (plain(Run(widths={"a": 3, "b": 5})), {}),
    "six modalities": lambda: (plain(Run(widths=dict.fromkeys("abcdef", 4), steps=300)), {}),
    "scale 1e-6": lambda: (plain(Run(scale=1e-6, lr=0.05)), {"scale": 1e-6}),
    "scale 0": lambda: (plain(Run(scale=0.0)), {"scale": 0.0}),
    "scale None": lambda: (plain(Run(scale=None)), {"scale": None}),
    "gradient only": lambda: (plain(Run(options={"gradient_only": True})), {}),
    "too short to tell": lambda: (plain(Run(steps=12)), {}),
}
