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

    for ``scale`` :math:`s` and ``max_fraction`` :math:`f`: the gradient does not see the clipping.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).square().mean(), ["T1"]).backward()
    >>> model["dMRI"].bias.grad
    tensor([1.0000e-07, 1.0000e-07])
    >>> wrapper.modalities, list(wrapper.named_parameters("dMRI"))
    (('T1', 'dMRI'), ['dMRI.weight', 'dMRI.bias'])
    >>> wrapper.dummy(["T1", "dMRI"])
    tensor(0.)

    Args:
        model: Owner of the parameters; bare, or wrapped by DDP, ``torch.compile`` and the like.
        modality_param_map: Modality to what it owns; what a tuple of modalities owns jointly, as a
            fusion module, is inactive unless all are active. A value is a dotted path of a module
            or parameter, a shell glob over full parameter names, a module, a parameter, or an
            iterable of these; all become paths, which are looked up again at each call.
        scale: Gradient per element of an inactive parameter for an upstream gradient of 1. ``0.0``
            hands out exact zeros; ``None`` only connects: backward hands the parameters nothing.
        max_fraction: Bound on ``|dummy| / |real|``; ``None`` for no bound.
        gradient_only: Leave the value of the loss bit for bit as it is, and read no parameter.
        resolver: Reads the active modalities from a batch, in place of ``active_modalities``.

    Attributes:
        last: What the last call in gradient mode did, or None before the first.

    Raises:
        ParameterMapError: The map is empty, a key no name, or a spec nothing or trainable float8.
        ValueError: ``scale`` or ``max_fraction`` is not a finite number >= 0 or None.
        TypeError: ``model`` is no module, ``resolver`` not callable, or ``gradient_only`` no bool.
        UnsupportedEngineError: ``model`` is DDP with ``find_unused_parameters=True``, or with
            ``static_graph=True`` and a scale of None. A DDP around ``model`` is for ``preflight``.

    Note:
        For a scale above 0 a dummy gradient is nowhere zero in the parameter's own dtype; that of a
        sparse embedding is empty. All other gradients stay bit for bit. Nothing waits for another
        rank or, masks of a batch apart, for the device. A dummy gradient connects, it does not
        teach: SGD makes ``lr * scale`` of it, Adam almost ``lr``, and ``hold_inactive`` nothing.
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
        """Parameters of one key of the map, frozen ones included, as the model is now.

        Args:
            modality: A key of the map; a modality that is only part of tuple keys owns nothing.

        Returns:
            Full name to parameter.

        Raises:
            UnknownModalityError: The map has no such modality.
            ParameterMapError: A path matches nothing in the model any more.
        """
        return self._map.named_parameters(modality)

    def __call__(self, loss_fn: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap a loss function, so that what it returns carries the dummy term.

        Which modalities are active is read, before ``loss_fn`` runs, from the first of: a keyword
        ``modalities=``; a parameter called ``active_modalities``, ``modalities`` or ``modality``;
        the first argument, in signature order, that holds metadata. Tensors, arrays, numbers, bare
        strings, captions, modules, functions and a first ``self`` or ``cls`` are not asked.

        >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
        >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
        >>> criterion = wrapper(nn.MSELoss())
        >>> loss = criterion(model["T1"](torch.ones(3, 4)), torch.ones(3, 2), modalities="T1")
        >>> wrapper.last.inactive
        ('dMRI',)

        Args:
            loss_fn: Returns the loss, a tuple or list that starts with it, or what has it as
                ``loss``: a mapping or object, on a shallow copy of which it is replaced.

        Returns:
            A function of the same arguments, and of ``modalities=``, which ``loss_fn`` gets only if
            it names it. It registers no parameters, also where ``loss_fn`` is a module.

        Raises:
            TypeError: ``loss_fn`` is not callable or, when called, returns no loss.
            BatchMetadataError: From a call: no argument says which modalities are active.
            UnknownModalityError: From a call: one names a modality that the map does not have.
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
            real: The real loss, usually of shape ``[]``, with a graph or without. To one of another
                shape ``[...]`` the dummy is added at each element: a later ``.mean()`` keeps the
                scale, a ``.sum()`` multiplies it, and the bound is on the mean of ``|real|``.
            batch: The batch or its metadata, in any form of ``active_modalities``.

        Returns:
            A new tensor of the shape and dtype of ``real``, an integer one promoted; ``real``
            itself where nothing trainable is inactive, and without gradient mode, where the batch
            is not even looked at. A loss that is not finite stays what it is.

        Raises:
            TypeError: ``real`` is no real-valued tensor.
            BatchMetadataError: The batch does not say which modalities it holds.
            UnknownModalityError: The batch names a modality that the map does not have.
            ParameterMapError: A path matches nothing any more, or no gradient fits what it matches.
            UnsupportedEngineError: ZeRO-3 has emptied an inactive parameter.
        """
        check_loss(real, "`real`")
        return self._add(real, self._active(batch)) if torch.is_grad_enabled() else real

    def dummy(self, batch: Any) -> Tensor:
        """The dummy term alone; there is no real loss to hold it against, so no bound.

        What ``total`` raises about the batch and the parameters, this does too.

        Args:
            batch: The batch or its metadata, in any form of ``active_modalities``.

        Returns:
            A tensor of shape ``[]``, zero where the sum is not finite; an exact zero without a
            graph where nothing trainable is inactive, and without gradient mode.
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
