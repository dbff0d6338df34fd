"""Checks of the course of a loss: is it finite, does it fall, is it steady?"""

import math

import numpy as np

from modaldummy._diagnose.evidence import Evidence, Outcome, Sign, Unchecked
from modaldummy._diagnose.signals import Column
from modaldummy._findings import Finding

_MANY = 8  # losses of one set of modalities that say something about its course
_CERTAIN = 4.0  # standard errors; several beginnings are tried
_VISIBLE = 0.5  # a share of the first losses; where a smaller fall shows, there is none
_EXPLOSION = 10.0  # of a gradient norm, over the usual one
_TINY = 0.05  # of the first losses; below, a loss may jump as it will


def finite(evidence: Evidence) -> Outcome:
    """MD201 and MD202: NaN or infinity, at once or after some steps."""
    losses = evidence.tally("loss broken")
    if not losses.seen:
        return Unchecked("no loss is logged: a key `loss`, `train/loss` or `modaldummy/real`")
    if not losses.hits:
        return Sign(f"{losses.seen:,} losses, all finite", {"losses": losses.seen})
    found = {
        "first_step": losses.first,
        "losses_before": losses.place,
        "not_finite": losses.hits,
        "losses": losses.seen,
    }
    if losses.place < evidence.limits.early:
        return Finding(
            "MD201",
            "error",
            f"The loss is NaN or infinite after {losses.place} that are not, at step "
            f"{losses.first:g}.",
            found,
            "Look at the data and the loss of one batch, without the wrapper; run `preflight`, "
            "which names parameters that are not finite and scales that are too large.",
        )
    growth = _growth(evidence, losses.first)
    if growth is not None:
        found["gradient_growth"] = growth
    exploded = growth is not None and growth > _EXPLOSION
    grown = f", after real gradients grew {growth:.3g} times" if exploded else ""
    return Finding(
        "MD202",
        "error",
        f"The loss becomes NaN or infinite at step {losses.first:g}{grown}.",
        found,
        "Lower the learning rate or clip gradients; look at what the batch at that step held.",
    )


def _growth(evidence: Evidence, step: float) -> float | None:
    """Largest of the last real gradient norms before `step`, over the median of those before."""
    norms = evidence.column("real_norm")
    before = norms[np.isfinite(norms) & (evidence.column("step") <= step)]
    if len(before) < _MANY:
        return None
    usual = float(np.median(before[:-5]))
    return float(before[-5:].max()) / usual if usual else None


def uncapped(evidence: Evidence) -> Outcome:
    """MD203: a parameter of an inactive modality is not finite."""
    sums = evidence.tally("report/uncapped broken")
    if not sums.seen:
        return Unchecked("`modaldummy/uncapped` is not logged: `wrapper.last.as_dict()`")
    if not sums.hits:
        return Sign("sums of inactive parameters are finite", {"sums": sums.seen})
    return Finding(
        "MD203",
        "error",
        f"A parameter of an inactive modality is NaN or infinite from step {sums.first:g} on.",
        {"first_step": sums.first, "not_finite": sums.hits, "sums": sums.seen},
        "`preflight(wrapper)` names it; go back to a checkpoint from before that step.",
    )


def decreasing(evidence: Evidence) -> Outcome:
    """MD204: the loss does not fall."""
    if reason := _unfit(evidence):
        return Unchecked(reason)
    series = _by_set(evidence)
    falls = [fall for losses in [*series, _together(evidence)] for fall in _falls(losses)]
    first, last, error = max(falls, key=lambda fall: (fall[0] - fall[1]) / (fall[2] or 1e-300))
    numbers = {"from": first, "to": last, "losses": evidence.tally("loss broken").seen}
    share = (first - last) / abs(first) if first else 0.0
    if first - last > _CERTAIN * error and share > evidence.limits.decrease:
        return Sign(f"from {first:.4g} to {last:.4g}, where it is clearest", numbers)
    visible = min((_CERTAIN * error / abs(first) for first, _, error in falls if first), default=0)
    if visible > _VISIBLE:
        return Unchecked(f"too noisy: a fall by less than {visible:.0%} would not show")
    numbers["median"] = float(np.median(np.concatenate(series)))
    numbers["first_step"] = float(_steps(evidence)[0])
    return Finding(
        "MD204",
        "warning",
        "The loss does not decrease.",
        numbers,
        "Look whether the loss has a graph to the model, whether the optimizer has the parameters "
        "(`preflight(wrapper, optimizer, loss=total)` tells), and at the learning rate; of a run "
        "that starts where another has converged, nothing else can be expected.",
    )


