"""Measures the gradients of all parameters of a map at once."""

import functools
import math
import operator
import weakref
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._core.paths import strip_wrappers
from modaldummy._core.reduce import Groups, by_layout, norms
from modaldummy._engines import has_unscaled, local_shard
from modaldummy._errors import UnsupportedEngineError, describe

Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
Places: TypeAlias = np.ndarray[tuple[int], np.dtype[np.intp]]
Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool]]


class Stock:
    """The parameters of a map, each once, and what is the same about them from step to step.

    To work that out takes as long as to measure 1,000 small gradients.

    Args:
        located: What each key of the map owns now.

    Attributes:
        parameters: In map order.
        bare: Their full names in the bare model.
        members: Key of the map to the places of its parameters.
        names: Keys for a logger, one for each parameter; see `_names`.
    """

    def __init__(self, located: Mapping[ModalityKey, Sequence[OwnedParameter]]) -> None:
        self._found = _flat(located)
        self._sizes = list(map(len, located.values()))
        self.parameters = list({id(parameter): parameter for parameter in self._found}.values())
        place = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self.members: dict[ModalityKey, Places] = {
            key: np.array(list(dict.fromkeys(place[id(p)] for _, p, _ in own)), dtype=np.intp)
            for key, own in located.items()
        }
        self.bare = [""] * len(place)
        for own in reversed(list(located.values())):
            for name, parameter, _ in reversed(own):
                self.bare[place[id(parameter)]] = strip_wrappers(name)
        names = functools.partial(_names, self.bare, self.members)
        self.names = functools.lru_cache(maxsize=32)(names)
        self._there: list[bool] = []
        self._groups: Groups = {}

    def fits(self, located: Mapping[ModalityKey, Sequence[OwnedParameter]]) -> bool:
        """Whether these are the same parameters at the same places."""
        same_sizes = list(map(len, located.values())) == self._sizes
        return same_sizes and all(map(operator.is_, _flat(located), self._found))

    def measure(self, scaler: Any, full: bool) -> tuple[Numbers, Mask]:
        """Norm of the gradient of each parameter, NaN where it has none, and which have one."""
        gradients = [parameter.grad for parameter in self.parameters]
        there = [gradient is not None for gradient in gradients]
        lengths = self._norms([dense(g) for g in gradients if g is not None], there)
        if full:
            lengths = _over_shards(self.parameters, there, lengths)
        factor = _factor(scaler, self.device).to(lengths.dtype)
        # Together, so that the host waits for the device once.
        numbers = torch.cat([lengths, factor.reshape(1)]).numpy(force=True).astype(np.float64)
        known = np.array(there)
        norm = np.full(len(there), math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):  # a scaler's factor may become 0
            norm[known] = numbers[:-1] / numbers[-1]
        return norm, known

    @property
    def device(self) -> torch.device:
        """Where numbers about all parameters meet."""
        return self.parameters[0].device

    def _norms(self, gradients: list[Tensor], there: list[bool]) -> Tensor:
        if there == self._there:
            try:
                return norms(gradients, self._groups, device=self.device)
            except RuntimeError:  # of other dtypes, shapes or devices than those before them
                pass
        self._there, self._groups = there, by_layout(gradients)
        return norms(gradients, self._groups, device=self.device)


# A model that swaps its parameters gets a new stock at the next call.
_STOCKS: weakref.WeakKeyDictionary[DummyLossWrapper, Stock] = weakref.WeakKeyDictionary()


def stock_of(wrapper: DummyLossWrapper) -> Stock:
    """The parameters of the wrapper's map, as the model is now."""
    located = {key: wrapper.parameters.occurrences(key) for key in wrapper.parameters.paths}
    stock = _STOCKS.get(wrapper)
    if stock is None or not stock.fits(located):
        stock = _STOCKS[wrapper] = Stock(located)
    return stock


def _flat(located: Mapping[ModalityKey, Sequence[OwnedParameter]]) -> list[nn.Parameter]:
    return [parameter for own in located.values() for _, parameter, _ in own]


def _names(
    bare: Sequence[str],
    members: Mapping[ModalityKey, Places],
    prefix: str,
    label: bool,
    taught: Collection[ModalityKey],
    everything: bool,
) -> list[str]:
    """`<prefix>/[<owner>]/<parameter>` for each parameter, if `label`; else without the brackets.

    The owner is the first key of the map that has the parameter. In a label, a key of `taught`
    goes before others, which are `inactive`; with `everything` active there is no label.
    """
    where = {key: f"/{text_of(key)}" for key in members}
    if label and everything:
        where = dict.fromkeys(members, "")
    elif label:
        where = {key: f"/[{text_of(key) if key in taught else 'inactive'}]" for key in members}
    places = [""] * len(bare)
    for key in reversed([*taught, *members] if label else list(members)):
        for index in members[key]:
            places[index] = where[key]
    return [f"{prefix}{place}/{name}" for place, name in zip(places, bare, strict=True)]


def dense(gradient: Tensor) -> Tensor:
    """A strided tensor that has the norm of what this rank has of a gradient."""
    shard = gradient if type(gradient) is Tensor else local_shard(gradient)
    return shard.coalesce().values() if shard.is_sparse else shard


def _factor(scaler: Any, device: torch.device) -> Tensor:
    if scaler is None:
        return torch.ones((), device=device)
    if isinstance(scaler, Real) and not isinstance(scaler, bool):
        if not 0 < float(scaler) < math.inf:
            raise ValueError(f"`scaler` must be a finite number above 0, got {describe(scaler)}.")
        return torch.tensor(float(scaler), device=device)
    if not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"`scaler` must be a GradScaler or a number, got {describe(scaler)}.")
    if has_unscaled(scaler):
        raise ValueError(
            "`scaler` has unscaled the gradients already; leave it out, or call `gradient_norms` "
            "before `scaler.unscale_(optimizer)` and `scaler.step(optimizer)`."
        )
    # On the device: `get_scale` would make the host wait.
    factor: Tensor = scaler.scale(torch.ones((), device=device))
    return factor


def _over_shards(
    parameters: Sequence[nn.Parameter], there: Sequence[bool], lengths: Tensor
) -> Tensor:
    """Norms of whole gradients out of those of this rank's shards."""
    known = [index for index, has in enumerate(there) if has]
    # Parameters without a gradient here may have one on another rank, in another dtype.
    squares = lengths.new_zeros(len(parameters), dtype=torch.float64)
    squares[known] = lengths.double().square()
    sharded: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, parameter in enumerate[Any](parameters):
        placements = getattr(parameter, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise UnsupportedEngineError(
                f"A parameter of shape {list(parameter.shape)} has the placements {placements}, "
                "a sum over ranks that is yet to be made; redistribute it, or leave out `full`."
            )
        if dims := tuple(d for d, placement in enumerate(placements) if placement.is_shard()):
            sharded.setdefault((parameter.device_mesh, dims), []).append(index)
    for (mesh, dims), indexes in sharded.items():
        part = squares[indexes]
        for dim in dims:
            dist.all_reduce(part, group=mesh.get_group(dim))
        squares[indexes] = part
    return squares.sqrt()[known]
