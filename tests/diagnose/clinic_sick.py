"""Sick runs: each has one mistake in its loop, and the codes that should name it."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.diagnose.clinic import Record, Run, plain
from tests.diagnose.clinic_healthy import AdamW, History, classified


def run_with(
    run: Run,
    *,
    total: Callable[[Run, Tensor, list[str], int], Tensor] | None = None,
    before: Callable[[Run, int], Any] | None = None,
    after: Callable[[Run], Any] | None = None,
    used: Callable[[list[str]], list[str]] = list,
) -> Iterable[Record]:
    """The loop, with a mistake in one place.

    Args:
        run: What is trained.
        total: What goes through backward in place of the wrapper's total.
        before: Done before each step.
        after: Done after backward, before anything is logged.
        used: What forward uses in place of what the batch is said to hold.
    """
    for step in range(run.steps):
        active = run.active(step)
        if before:
            before(run, step)
        loss = run.loss(used(active))
        target = (total or wrapped)(run, loss, active, step)
        target.backward()
        if after:
            after(run)
        yield run.record(step, target, active=active)
        run.step()


def wrapped(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    return run.wrapper.total(loss, active)


# --- the loss -----------------------------------------------------------------------------------


def broken_data(start: int) -> Callable[[Run, int], None]:
    """From some step on the scans of one modality hold a division by zero."""

    def spoil(run: Run, step: int) -> None:
        if step == start:
            run.views["T1"] = run.views["T1"] / torch.zeros(())

    return spoil


def wrong_checkpoint(run: Run, step: int) -> None:
    """Weights of a tower that overflowed elsewhere are loaded, of one that no batch uses."""
    if step == 40:
        with torch.no_grad():
            run.model.towers["dMRI"].weight.mul_(math.inf)


def detached(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """Someone wrote `.detach()` to save memory; the dummy alone has a graph."""
    return run.wrapper.total(loss.detach(), active)


def spoilt_tower(run: Run, spoil: Callable[[Tensor], Tensor]) -> Iterable[Record]:
    """What comes out of one tower carries no gradient."""
    run.model.towers["T1"].register_forward_hook(lambda module, inputs, output: spoil(output))
    return plain(run)


def other_parameters(run: Run) -> Iterable[Record]:
    """The optimizer was made for the model that was then copied."""
    run.optimizer = torch.optim.SGD(copy.deepcopy(run.model).parameters(), run.lr)
    for row in plain(run):
        yield row
        run.model.zero_grad()


def shuffled(run: Run) -> Iterable[Record]:
    """The targets are in another order than the samples."""
    draw = run.batch

    def mixed(active: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        data, target = draw(active)
        return data, target[torch.randperm(len(target))]

    run.batch = mixed  # type: ignore[method-assign]
    return plain(run)


# --- the dummy ----------------------------------------------------------------------------------


def real_alone(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """The total is computed, and the loss is target."""
    run.wrapper.total(loss, active)
    return loss


def item(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """The dummy is added as a number."""
    return loss + run.wrapper.dummy(active).item()


def singles_only(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """As in the recipe: a dummy for batches of one modality; those of two leave one out."""
    return run.wrapper.total(loss, active) if len(active) == 1 else real_alone(run, loss, active, 0)


def zeroed(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """A warm-up of the dummy's weight that stays at 0."""
    return loss + 0.0 * run.wrapper.dummy(active)