def steady(evidence: Evidence) -> Outcome:
    """MD205: the loss jumps from batch to batch of the same modalities."""
    if np.isnan(evidence.column("set")).all():
        return Unchecked("which modalities were active is not logged: `wrapper.last.as_dict()`")
    if reason := _unfit(evidence):
        return Unchecked(reason)
    steps = _steps(evidence)
    start, level, jump = _unrest(_together(evidence))
    numbers = {"jump": jump, "level": level, "first_losses": start}
    if jump <= evidence.limits.unrest * level or jump <= _TINY * start:
        return Sign(f"jumps by {jump:.3g} at a level of {level:.3g}", numbers)
    return Finding(
        "MD205",
        "warning",
        f"The loss oscillates: it jumps by {jump:.3g} at a level of {level:.3g}, and not because "
        "batches hold other modalities.",
        numbers | {"first_step": float(steps[len(steps) // 2])},
        "Lower the learning rate, clip gradients, or make batches larger.",
    )


def _unfit(evidence: Evidence) -> str | None:
    """Why nothing can be said about the course of the loss, if so."""
    losses, least = evidence.tally("loss broken"), max(evidence.limits.least, _MANY)
    if losses.hits:
        return "the loss does not stay finite"
    return f"{losses.seen} losses are too few; {least} are needed" if losses.seen < least else None


def _by_set(evidence: Evidence) -> list[Column]:
    """Finite losses in order, those of each set of active modalities apart."""
    losses, sets = evidence.column("loss"), evidence.column("set")
    known = np.isfinite(losses)
    parts = [losses[known & (sets == one)] for one in np.unique(sets[~np.isnan(sets)])]
    parts.append(losses[known & np.isnan(sets)])
    return [part for part in parts if len(part) >= min(_MANY, known.sum())] or [losses[known]]


def _together(evidence: Evidence) -> Column:
    """Finite losses in order, without what sets one set of active modalities apart from others."""
    losses, sets = evidence.column("loss"), evidence.column("set")
    known = np.isfinite(losses)
    losses, sets = losses[known], np.nan_to_num(sets[known], nan=-1.0)
    levels = {one: np.median(losses[sets == one]) for one in np.unique(sets)}
    apart: Column = losses - np.array([levels[one] for one in sets])
    return apart + np.median(losses)


def _unrest(losses: Column) -> tuple[float, float, float]:
    """First losses, level of those of the second half, and size of most steps between these.

    Of means of up to 16 losses: single ones of small batches differ as much in a healthy run. The
    level is the size of the losses, or how far they have fallen: they may end at 0, or below.
    """
    start = min(float(np.median(losses[:length])) for length in (1, 3, _MANY))
    late = losses[len(losses) // 2 :]
    length = max(1, min(16, len(late) // 16))
    means = late[len(late) % length :].reshape(-1, length).mean(axis=1)
    level = max(float(np.median(np.abs(means))), start - float(np.median(means)))
    return abs(start), level, float(np.quantile(np.abs(np.diff(means)), 0.75))


def _noise(losses: Column) -> float:
    """Standard deviation between neighbours, by medians, so that neither trend nor spikes count."""
    differences = np.diff(losses)
    spread = np.median(np.abs(differences - np.median(differences)))
    return float(1.4826 * spread / math.sqrt(2))


def _falls(losses: Column) -> list[tuple[float, float, float]]:
    """Medians of beginnings of several lengths, of the last quarter, and the error of their gap."""
    size = len(losses)
    end = losses[-max(3, size // 4) :]
    last, noise = float(np.median(end)), _noise(losses) if size > 2 else math.inf
    errors = {
        length: 1.25 * noise * math.sqrt(1 / length + 1 / len(end))
        for length in (3, max(3, size // 20), max(3, size // 10), max(3, size // 4))
    }
    return [(float(np.median(losses[:n])), last, error) for n, error in errors.items()]


def _steps(evidence: Evidence) -> Column:
    """Steps of the finite losses."""
    steps: Column = evidence.column("step")[np.isfinite(evidence.column("loss"))]
    return steps
