"""Norms of gradients by modality, under keys for a logger."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from modaldummy._arguments import check_wrapper
from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._errors import describe
from modaldummy._group import num_ranks
from modaldummy._monitor.gradients import table_of

Keys: TypeAlias = tuple[ModalityKey, ...]


def gradient_norms(
    wrapper: DummyLossWrapper,
    *,
    label: bool = True,
    prefix: str = "grad",
    active: Any = None,
    scaler: Any = None,
    full: bool = False,
) -> dict[str, float]:
    r"""Gradient norms of all parameters of the map, to be logged after ``backward()``.

    .. math::
        n_p = \sqrt{\sum_i |g_{p,i}|^2}, \qquad n_m = \sqrt{\sum_{p \in m} n_p^2}, \qquad
        r = \sqrt{\sum_{p \in \text{active}} n_p^2 \Big/ \sum_{p \in \text{inactive}} n_p^2}

    - ``grad/[T1]/<parameter>``: norm of a parameter that an active key of the map owns, here T1;
    - ``grad/[inactive]/<parameter>``: norm of a parameter that only inactive keys own;
    - ``grad/<parameter>``: norm of any parameter, in a batch where all keys are active;
    - ``grad_norm/<modality>``: norm of all parameters that a key owns, shared ones included;
    - ``grad_ratio``: real to dummy norm, unless the dummy gradients are zero or there are none;
    - ``grad_ranks``: number of ranks, if there are several.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).square().mean(), ["T1"]).backward()
    >>> print(f"{gradient_norms(wrapper)['grad_norm/dMRI']:.3g}")  # 1e-7 * sqrt(14)
    3.74e-07

    Args:
        wrapper: The wrapper of the loss.
        label: False gives the same keys at each step: ``grad/<first owner>/<parameter>``,
            ``active/<modality>``, and the number of missing gradients
            ``grad_missing/<modality>``. The norm of a missing gradient is NaN.
        prefix: Text in place of ``grad`` in all keys but ``active/<modality>``.
        active: What was active, in any form of ``active_modalities``, or a list of the reports
            ``wrapper.last`` of accumulated batches; by default what the last loss said.
        scaler: The ``torch.amp.GradScaler``, if it has not unscaled the gradients yet, or the
            number that the loss was multiplied by. The norms are divided by it.
        full: Measure whole DTensors, not the shards of this rank. All ranks must call then.

    Returns:
        Log key to number. A tuple key reads ``T1-dMRI``. With labels, a parameter without a
        gradient is left out. Under DDP, a gradient under ``[inactive]`` may be real, from another
        rank.

    Raises:
        RuntimeError: No loss has gone through the wrapper, and ``active`` is not given.
        UnknownModalityError: ``active`` names a modality that is not in the map.
        BatchMetadataError: ``active`` does not say which modalities are active.
        ParameterMapError: A path matches nothing in the model any more.
        ValueError: ``prefix`` is not a string or is empty, ``scaler`` is not a finite number above
            0, or the scaler has unscaled the gradients already.
        TypeError: ``wrapper`` or ``scaler`` has the wrong type.
        UnsupportedEngineError: With ``full``, a DTensor is a sum that ranks have not added up yet.
    """
    check_wrapper(wrapper)
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"`prefix` must be a non-empty string, got {describe(prefix)}.")
    batches = _active_names(wrapper, active)
    active_keys = _active_keys(wrapper, batches)
    table = table_of(wrapper)
    norms = table.measure(scaler, full=full)
    log: dict[str, float] = {}
    for i, log_key in table.log_keys(prefix, label, active_keys).items():
        if i in norms or (not label and table.parameters[i].requires_grad):
            log[log_key] = norms.get(i, math.nan)
    for key, ids in table.ids.items():
        if not label:
            num_missing = sum(table.parameters[i].requires_grad for i in ids if i not in norms)
            log[f"{prefix}_missing/{text_of(key)}"] = float(num_missing)
        if not label or any(i in norms for i in ids):
            log[f"{prefix}_norm/{text_of(key)}"] = _joint_norm(norms, ids)
    active_ids = {i for key in active_keys for i in table.ids[key]}
    # In map order, because a sum in the order of a set of ids differs from run to run.
    real_norm = _joint_norm(norms, [i for i in norms if i in active_ids])
    dummy_norm = _joint_norm(norms, [i for i in norms if i not in active_ids])
    # NaN if either norm is missing or the dummy gradients are zero.
    ratio = real_norm / (dummy_norm or math.nan)
    if not label or not math.isnan(ratio):
        log[f"{prefix}_ratio"] = ratio
    if not label:
        names = {name for batch in batches for name in batch}
        log |= {f"active/{name}": float(name in names) for name in wrapper.modalities}
    if num_ranks(None) > 1:
        log[f"{prefix}_ranks"] = float(num_ranks(None))
    return log


def _active_names(wrapper: DummyLossWrapper, active: Any) -> list[Collection[str]]:
    """The active modalities of each batch since the gradients were cleared."""
    reports = [active] if isinstance(active, StepReport) else active
    if isinstance(reports, list) and reports and isinstance(reports[0], StepReport):
        return [report.active for report in reports]
    if active is not None:
        return [wrapper.reader.read_value(active, "`active`", explicit=True)]
    if wrapper.last is None:
        raise RuntimeError(
            "No loss has gone through the wrapper, so it is not known which modalities are active. "
            "Call `gradient_norms` after `wrapper.total(...).backward()`, or pass `active`."
        )
    return [wrapper.last.active]


def _active_keys(wrapper: DummyLossWrapper, batches: list[Collection[str]]) -> Keys:
    """Keys of the map that were active in any of the batches, in map order."""
    keys = {key for names in batches for key in wrapper.parameters.active_keys(names)}
    return tuple(key for key in wrapper.parameters.paths if key in keys)


def _joint_norm(norms: Mapping[int, float], parameter_ids: Iterable[int]) -> float:
    """Norm of the gradients of these parameters taken together, NaN if there are none."""
    measured = [norms[i] for i in parameter_ids if i in norms]
    return math.hypot(*measured) if measured else math.nan