def by_hand(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """The dummy alone is added: nothing knows the loss to hold it against."""
    return loss + run.wrapper.dummy(active)


def halved(run: Run) -> None:
    """Gradients are sent as float16, divided by the number of ranks first."""
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad = (parameter.grad.half() / 8).float()


def clip(limit: float) -> Callable[[Run], Any]:
    return lambda run: nn.utils.clip_grad_norm_(run.model.parameters(), limit)


def unscaled_never(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """Gradients are logged as a GradScaler made them; the optimizer takes its factor off."""
    return run.wrapper.total(loss, active) * 2.0**16


def penalised(run: Run, loss: Tensor, active: list[str], _: int) -> Tensor:
    """A penalty on all weights, whatever the batch holds."""
    penalty = torch.stack([p.square().sum() for p in run.model.parameters()]).sum()
    return run.wrapper.total(loss + 1e-3 * penalty, active)


def one_more(active: list[str]) -> list[str]:
    """The collate function forgets to say that dMRI is there."""
    return list(dict.fromkeys([*active, "dMRI"]))


def accumulated(run: Run) -> Iterable[Record]:
    """Two micro-batches a step, and the labels of the second."""
    for step in range(run.steps):
        for part in range(2):
            active = run.active(2 * step + part)
            total = run.wrapper.total(run.loss(active), active)
            (total / 2).backward()
        yield run.record(step, total)
        run.step()


def root_of_zero(run: Run) -> Iterable[Record]:
    """The gradient of a norm at zero is NaN, and a GradScaler skips every step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(run.steps):
        active = run.active(step)
        output = run.model.towers[active[0]](torch.zeros(1, run.widths[active[0]]))
        distance = ((output - output) ** 2).sum().sqrt()
        total = run.wrapper.total(run.loss(active) + distance, active)
        scaler.scale(total).backward()
        yield run.record(step, total, scaler=scaler)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()


def t1_only(_: int, names: list[str]) -> list[str]:
    return names[:1]


def one_at_a_time(step: int, names: list[str]) -> list[str]:
    return [names[step % len(names)]]


def without_dmri(step: int, names: list[str]) -> list[str]:
    return names[:2] if step % 2 else [names[step // 2 % 2]]


SICK: dict[str, tuple[set[str], Callable[[], History]]] = {
    "data that is not finite from the start": (
        {"MD201"},
        lambda: (run_with(Run(), before=broken_data(0)), {}),
    ),
    "a learning rate that explodes at once": (
        {"MD201", "MD221"},
        lambda: (plain(Run(lr=20.0)), {}),
    ),
    "a learning rate that explodes": ({"MD202"}, lambda: (plain(Run(lr=0.3)), {})),
    "data that is not finite later": (
        {"MD202"},
        lambda: (run_with(Run(), before=broken_data(60)), {}),
    ),
    "weights that are not finite": (
        {"MD203", "MD225"},
        lambda: (run_with(Run(schedule=without_dmri), before=wrong_checkpoint), {}),
    ),
    "learning rate 0": ({"MD204"}, lambda: (plain(Run(lr=0.0)), {})),
    "an optimizer of other parameters": (
        {"MD204"},
        lambda: (other_parameters(Run(seed=7, widths={"a": 3, "b": 5})), {}),
    ),
    "shuffled targets": ({"MD204"}, lambda: (shuffled(Run(lr=0.02)), {})),
    "a detached loss": (
        {"MD204", "MD217"},
        lambda: (run_with(Run(seed=5, size=64), total=detached), {}),
    ),
    "a detached tower": ({"MD217"}, lambda: (spoilt_tower(Run(), Tensor.detach), {})),
    "the same, constant keys": (
        {"MD217"},
        lambda: (spoilt_tower(Run(label=False), Tensor.detach), {}),
    ),
    "a tower times 0": ({"MD217"}, lambda: (spoilt_tower(Run(), lambda x: 0 * x), {})),
    "Adam with a large rate": (
        {"MD205"},
        lambda: (classified(Run(make=AdamW, lr=30.0, steps=400)), {}),
    ),
    "RMSprop with a large rate": (
        {"MD205"},
        lambda: (plain(Run(make=torch.optim.RMSprop, lr=1.0, steps=400, seed=3)), {}),
    ),
    "scale 0 by mistake": ({"MD211"}, lambda: (plain(Run(scale=0.0)), {})),
    "a dummy times 0": ({"MD211"}, lambda: (run_with(Run(), total=zeroed), {})),
    "float16 that rounds to 0": ({"MD211"}, lambda: (run_with(Run(), after=halved), {})),
    "backward on the loss in place of the total": (
        {"MD212"},
        lambda: (run_with(Run(), total=real_alone), {}),
    ),
    "the same with constant keys": (
        {"MD212"},
        lambda: (run_with(Run(label=False), total=real_alone), {}),
    ),
    "a dummy added as a number": ({"MD212"}, lambda: (run_with(Run(), total=item), {})),
    "a dummy for single modalities only": (
        {"MD213"},
        lambda: (run_with(Run(), total=singles_only), {}),
    ),
    "norms of scaled gradients": (
        {"MD214"},
        lambda: (run_with(Run(lr=0.1 / 2**16), total=unscaled_never), {}),
    ),
    "another scale than was meant": ({"MD214"}, lambda: (plain(Run(scale=1e-5)), {})),
    "clipped away": (
        {"MD204", "MD215"},
        lambda: (run_with(Run(seed=8, noise=0.5), after=clip(1e-5)), {}),
    ),
    "a penalty on all weights": ({"MD216"}, lambda: (run_with(Run(), total=penalised), {})),
    "metadata that forgets a modality": ({"MD216"}, lambda: (run_with(Run(), used=one_more), {})),
    "labels of the last micro-batch": ({"MD216"}, lambda: (accumulated(Run()), {})),
    "NaN in a gradient": ({"MD204", "MD221"}, lambda: (root_of_zero(Run(seed=9, steps=200)), {})),
    "a scale without a bound": (
        {"MD214", "MD222"},
        lambda: (plain(Run(scale=1e-5, options={"max_fraction": None})), {}),
    ),
    "a scale like a loss": (
        {"MD214", "MD223"},
        lambda: (plain(Run(scale=1e-3, options={"max_fraction": None})), {}),
    ),
    "a dummy added by hand": (
        {"MD223"},
        lambda: (run_with(Run(scale=3e-3), total=by_hand), {"scale": 3e-3, "ratio": 1.0}),
    ),
    "a modality that never comes": (
        {"MD225"},
        lambda: (plain(Run(schedule=without_dmri)), {}),
    ),
    "one modality alone": ({"MD225", "MD226"}, lambda: (plain(Run(schedule=t1_only)), {})),
    "one modality at a time": ({"MD226"}, lambda: (plain(Run(schedule=one_at_a_time)), {})),
    "all modalities always": (
        {"MD227"},
        lambda: (plain(Run(schedule=lambda _, names: names)), {}),
    ),
    "dummy gradients that are large": (
        {"MD224"},
        lambda: (plain(Run(scale=1e-5)), {"scale": 1e-5}),
    ),
}
