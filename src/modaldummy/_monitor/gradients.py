"""Measures the gradients of all parameters of a map with one copy to the host."""

import functools
import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey, ParameterMap, text_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._core.reduce import Groups, by_spec
from modaldummy._engines import has_unscaled, local_shard
from modaldummy._errors import UnsupportedEngineError
from modaldummy._monitor.tensor_norms import tensor_norms
from modaldummy._numbers import check_number

Norms: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
Rows: TypeAlias = np.ndarray[tuple[int], np.dtype[np.intp]]
Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool]]


class Measurement(NamedTuple):
    """The gradients of all parameters of a table at one moment.

    Attributes:
        table: The table.
        norms: Norm of the gradient in each row, NaN in a row without a gradient.
        has_gradient: Whether the parameter in each row has a gradient.
    """

    table: "ParameterTable"
    norms: Norms
    has_gradient: Mask

    def joint_norm(self, rows: Rows | Mask) -> float:
        """Norm of the gradients in these rows taken together, NaN if there are none."""
        measured = self.norms[rows][self.has_gradient[rows]]
        return float(np.linalg.norm(measured)) if measured.size else math.nan


class ParameterTable:
    """The parameters of a map, one in each row, and what stays the same from step to step.

    Making a table takes as long as measuring 1,000 small gradients, so `table_of` keeps it.

    Args:
        parameter_map: The map, whose model decides what the table contains.

    Attributes:
        parameters: All parameters in map order, each once.
        names: Their full names in the bare model.
        rows: Key of the map to the rows of the parameters that it owns.
        log_keys: Gives the log key of each row; see `_log_keys` for its arguments.
    """

    def __init__(self, parameter_map: ParameterMap) -> None:
        owned_parameters = parameter_map.all()
        row_of = {parameter_id: row for row, parameter_id in enumerate(owned_parameters)}
        self._parameter_ids = _parameter_ids(parameter_map)
        self.parameters = [owned.parameter for owned in owned_parameters.values()]
        self.names = [strip_wrappers(owned.name) for owned in owned_parameters.values()]
        self.rows: dict[ModalityKey, Rows] = {
            key: np.array([row_of[parameter_id] for parameter_id in dict.fromkeys(ids)], np.intp)
            for key, ids in self._parameter_ids.items()
        }
        log_keys = functools.partial(_log_keys, self.names, self.rows)
        self.log_keys = functools.lru_cache(maxsize=32)(log_keys)
        self._measured_rows: list[bool] = []
        self._layouts: Groups = {}

    @property
    def device(self) -> torch.device:
        """The device on which the norms of all parameters are joined."""
        return self.parameters[0].device

    def is_current(self, parameter_map: ParameterMap) -> bool:
        """Whether each key of the map still owns the same parameters in the same order."""
        return self._parameter_ids == _parameter_ids(parameter_map)

    def measure(self, scaler: Any = None, *, full: bool = False) -> Measurement:
        """Measure the gradient of each parameter as it is now.

        Args:
            scaler: What the gradients were multiplied by; see `gradient_norms`.
            full: Whether to measure whole DTensors rather than the shards of this rank.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        has_gradient = [gradient is not None for gradient in gradients]
        elements = [local_elements(gradient) for gradient in gradients if gradient is not None]
        local_norms = self._norms(elements, has_gradient)
        if full:
            local_norms = _norms_over_ranks(self.parameters, has_gradient, local_norms)
        factor = _loss_factor(scaler, self.device).to(local_norms.dtype)
        # One tensor, so that the host waits for the device once.
        numbers = torch.cat([local_norms, factor.reshape(1)]).numpy(force=True).astype(np.float64)
        mask = np.array(has_gradient)
        all_norms = np.full(len(mask), math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):  # a GradScaler may fall to 0
            all_norms[mask] = numbers[:-1] / numbers[-1]
        return Measurement(self, all_norms, mask)

    def _norms(self, elements: list[Tensor], has_gradient: list[bool]) -> Tensor:
        if has_gradient == self._measured_rows:
            try:
                return tensor_norms(elements, self._layouts, device=self.device)
            except RuntimeError:  # the gradients have new dtypes, shapes or devices
                pass
        self._measured_rows, self._layouts = has_gradient, by_spec(elements)
        return tensor_norms(elements, self._layouts, device=self.device)


_TABLES: weakref.WeakKeyDictionary[DummyLossWrapper, ParameterTable] = weakref.WeakKeyDictionary()


def table_of(wrapper: DummyLossWrapper) -> ParameterTable:
    """The parameters of the wrapper's map, as the model is now.

    Raises:
        ParameterMapError: A path matches nothing in the model any more.
    """
    table = _TABLES.get(wrapper)
    if table is None or not table.is_current(wrapper.parameters):
        table = _TABLES[wrapper] = ParameterTable(wrapper.parameters)
    return table


def local_elements(gradient: Tensor) -> Tensor:
    """The elements of a gradient that this rank stores, as a strided tensor.

    A sparse gradient is coalesced first, because several of its entries may belong to one element.
    """
    shard = gradient if type(gradient) is Tensor else local_shard(gradient)
    return shard.coalesce().values() if shard.is_sparse else shard


def _parameter_ids(parameter_map: ParameterMap) -> dict[ModalityKey, list[int]]:
    return {key: parameter_map.parameter_ids(key) for key in parameter_map.paths}


def _log_keys(
    names: Sequence[str],
    rows: Mapping[ModalityKey, Rows],
    prefix: str,
    label: bool,
    active_keys: Collection[ModalityKey],
) -> list[str]:
    """The log key of each row: `<prefix>/[<owner>]/<name>` with labels, else without brackets.

    The owner is the first key of the map that owns the parameter. In a label, active keys go before
    inactive ones, which are all written `inactive`. Nobody is named if all keys are active.
    """
    if not label:
        owners = {key: f"/{text_of(key)}" for key in rows}
    elif len(active_keys) == len(rows):
        owners = dict.fromkeys(rows, "")
    else:
        owners = {key: f"/[{text_of(key) if key in active_keys else 'inactive'}]" for key in rows}
    owner_of_row = [""] * len(names)
    # The key that is written last stays, so the first owner comes last.
    for key in reversed([*active_keys, *rows] if label else list(rows)):
        for row in rows[key]:
            owner_of_row[row] = owners[key]
    return [f"{prefix}{owner}/{name}" for owner, name in zip(owner_of_row, names, strict=True)]


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
    parameters: Sequence[nn.Parameter], has_gradient: Sequence[bool], local_norms: Tensor
) -> Tensor:
    """The norms of whole gradients, from the norms of the shards on all ranks."""
    # A parameter without a gradient on this rank may have one on another rank, in another dtype.
    squares = local_norms.new_zeros(len(parameters), dtype=torch.float64)
    measured_rows = np.flatnonzero(has_gradient)
    squares[measured_rows] = local_norms.double().square()
    for (mesh, dims), rows in _sharded_rows(parameters).items():
        sums = squares[rows]
        for dim in dims:
            dist.all_reduce(sums, group=mesh.get_group(dim))
        squares[rows] = sums
    return squares.sqrt()[measured_rows]


def _sharded_rows(parameters: Sequence[Any]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """Device mesh, and dimensions of it over which a DTensor is sharded, to rows of parameters."""
    sharded: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for row, parameter in enumerate(parameters):
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
