"""Norms of gradients by modality, under names for a logger."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch.distributed as dist

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.parameter_map import text_of
from modaldummy._errors import describe
from modaldummy._monitor.gradients import Mask, Places, stock_of


def gradient_norms(
    wrapper: DummyLossWrapper,
    *,
    label: bool = True,
    prefix: str = "grad",
    active: Any = None,
    scaler: Any = None,
    full: bool = False,
) -> dict[str, float]:
    r"""Gradient norms of all modalities and their parameters, to be logged after ``backward()``.

    .. math::
        n_p = \sqrt{\sum_i |g_{p,i}|^2}, \qquad n_m = \sqrt{\sum_{p \in m} n_p^2}, \qquad
        r = \sqrt{\sum_{p \in \text{active}} n_p^2 \Big/ \sum_{p \in \text{inactive}} n_p^2}

    The host waits for the device once, however many parameters there are. The keys:

    - ``grad/[T1]/<parameter>``: of a parameter that an active key of the map owns, here T1;
    - ``grad/[inactive]/<parameter>``: of one that only inactive keys own;
    - ``grad/<parameter>``: of any, where nothing is inactive;
    - ``grad_norm/<modality>``: of all parameters that a key owns, also those that others share;
    - ``grad_ratio``: real to dummy, where something is inactive and has a gradient that is not 0;
    - ``grad_ranks``: how many ranks there are, where there are several.

    Tuple keys count as modalities and read ``T1-dMRI``. A parameter is called as in the bare model;
    one without a gradient is left out.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).square().mean(), ["T1"]).backward()
    >>> found = gradient_norms(wrapper)
    >>> list(found)[:3]
    ['grad/[T1]/T1.weight', 'grad/[T1]/T1.bias', 'grad/[inactive]/dMRI.weight']
    >>> print(f"{found['grad_norm/dMRI']:.3g}")  # 1e-7 * sqrt(14)
    3.74e-07

    Args:
        wrapper: The wrapper whose loss was backwarded.
        label: False for keys that are the same at each step: ``grad/<modality>/<parameter>``,
            ``active/<modality>``, 1 or 0, and ``grad_missing/<modality>``, how many trainable
            parameters have no gradient. What would be left out is NaN then.
        prefix: What to write for ``grad`` in all keys but ``active/<modality>``.
        active: What was active, in any form of ``active_modalities``; by default what the last loss
            said. With accumulation pass a list of the reports, ``wrapper.last``, of all batches
            since the gradients were cleared.
        scaler: A ``torch.amp.GradScaler`` that has not unscaled the gradients yet, or the number
            that the loss was multiplied by; the norms are divided by it.
        full: Measure whole DTensors rather than this rank's shards. All ranks have to call then;
            it takes one reduction for each way in which parameters are sharded.

    Returns:
        Key to number; of the parameters of the map alone.

    Raises:
        RuntimeError: No loss has gone through the wrapper, and ``active`` is not given.
        UnknownModalityError: ``active`` names a modality that the map does not have.
        BatchMetadataError: ``active`` does not say which modalities it means.
        ParameterMapError: A path matches nothing in the model any more.
        ValueError: ``prefix`` is no string or empty, the factor not a finite number above 0, or the
            scaler has unscaled the gradients.
        TypeError: ``wrapper`` or ``scaler`` is of another kind.
        UnsupportedEngineError: ``full``, and a DTensor is a sum over ranks that is yet to be made.

    Note:
        Once DDP has reduced them, gradients are averages over all ranks, while the labels are
        those of this rank: an ``[inactive]`` one may be real, from another rank. A sparse gradient
        is coalesced first, for which a GPU makes the host wait once more. In float32, elements
        below 1e-22 count as 0, and norms above 1e19 as infinite, as their squares are out of range;
        ``missing_gradients`` looks at the elements themselves.
    """
    check_wrapper(wrapper)
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"`prefix` must be a string such as 'grad', got {describe(prefix)}.")
    batches = _batches(wrapper, active)
    present = {name for names in batches for name in names}
    keys = {key for names in batches for key in wrapper.parameters.active_keys(names)}
    taught = tuple(key for key in wrapper.parameters.paths if key in keys)
    everything = len(taught) == len(wrapper.parameters.paths)
    stock = stock_of(wrapper)
    norm, there = stock.measure(scaler, full)
    names = stock.names(prefix, label, taught, everything)
    found = dict(zip(names, norm.tolist(), strict=True))
    if not there.all():
        for name, has, parameter in zip(names, there, stock.parameters, strict=True):
            if not has and (label or not parameter.requires_grad):
                del found[name]

    def total(chosen: Places | Mask) -> float:
        own = norm[chosen][there[chosen]]
        return float(np.linalg.norm(own)) if own.size else math.nan

    real = np.zeros(len(norm), dtype=bool)
    for key, members in stock.members.items():
        real[members] |= key in taught
        if not label:
            trainable = [
                stock.parameters[place].requires_grad for place in members[~there[members]]
            ]
            found[f"{prefix}_missing/{text_of(key)}"] = float(sum(trainable))
        if not label or there[members].any():
            found[f"{prefix}_norm/{text_of(key)}"] = total(members)
    ratio = total(real) / (total(~real) or math.nan)
    if not label or not math.isnan(ratio):
        found[f"{prefix}_ratio"] = ratio
    if not label:
        found |= {f"active/{name}": float(name in present) for name in wrapper.modalities}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found[f"{prefix}_ranks"] = float(dist.get_world_size())
    return found


def _batches(wrapper: DummyLossWrapper, active: Any) -> list[Collection[str]]:
    """The active modalities of each batch that the gradients are of."""
    reports = [active] if isinstance(active, StepReport) else active
    if isinstance(reports, list) and reports and isinstance(reports[0], StepReport):
        return [report.active for report in reports]
    if active is not None:
        return [wrapper.reader.read_value(active, "`active`", explicit=True)]
    if wrapper.last is None:
        raise RuntimeError(
            "No loss has gone through the wrapper, so that nobody knows which modalities are "
            "active; call `gradient_norms` after `wrapper.total(...).backward()`, or pass `active`."
        )
    return [wrapper.last.active]
