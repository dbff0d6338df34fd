"""Checks of gradients, of the dummy beside the loss, and of what the batches contain."""

import numpy as np

from modaldummy._diagnose.evidence import Evidence, Outcome, Sign
from modaldummy._findings import Finding

_NO_NORMS = "gradient norms are not logged: `gradient_norms(wrapper)`"
_AVERAGED = "gradients are averages over ranks, labels are of one rank"
_CONSTANT = 0.02  # distance of binary logarithms from whole numbers


def there(evidence: Evidence) -> Outcome:
    """MD211, MD212 and MD213: dummy gradients that are zero, or missing."""
    missing, zero = evidence.tallies["dummy missing"], evidence.tallies["dummy zero"]
    if not missing.seen:
        return f"no step with an inactive modality, or {_NO_NORMS}"
    if evidence.scale is None:
        return "with `scale=None` inactive modalities get no gradient of their own"
    if missing.hits == missing.seen:
        return Finding(
            "MD212",
            "error",
            "Inactive modalities never had a gradient: backward ran on a loss without dummy term.",
            {"first_step": missing.first, "steps": missing.seen},
            "Call `backward()` on what `wrapper.total` or the wrapped loss function returns; "
            "`missing_gradients(wrapper, strict=True)` after `backward()` names the parameters.",
        )
    if missing.hits:
        return Finding(
            "MD213",
            "error",
            f"Inactive modalities had no gradient at {missing.hits:,} of {missing.seen:,} steps.",
            {"first_step": missing.first, "without": missing.hits, "steps": missing.seen},
            "Let every loss go through the wrapper, not only those of batches of one modality; "
            "`missing_gradients(wrapper, strict=True)` at that step names the parameters.",
        )
    if zero.hits and evidence.scale:
        return Finding(
            "MD211",
            "error",
            f"Gradients of inactive modalities are exactly zero at {zero.hits:,} of "
            f"{zero.seen:,} steps.",
            {"first_step": zero.first, "zero": zero.hits, "steps": zero.seen},
            "Use a scale above 0; in float16, do not average or clip dummy gradients to zero "
            "(`preflight` tells). If the scale is meant to be 0.0, pass `scale=0.0`.",
        )
    return Sign(f"there at all {missing.seen:,} steps", {"steps": missing.seen})


def sized(evidence: Evidence) -> Outcome:
    """MD214, MD215 and MD216: dummy gradients that are not `scale * sqrt(elements)`."""
    if not evidence.scale:
        return "the scale is 0 or None"
    if (evidence.column("grad/ranks") > 1).any():
        return _AVERAGED
    norms, elements = evidence.column("dummy_norm"), evidence.column("report/num_elements")
    told = np.isfinite(norms) & (norms > 0) & (elements > 0)
    if not told.any():
        return f"no inactive gradient beside `modaldummy/num_elements`, or {_NO_NORMS}"
    factors = norms[told] / (evidence.scale * np.sqrt(elements[told]))
    low, middle, high = (float(q) for q in np.quantile(factors, (0.25, 0.5, 0.75)))
    limit, steps = evidence.limits.factor, evidence.column("step")[told]
    wrong = (factors > limit) | (factors < 1 / limit)
    numbers = {"times_expected": middle, "quartiles": [low, high], "steps": len(factors)}
    if wrong.any():
        numbers["first_step"] = float(steps[wrong][0])
    # A GradScaler doubles or halves its factor now and then.
    powers = np.log2(factors / middle)
    constant = float(np.quantile(np.abs(powers - np.round(powers)), 0.95)) < _CONSTANT
    if constant and not 1 / limit <= middle <= limit:
        return Finding(
            "MD214",
            "warning",
            f"Gradients of inactive modalities are {middle:.3g} times what a scale of "
            f"{evidence.scale:g} makes them.",
            numbers | {"scale_that_fits": evidence.scale * middle},
            "If the loss was scaled, pass `gradient_norms(..., scaler=scaler)`; if the wrapper has "
            "another scale, pass that to `diagnose`.",
        )
    share = float((factors > limit).mean())
    if share > evidence.limits.broken:
        return Finding(
            "MD216",
            "warning",
            f"Modalities that are called inactive get real gradients, at {share:.0%} of steps.",
            numbers | {"share": share},
            "Compare the metadata with what forward uses; look for weights shared by a function "
            "call and for penalties on all weights. With accumulation, pass "
            "`gradient_norms(..., active=...)` all that was active.",
        )
    if middle < evidence.limits.clipped:
        return Finding(
            "MD215",
            "warning",
            f"Gradients of inactive modalities are clipped to {middle:.2g} of what they should be.",
            numbers,
            "Raise `max_norm`, or look for what makes the total norm so large; in float16 such "
            "gradients end as zero.",
        )
    return Sign(f"{middle:.4g} times scale * sqrt(elements)", numbers)


def real(evidence: Evidence) -> Outcome:
    """MD221: gradients of active modalities are not finite."""
    broken = evidence.tallies["real_norm broken"]
    if not broken.seen:
        return _NO_NORMS
    # A GradScaler starts too large, and then tries a larger factor now and then.
    later = (broken.hits - broken.lead) / max(broken.seen - broken.lead, 1)
    some = broken.hits < broken.seen
    if some and later <= evidence.limits.broken and broken.run < evidence.limits.early:
        text = f"finite at {broken.seen - broken.hits:,} of {broken.seen:,} steps"
        return Sign(text, {"not_finite": broken.hits, "steps": broken.seen})
    return Finding(
        "MD221",
        "error",
        f"Gradients of active modalities are NaN or infinite at {broken.hits:,} of "
        f"{broken.seen:,} steps, first at step {broken.first:g}.",
        {"first_step": broken.first, "not_finite": broken.hits, "steps": broken.seen},
        "Find the first operation that makes NaN with `torch.autograd.detect_anomaly()`; look for "
        "NaN in the data of the modality, for divisions, logarithms and roots of 0.",
    )


