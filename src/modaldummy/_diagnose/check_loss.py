"""Checks of the course of a loss: is it finite, does it fall, is it steady?"""

import math

import numpy as np

from modaldummy._diagnose.evidence import Evidence, Outcome, Sign
from modaldummy._diagnose.signals import Column
from modaldummy._findings import Finding

_MANY = 8  # losses of one set of modalities that say something about its course
_CERTAIN = 4.0  # standard errors; several beginnings are tried
_VISIBLE = 0.5  # a share of the first losses; where a smaller fall shows, there is none
_EXPLOSION = 10.0  # of a gradient norm, over the usual one
_TINY = 0.05  # of the first losses; below, a loss may jump as it will


def finite(evidence: Evidence) -> Outcome:
    """MD201 and MD202: NaN or infinity, at once or after some steps."""
    losses = evidence.tallies["loss broken"]
    if not losses.seen:
        return "no loss is logged: a key `loss`, `train/loss` or `modaldummy/real`"
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
    if not math.isnan(growth):
        found["gradient_growth"] = growth
    grown = f", after real gradients grew {growth:.3g} times" if growth > _EXPLOSION else ""
    return Finding(
        "MD202",
        "error",
        f"The loss becomes NaN or infinite at step {losses.first:g}{grown}.",
        found,
        "Lower the learning rate or clip gradients; look at the batch of that step.",
    )


def _growth(evidence: Evidence, step: float) -> float:
    """Largest of the last real gradient norms before `step`, over the median of those before.

    NaN if there are too few.
    """
    norms = evidence.column("real_norm")
    before = norms[np.isfinite(norms) & (evidence.column("step") <= step)]
    if len(before) < _MANY:
        return math.nan
    usual = float(np.median(before[:-5]))
    return float(before[-5:].max()) / usual if usual else math.nan


def uncapped(evidence: Evidence) -> Outcome:
    """MD203: a parameter of an inactive modality is not finite."""
    sums = evidence.tallies["report/uncapped broken"]
    if not sums.seen:
        return "`modaldummy/uncapped` is not logged: `wrapper.last.as_dict()`"
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
        return reason
    losses, steps, sets = _finite_losses(evidence)
    series = [losses[sets == one] for one in np.unique(sets)]
    series = [part for part in series if len(part) >= min(_MANY, len(losses))] or [losses]
    falls = [fall for part in [*series, _together(losses, sets)] for fall in _falls(part)]
    first, last, error = max(falls, key=lambda fall: (fall[0] - fall[1]) / (fall[2] or 1e-300))
    numbers = {"from": first, "to": last, "losses": evidence.tallies["loss broken"].seen}
    share = (first - last) / abs(first) if first else 0.0
    if first - last > _CERTAIN * error and share > evidence.limits.decrease:
        return Sign(f"from {first:.4g} to {last:.4g}, where it is clearest", numbers)
    visible = min((_CERTAIN * error / abs(first) for first, _, error in falls if first), default=0)
    if visible > _VISIBLE:
        return f"too noisy: a fall by less than {visible:.0%} would not show"
    numbers["median"] = float(np.median(np.concatenate(series)))
    numbers["first_step"] = float(steps[0])
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
        return "which modalities were active is not logged: `wrapper.last.as_dict()`"
    if reason := _unfit(evidence):
        return reason
    losses, steps, sets = _finite_losses(evidence)
    together = _together(losses, sets)
    start = min(float(np.median(together[:length])) for length in (1, 3, _MANY))
    # Steps between means of up to 16: single losses of small batches jump in a healthy run too.
    late = together[len(together) // 2 :]
    length = max(1, min(16, len(late) // 16))
    means = late[len(late) % length :].reshape(-1, length).mean(axis=1)
    # The size of the losses, or how far they have fallen: they may end at 0, or below.
    level = max(float(np.median(np.abs(means))), start - float(np.median(means)))
    jump = float(np.quantile(np.abs(np.diff(means)), 0.75))
    numbers = {"jump": jump, "level": level, "first_losses": abs(start)}
    if jump <= evidence.limits.unrest * level or jump <= _TINY * abs(start):
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
    losses, least = evidence.tallies["loss broken"], max(evidence.limits.least, _MANY)
    if losses.hits:
        return "the loss does not stay finite"
    return f"{losses.seen} losses are too few; {least} are needed" if losses.seen < least else None


def _finite_losses(evidence: Evidence) -> tuple[Column, Column, Column]:
    """Finite losses in order, their steps, and numbers of the sets of active modalities.

    The number of an unknown set is infinity: these losses come last.
    """
    known = np.isfinite(evidence.column("loss"))
    sets = np.nan_to_num(evidence.column("set"), nan=np.inf)
    return evidence.column("loss")[known], evidence.column("step")[known], sets[known]


def _together(losses: Column, sets: Column) -> Column:
    """Losses without what sets one set of active modalities apart from others."""
    apart = losses.copy()
    for one in np.unique(sets):
        apart[sets == one] -= np.median(losses[sets == one])
    return apart + np.median(losses)


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
    lengths = (3, max(3, size // 20), max(3, size // 10), max(3, size // 4))
    errors = [1.25 * noise * math.sqrt(1 / length + 1 / len(end)) for length in lengths]
    firsts = [float(np.median(losses[:length])) for length in lengths]
    return [(first, last, error) for first, error in zip(firsts, errors, strict=True)]
