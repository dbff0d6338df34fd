"""The loss wrapper: the shell that ties map, batch and dummy term together."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from modaldummy._batch import Reader
from modaldummy._call import CallReader, check_names
from modaldummy._ddp import check_ddps, ddps_around
from modaldummy._errors import BatchMetadataError, describe
from modaldummy._kinds import check_gathered, check_readable, reached
from modaldummy._loss import Result, check_loss, replace_loss, take_loss
from modaldummy._modalities import ModalityKey, ModalityMap, ParameterMap
from modaldummy._paths import Located
from modaldummy._reduce import accumulation_dtype
from modaldummy._report import StepReport
from modaldummy._term import Term, dummy_term, magnitude


class DummyLossWrapper:
    r"""Adds a dummy term to a loss, so that parameters of absent modalities get a gradient.

    .. math::
        L_\text{total} = L + \operatorname{clip}\Bigl(s \sum_{p \in \text{inactive}} \sum_i p_i,\;
        \pm f\,|L|\Bigr), \qquad \frac{\partial L_\text{total}}{\partial p_i} \equiv s

    for scale :math:`s` and `max_fraction` :math:`f`. The gradient does not see the clipping.

        >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
        >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
        >>> batch = {"T1": torch.ones(3, 4)}
        >>> loss = wrapper.total(model["T1"](batch["T1"]).square().mean(), batch)
        >>> loss.backward()
        >>> model["dMRI"].bias.grad
        tensor([1.0000e-07, 1.0000e-07])

    Args:
        model: Owner of the parameters; bare, or wrapped by DDP, `torch.compile` and the like.
        modality_param_map: Which parameters each modality owns. A key is a modality, or a tuple of
            modalities that own parameters jointly: such a fusion module is inactive unless all of
            them are active. A value is a dotted path of a module or parameter, a shell glob over
            full parameter names, a module, a parameter, or an iterable of these. All become paths
            that are looked up again at each call.
        scale: Gradient per element of an inactive parameter for an upstream gradient of 1. `0.0`
            hands out exact zeros; `None` only connects: backward visits the parameters and hands
            them no gradient.
        max_fraction: Bound on `|dummy| / |real|`; `None` for no bound.
        gradient_only: Leave the value of the loss bit for bit as it is, and read no parameter.
        resolver: Reads the active modalities from a batch, in place of `active_modalities`.

    Attributes:
        last: What the last call in gradient mode did, or None before the first.

    Raises:
        ParameterMapError: The map is empty, a key is no name, or a spec matches nothing in `model`.
        ValueError: `scale` or `max_fraction` is not a finite number >= 0 or None.
        TypeError: `model` is no module, `resolver` not callable, or `gradient_only` no bool.
        UnsupportedEngineError: `model` is DDP with `find_unused_parameters=True`, or with
            `static_graph=True` and a `scale` of None. A DDP around `model` is for `preflight`.

    Note:
        A dummy gradient connects, it does not teach. SGD moves a parameter by `lr * scale` a step;
        Adam and other optimizers that divide by the gradient's own size turn it into a full step.
    """

    def __init__(
        self,
        model: nn.Module,
        modality_param_map: ParameterMap,
        scale: float | None = 1e-7,
        *,
        max_fraction: float | None = 1e-4,
        gradient_only: bool = False,
        resolver: Callable[[Any], Iterable[str]] | None = None,
    ) -> None:
        if resolver is not None and not callable(resolver):
            raise TypeError(f"`resolver` must be callable or None, got {describe(resolver)}.")
        if not isinstance(gradient_only, bool):
            raise TypeError(f"`gradient_only` must be a bool, got {describe(gradient_only)}.")
        self._map = ModalityMap(model, modality_param_map)
        self._reader = Reader(self._map.modalities)
        self._scale = _check_number("scale", scale)
        self._max_fraction = _check_number("max_fraction", max_fraction)
        self._gradient_only = gradient_only
        self._resolver = resolver
        check_ddps(ddps_around(model.modules(), self._map.owned(self._map.paths)), self._scale)
        self.last: StepReport | None = None
        # Told of each loss and of the keys of the map that are active in it.
        self._observers: list[Callable[[list[ModalityKey], Tensor], None]] = []

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities of the map, in map order."""
        return self._map.modalities

    def named_parameters(self, modality: ModalityKey) -> dict[str, nn.Parameter]:
        """Parameters of one key of the map by full name, as the model is now.

        Args:
            modality: A key of the map. A modality that stands only in tuple keys owns nothing
                alone, so that its dict is empty.

        Raises:
            UnknownModalityError: The map has no such modality.
            ParameterMapError: A path matches nothing in the model any more.
        """
        return self._map.named_parameters(modality)

    def __call__(self, loss_fn: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap a loss function, so that what it returns carries the dummy term.

        The wrapped function takes the same arguments and, if `loss_fn` has no such parameter, a
        keyword `modalities=`. Which modalities are active is read, before `loss_fn` runs, from the
        first of: that keyword; a parameter called `active_modalities`, `modalities` or `modality`;
        the first argument, in signature order, that holds metadata. Tensors, arrays, numbers, bare
        strings, modules, callables without keys, a first parameter `self` or `cls`, and collections
        with neither a modality, a mapping nor an object in them are not asked.

        Works on whatever `loss_fn` returns: a tensor; a tuple or list that starts with the loss; a
        mapping or object with `loss`. Only the loss is replaced, on a shallow copy. The result is
        a plain function, also for an `nn.Module`, whose parameters it does not register.

            >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
            >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
            >>> criterion = wrapper(nn.MSELoss())
            >>> loss = criterion(model["T1"](torch.ones(3, 4)), torch.ones(3, 2), modalities="T1")
            >>> wrapper.last.inactive
            ('dMRI',)

        Raises:
            TypeError: `loss_fn` is not callable or, when called, returns no loss.
            BatchMetadataError: No argument of a call says which modalities are active.
            UnknownModalityError: A call names a modality that the map does not have.
        """
        if not callable(loss_fn):
            raise TypeError(
                f"`loss_fn` must be callable, got {describe(loss_fn)}; for a loss that is already "
                "computed use `wrapper.total(real, batch)`."
            )
        reader = CallReader(loss_fn, self._reader, self._resolver)
        # A module used as loss function keeps its state to itself.
        updated = ("__dict__",) if inspect.isroutine(loss_fn) else ()

        @functools.wraps(loss_fn, updated=updated)
        def wrapped(*args: Any, **kwargs: Any) -> Result:
            given = reader.take_keyword(kwargs)
            if not torch.is_grad_enabled():
                return loss_fn(*args, **kwargs)
            active = reader.active(args, kwargs, given)
            result = loss_fn(*args, **kwargs)
            real = take_loss(result)
            total = self._add(real, active)
            return result if total is real else replace_loss(result, total)

        wrapped._modaldummy_wrapper = self  # type: ignore[attr-defined]  # for `preflight`
        return wrapped

    def total(self, real: Tensor, batch: Any) -> Tensor:
        """Real loss plus dummy term: the explicit form, for a training loop of your own.

        Args:
            real: The real loss, usually of shape `[]`. A loss of any other shape gets the dummy
                added to each element, so that a later `.mean()` keeps the scale, while a `.sum()`
                multiplies it by the number of elements; the bound is on the mean of `|real|`. A
                loss without a graph is accepted.
            batch: The batch or its metadata, in any form of `active_modalities`.

        Returns:
            A new tensor of the shape and dtype of `real`; `real` itself where nothing is inactive,
            where all inactive parameters are frozen, and without gradient mode, where the batch is
            not even looked at.

        Raises:
            TypeError: `real` is no real-valued tensor.
            BatchMetadataError: The batch does not say which modalities it holds.
            UnknownModalityError: The batch names a modality that the map does not have.
            ParameterMapError: A path matches nothing in the model any more.

        Note:
            A loss that is NaN or infinite stays so. The gradients of all other parameters are bit
            for bit those of `real` alone.
        """
        check_loss(real, "`real`")
        return self._add(real, self._active(batch)) if torch.is_grad_enabled() else real

    def dummy(self, batch: Any) -> Tensor:
        """The dummy term alone, of shape `[]`; there is no real loss to hold it against, so no cap.

        An exact zero without a graph where nothing is inactive and without gradient mode.

        Args:
            batch: The batch or its metadata, in any form of `active_modalities`.

        Raises:
            BatchMetadataError: The batch does not say which modalities it holds.
            UnknownModalityError: The batch names a modality that the map does not have.
            ParameterMapError: A path matches nothing in the model any more.
        """
        device = next(self._map.model.parameters()).device
        unknown = torch.full((), math.nan, device=device)
        zero = torch.zeros_like(unknown)
        if not torch.is_grad_enabled():
            return zero
        active = self._active(batch)
        idle = self._map.inactive_parameters(active)
        term = self._term(idle, None) if idle else Term(zero, zero, zero, unknown, 0)
        self._report(active, idle, term)
        return self._observed(active, term.connected)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a model of its own, which nothing that watches this wrapper knows.
        return vars(self) | {"_observers": []}

    def __repr__(self) -> str:
        paths = {key: list(paths) for key, paths in self._map.paths.items()}
        return (
            f"{type(self).__name__}({type(self._map.model).__name__}(...), {paths}, "
            f"scale={self._scale}, max_fraction={self._max_fraction}, "
            f"gradient_only={self._gradient_only}, resolver={self._resolver})"
        )

    def _active(self, batch: Any) -> set[str]:
        if self._resolver is None:
            return self._reader.read(batch, "`batch`")
        names = self._resolver(batch)
        if names is None:
            raise BatchMetadataError(
                f"`resolver` returned None for {describe(batch)}; return the active modalities, "
                "an empty list if there are none."
            )
        return check_names(names, self._reader)

    def _add(self, real: Tensor, active: set[str], weight: float = 1.0) -> Tensor:
        idle = self._map.inactive_parameters(active)
        if not idle:
            seen = magnitude(real, accumulation_dtype([real.dtype]))
            zero = torch.zeros_like(seen)
            self._report(active, idle, Term(zero, zero, zero, seen, 0))
            return self._observed(active, real)
        term = self._term(idle, real, weight)
        self._report(active, idle, term)
        # An integer loss is promoted: it could not carry the gradient.
        dtype = real.dtype if real.is_floating_point() else term.connected.dtype
        connected = term.connected
        if real.ndim:
            # Before the cast: backward then adds up the upstream gradients of all elements in the
            # accumulation dtype, where more than 65,504 of them do not overflow float16.
            connected = connected.expand(real.shape)
        return self._observed(active, real + connected.to(dtype))

    def _term(self, idle: list[Located], real: Tensor | None, weight: float = 1.0) -> Term:
        check_gathered(idle)
        if self._scale is None:
            return dummy_term([parameter for _, parameter, _ in idle], None, real=real)
        read = self._scale > 0 and not self._gradient_only
        if read:
            check_readable(idle, (idle[0][1] if real is None else real).device)
        return dummy_term(
            [reached(located) for located in idle],
            self._scale * weight,
            real=real,
            max_fraction=self._max_fraction,
            read=read,
        )

    def _observed(self, active: set[str], loss: Tensor) -> Tensor:
        for observe in self._observers:
            observe(self._map.active_keys(active), loss)
        return loss

    def _report(self, active: set[str], idle: list[Located], term: Term) -> None:
        self.last = StepReport(
            active=self._reader.in_map_order(active),
            inactive=tuple(name for name in self.modalities if name not in active),
            real=term.real,
            dummy=term.value,
            uncapped=term.uncapped,
            num_params=len(idle),
            num_elements=term.num_elements,
        )


def _check_number(name: str, number: Any) -> float | None:
    if number is None:
        return None
    if isinstance(number, Real) and not isinstance(number, bool):
        try:
            value = float(number)
        except OverflowError:  # an integer beyond all floats
            value = math.inf
        if 0 <= value < math.inf:
            return value
    raise ValueError(f"`{name}` must be a finite number >= 0 or None, got {describe(number)}.")
