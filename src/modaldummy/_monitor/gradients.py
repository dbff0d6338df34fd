"""Measures the gradients of all parameters of a map with one copy to the host."""

import functools
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, ParameterMap, text_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._engines import has_unscaled, is_fsdp1_parameter, local_shard
from modaldummy._errors import UnsupportedEngineError
from modaldummy._monitor.tensor_norms import tensor_norms
from modaldummy._numbers import check_number


class ParameterTable:
    """The parameters of a map by their `id`, and what stays the same from step to step.

    Making a table takes as long as measuring 1,000 small gradients, so `table_of` keeps it.

    Args:
        parameter_map: The map, whose model decides what the table contains.

    Attributes:
        ids: Key of the map to the `id` of each parameter that it owns.
        parameters: All parameters in map order.
        names: Their full names in the bare model.
        log_keys: Gives the log key of each parameter; see `_log_keys` for its arguments.
    """

    def __init__(self, parameter_map: ParameterMap) -> None:
        owned = parameter_map.all()
        self.ids = _ids_of(parameter_map)
        self.parameters = {i: parameter for i, (_, parameter, _) in owned.items()}
        self.names = {i: strip_wrappers(name) for i, (name, _, _) in owned.items()}
        log_keys = functools.partial(_log_keys, self.names, self.ids)
        self.log_keys = functools.lru_cache(maxsize=32)(log_keys)

    def measure(self, scaler: Any = None, *, full: bool = False) -> dict[int, float]:
        """The norm of each gradient that exists now, by the `id` of its parameter.

        Args:
            scaler: What the gradients were multiplied by; see `gradient_norms`.
            full: Whether to measure whole DTensors rather than the shards of this rank.
        """
        parameters = self.parameters.items()
        gradients = {i: g for i, parameter in parameters if (g := parameter.grad) is not None}
        device = next(iter(self.parameters.values())).device
        norms = tensor_norms(list(map(local_elements, gradients.values())), device=device)
        if full:
            norms = _norms_over_ranks(self.parameters, gradients, norms)
        factor = _loss_factor(scaler, norms.device).to(norms.dtype)
        # One tensor, so that the host waits for the device once.
        numbers = torch.cat([norms, factor.reshape(1)]).numpy(force=True).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # a GradScaler may fall to 0
            numbers = numbers[:-1] / numbers[-1]
        return dict(zip(gradients, numbers.tolist(), strict=True))


_TABLES: weakref.WeakKeyDictionary[DummyLossWrapper, ParameterTable] = weakref.WeakKeyDictionary()


def table_of(wrapper: DummyLossWrapper) -> ParameterTable:
    """The parameters of the wrapper's map, as the model is now.

    Raises:
        ParameterMapError: A path matches nothing in the model any more.
    """
    table = _TABLES.get(wrapper)
    if table is None or table.ids != _ids_of(wrapper.parameters):
        table = _TABLES[wrapper] = ParameterTable(wrapper.parameters)
    return table


def local_elements(gradient: Tensor) -> Tensor:
    """The elements of a gradient that this rank stores, as a strided tensor.

    A sparse gradient is coalesced first, because several of its entries may belong to one element.
    """
    shard = gradient if type(gradient) is Tensor else local_shard(gradient)
    return shard.coalesce().values() if shard.is_sparse else shard


def _ids_of(parameter_map: ParameterMap) -> dict[ModalityKey, list[int]]:
    # Of a tied parameter the map gives the `id` once for each of its names.
    paths = parameter_map.paths
    return {key: list(dict.fromkeys(parameter_map.parameter_ids(key))) for key in paths}


def _log_keys(
    names: Mapping[int, str],
    ids: Mapping[ModalityKey, Collection[int]],
    prefix: str,
    label: bool,
    active_keys: Collection[ModalityKey],
) -> dict[int, str]:
    """The log key of each parameter: `<prefix>/[<owner>]/<name>`, or without brackets and labels.

    The owner is the first key of the map that owns the parameter. In a label, active keys go before
    inactive ones, which are all written `inactive`. Nobody is named if all keys are active.
    """
    if not label:
        owners = {key: f"/{text_of(key)}" for key in ids}
    elif len(active_keys) == len(ids):
        owners = dict.fromkeys(ids, "")
    else:
        owners = dict.fromkeys(ids, "/[inactive]") | {k: f"/[{text_of(k)}]" for k in active_keys}
    owner_of: dict[int, str] = {}
    # The key that is written last stays, so the first owner comes last.
    for key in reversed([*active_keys, *ids] if label else list(ids)):
        owner_of |= dict.fromkeys(ids[key], owners[key])
    return {i: f"{prefix}{owner_of[i]}/{name}" for i, name in names.items()}


def _loss_factor(scaler: Any, device: torch.device) -> Tensor:
    """The number that the loss was multiplied by, on `device`."""
    if scaler is None:
        return torch.ones((), device=device)
    if not callable(getattr(scaler, "scale", None)):
        number = check_number("scaler", scaler, positive=True, alternative=" or a GradScaler")
        return torch.tensor(number, device=device)
    if has_unscaled(scaler):
        raise ValueError(
            "`scaler` has unscaled the gradients already. Leave it out, or call `gradient_norms` "
            "before `scaler.unscale_(optimizer)` and `scaler.step(optimizer)`."
        )
    # `scaler.get_scale()` would make the host wait for the device.
    factor: Tensor = scaler.scale(torch.ones((), device=device))
    return factor


def _norms_over_ranks(
    parameters: Mapping[int, nn.Parameter], measured: Collection[int], local_norms: Tensor
) -> Tensor:
    """The norms of whole gradients, from the norms of the shards on all ranks."""
    row_of = {parameter_id: row for row, parameter_id in enumerate(parameters)}
    rows_here = [row_of[parameter_id] for parameter_id in measured]
    # A parameter without a gradient on this rank may have one on another rank, in another dtype.
    squares = local_norms.new_zeros(len(parameters), dtype=torch.float64)
    squares[rows_here] = local_norms.double().square()
    for (mesh, dims), rows in _sharded_rows(parameters.values()).items():
        sums = squares[rows]
        for dim in dims:
            dist.all_reduce(sums, group=mesh.get_group(dim))
        squares[rows] = sums
    return squares.sqrt()[rows_here]


def _sharded_rows(parameters: Iterable[Any]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """Device mesh, and dimensions of it over which a DTensor is sharded, to rows of parameters."""
    sharded: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for row, parameter in enumerate(parameters):
        if is_fsdp1_parameter(parameter):
            raise UnsupportedEngineError(
                "`full=True` cannot measure parameters that FSDP1 shards. Leave it out, and call "
                "`gradient_norms` inside `with FullyShardedDataParallel.summon_full_params(model, "
                "with_grads=True):`."
            )
        placements = getattr(parameter, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise UnsupportedEngineError(
                f"`full=True` cannot measure a parameter of shape {list(parameter.shape)} with the "
                f"placements {placements}, because its ranks have not added up their parts yet. "
                "Redistribute it, or leave out `full`."
            )
        if dims := tuple(dim for dim, place in enumerate(placements) if place.is_shard()):
            sharded.setdefault((parameter.device_mesh, dims), []).append(row)
    return sharded