def reached(evidence: Evidence) -> Outcome:
    """MD217: a modality that has no gradient, or a zero one, whenever it is active."""
    tallies = {name: evidence.tallies[f"silent/{name}"] for name in evidence.signals.modalities}
    told = {name: t for name, t in tallies.items() if t.seen >= evidence.limits.early}
    if not told:
        return _NO_NORMS
    trainable = [name for name in told if evidence.tallies[f"trainable/{name}"].hits]
    silent = {name: told[name] for name in trainable if told[name].share == 1}
    if not silent:
        return Sign(f"those of {', '.join(told)}, where not frozen", {"modalities": list(told)})
    return Finding(
        "MD217",
        "error",
        f"No gradient reaches {', '.join(silent)}, although batches hold it.",
        {
            "modalities": list(silent),
            "first_step": min(tally.first for tally in silent.values()),
            "steps": {name: tally.seen for name, tally in silent.items()},
        },
        "Look for `.detach()`, `torch.no_grad()` or a weight of 0 between the tower and the loss, "
        "and for a forward that leaves the tower out.",
    )


def small(evidence: Evidence) -> Outcome:
    """MD222 and MD223: the dummy is large beside the loss."""
    above, largest = evidence.tallies["fraction above"], evidence.largest
    if not above.seen:
        return "no finite `modaldummy/fraction` is logged: `wrapper.last.as_dict()`"
    limits = evidence.limits
    if not above.hits:
        return Sign(f"at most {largest:.2g} of the loss", {"largest": largest})
    large = largest > limits.large_fraction
    limit = limits.large_fraction if large else limits.fraction
    return Finding(
        "MD223" if large else "MD222",
        "error" if large else "warning",
        f"The dummy is up to {largest:.2g} of the loss, above {limit:g}.",
        {
            "first_step": above.first,
            "largest": largest,
            "largest_step": evidence.largest_step,
            "steps_above": above.hits,
            "steps": above.seen,
        },
        "Leave `max_fraction` at 1e-4 and the scale at 1e-7; add the dummy by "
        "`wrapper.total(loss, batch)`, since `wrapper.dummy(batch)` has no bound.",
    )


def ratio(evidence: Evidence) -> Outcome:
    """MD224: real gradients are not much larger than dummy ones."""
    if (evidence.column("grad/ranks") > 1).any():
        return _AVERAGED
    reals, dummies = evidence.column("real_norm"), evidence.column("dummy_norm")
    told = np.isfinite(reals) & np.isfinite(dummies) & (dummies > 0)
    if not told.any():
        return f"no step with real and dummy gradients, or {_NO_NORMS}"
    ratios = reals[told] / dummies[told]
    middle = float(np.median(ratios))
    numbers = {
        "median": middle,
        "5_percent": float(np.quantile(ratios, 0.05)),
        "real_norm": float(np.median(reals[told])),
        "dummy_norm": float(np.median(dummies[told])),
    }
    if middle >= evidence.limits.ratio:
        return Sign(f"{middle:,.0f} : 1, median", numbers)
    return Finding(
        "MD224",
        "info",
        f"Real gradients are {middle:,.0f} times dummy ones, below {evidence.limits.ratio:,.0f}.",
        numbers,
        "Nothing, if the loss falls: the ratio depends on the size of the towers, "
        "`real / (scale * sqrt(elements))`, and shrinks as training converges.",
    )


def occurring(evidence: Evidence) -> Outcome:
    """MD225 and MD227: a modality that no batch contains, or none that is ever inactive."""
    tallies = {name: evidence.tallies[f"contains/{name}"] for name in evidence.signals.modalities}
    shares = {name: tally.share for name, tally in tallies.items() if tally.seen}
    if not shares:
        return "which modalities were active is not logged: `wrapper.last.as_dict()`"
    rows = max(tally.seen for tally in tallies.values())
    if rows < evidence.limits.least:
        return f"{rows} batches are too few; {evidence.limits.least} are needed"
    never = [name for name, share in shares.items() if share == 0]
    if set(shares.values()) == {1}:
        return Finding(
            "MD227",
            "info",
            "No modality was ever inactive, so the wrapper did nothing.",
            {"steps": rows},
            "Nothing to do if every batch contains every modality. If the dataset fills a missing "
            "modality with zeros, pass names or flags: zeros count as data.",
        )
    if not never:
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return Sign(f"active: {text}", shares)
    return Finding(
        "MD225",
        "warning",
        f"No batch contains {', '.join(never)}.",
        {"never": never, "steps": tallies[never[0]].seen},
        "Look at the names in the metadata and at the sampler; nothing is learned for a modality "
        "that never occurs, and without `hold_inactive` some optimizers move it.",
    )


def mixed(evidence: Evidence) -> Outcome:
    """MD226: nearly all batches contain a single modality."""
    single = evidence.tallies["single"]
    if len(evidence.signals.modalities) < 2 or not single.seen:
        return "which modalities were active is not logged: `wrapper.last.as_dict()`"
    numbers = {"share": single.share, "steps": single.seen}
    if single.share <= evidence.limits.single:
        return Sign(f"{single.share:.0%} of batches hold a single modality", numbers)
    return Finding(
        "MD226",
        "info",
        f"{single.share:.0%} of batches hold a single modality.",
        numbers,
        "Nothing, if that is meant; what joins modalities learns from mixed batches alone.",
    )
