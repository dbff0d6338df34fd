"""The loss wrapper: reads a batch, finds inactive parameters, adds their dummy term to a loss."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from modaldummy._core.batch import BatchReader, Resolver
from modaldummy._core.loss_function import Result, WrappedLoss, check_loss
from modaldummy._core.parameter import ParameterEntry, ParameterSlot
from modaldummy._core.parameter_map import ModalityKey, ModalityParamMap, ParameterMap, Step
from modaldummy._core.report import StepReport, report_of
from modaldummy._core.term import dummy_term, term_inputs
from modaldummy._engines import check_ddps, ddps_around
from modaldummy._errors import describe
from modaldummy._numbers import check_bool, check_number_or_none

Observer: TypeAlias = Callable[[Step, Tensor], None]


class Interceptor(Protocol):
    """What changes steps and losses before the dummy term; for code that extends this package."""

    def claim(self, step: Step, loss: Tensor, scale: float | None) -> tuple[Step, Tensor]:
        """The step without parameters that get their dummy gradients elsewhere, and the loss."""

    def covers(self, slot: ParameterSlot) -> bool:
        """Whether a parameter may be left to it."""


class DummyLossWrapper:
    r"""Adds a dummy term to a loss, so that parameters of inactive modalities get a gradient.

    .. math::
        L_\text{total} = L + \operatorname{clip}\Bigl(s \sum_{p \in \text{inactive}} \sum_i p_i,\;
        \pm f\,|L|\Bigr), \qquad \frac{\partial L_\text{total}}{\partial p_i} \equiv s

    for ``scale`` :math:`s` and ``max_fraction`` :math:`f`. The cap has no effect on the gradient.

    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).square().mean(), ["T1"]).backward()
    >>> model["dMRI"].bias.grad
    tensor([1.0000e-07, 1.0000e-07])
    >>> wrapper.modalities, list(wrapper.named_parameters("dMRI")), wrapper.dummy(["T1", "dMRI"])
    (('T1', 'dMRI'), ['dMRI.weight', 'dMRI.bias'], tensor(0.))
    >>> wrapper.scale, wrapper.max_fraction, wrapper.reads_parameters
    (1e-07, 0.0001, True)

    Args:
        model: Owner of the parameters; bare, or wrapped by DDP, ``torch.compile`` and the like.
        modality_param_map: Modality to what it owns: a dotted path of a module or parameter, a
            shell glob over full parameter names, a module, a parameter, or an iterable of these.
            They become paths, which are looked up again at each call. A tuple of modalities, say
            for a fusion module, is inactive unless all of them are active.
        scale: Gradient per element of an inactive parameter for an upstream gradient of 1. ``0.0``
            gives exact zeros. ``None`` keeps parameters in the graph, but their ``.grad`` stays as
            it is.
        max_fraction: Bound on ``|dummy| / |loss|``. With ``None`` the dummy term is only kept so
            small that a finite loss stays finite.
        gradient_only: Give gradients, but do not change the value of the loss or read parameters.
        resolver: Reads the active modalities from a batch, in place of ``active_modalities``. An
            explicit ``modalities=`` in a call of a wrapped loss function goes first.

    Attributes:
        last: The report of the last call in gradient mode, None before the first.
        parameters: The parameters of each key of the map; for code that extends this package.
        reader: Reads batches; for code that extends this package.

    Raises:
        ParameterMapError: The map is empty, a key is not a modality name, or a spec matches no
            parameter or a trainable float8 parameter.
        TypeError: An argument has the wrong type.
        ValueError: ``scale`` or ``max_fraction`` is negative, infinite or NaN.
        UnsupportedEngineError: ``model`` contains DDP with ``find_unused_parameters=True``, or
            with ``static_graph=True`` while the scale is None. ``preflight`` checks a DDP around
            ``model``.

    Note:
        A dummy gradient carries no training signal. SGD moves the parameter by ``lr * scale``, Adam
        by almost ``lr``; ``hold_inactive`` prevents that. No other gradient changes by a bit.
    """

    def __init__(
        self,
        model: nn.Module,
        modality_param_map: ModalityParamMap,
        scale: float | None = 1e-7,
        *,
        max_fraction: float | None = 1e-4,
        gradient_only: bool = False,
        resolver: Resolver | None = None,
    ) -> None:
        self.parameters: ParameterMap = ParameterMap(model, modality_param_map)
        self.reader: BatchReader = BatchReader(self.parameters.modalities, resolver)
        self._scale = check_number_or_none("scale", scale)
        self._max_fraction = check_number_or_none("max_fraction", max_fraction)
        self._gradient_only = check_bool("gradient_only", gradient_only)
        check_ddps(ddps_around(model.modules(), self.parameters.all()), self._scale)
        self.last: StepReport | None = None
        self._observers: dict[object, Observer] = {}
        self._interceptor: Interceptor | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities of the map, in map order."""
        return self.parameters.modalities

    @property
    def scale(self) -> float | None:
        """The scale; make a new wrapper to change it."""
        return self._scale

    @property
    def max_fraction(self) -> float | None:
        """The bound on ``|dummy| / |loss|``; make a new wrapper to change it."""
        return self._max_fraction

    @property
    def reads_parameters(self) -> bool:
        """Whether the value of the dummy term depends on the values of parameters."""
        return bool(self._scale) and not self._gradient_only

    def named_parameters(self, modality: ModalityKey) -> dict[str, nn.Parameter]:
        """Parameters of one key of the map, frozen ones included, as the model is now.

        Args:
            modality: A key of the map. A modality that occurs only in tuple keys owns nothing.

        Returns:
            Full name to parameter.

        Raises:
            UnknownModalityError: The map has no such modality.
            ParameterMapError: A path matches nothing in the model any more.
        """
        return self.parameters.named_parameters(modality)

    def __call__(self, loss_fn: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap a loss function, so that the loss it returns includes the dummy term.

        Which modalities are active is read, before ``loss_fn`` runs, from the first of: a keyword
        ``modalities=``; a parameter called ``active_modalities``, ``modalities`` or ``modality``;
        the first argument, in signature order, that contains metadata, where collections of
        nothing but strings come last. Tensors, arrays, numbers, bare strings, captions, modules,
        functions and a first ``self`` or ``cls`` are skipped.

        >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
        >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
        >>> criterion = wrapper(nn.MSELoss())
        >>> loss = criterion(model["T1"](torch.ones(3, 4)), torch.ones(3, 2), modalities="T1")
        >>> wrapper.last.inactive
        ('dMRI',)

        Args:
            loss_fn: Returns the loss, a tuple or list that starts with it, or a mapping or object
                with a field ``loss``, which is replaced on a shallow copy.

        Returns:
            A callable object of the same arguments, and of ``modalities=``, which ``loss_fn`` gets
            only if it has that parameter. It registers no parameters, even if ``loss_fn`` is a
            module. It can be pickled and copied; the copy of a model owns a wrapper of its own.

        Raises:
            TypeError: ``loss_fn`` is not callable or, when called, returns no loss.
            BatchMetadataError: From a call: no argument says which modalities are active.
            UnknownModalityError: From a call: an argument names a modality that is not in the map.
        """
        if not callable(loss_fn):
            raise TypeError(
                f"`loss_fn` must be callable, got {describe(loss_fn)}. For a loss that is already "
                "computed use `wrapper.total(loss, batch)`."
            )
        return WrappedLoss(loss_fn, self)

    def total(self, loss: Tensor, batch: Any) -> Tensor:
        """Real loss plus dummy term: the explicit form, for a training loop of your own.

        Args:
            loss: The real loss, usually of shape ``[]``, with a graph or without. For another shape
                ``[...]`` the dummy term is added to each element: a later ``.mean()`` keeps the
                scale, a ``.sum()`` multiplies it, and the bound is on the mean of ``|loss|``.
            batch: The batch or its metadata, in any form of ``active_modalities``.

        Returns:
            A new tensor with the shape and dtype of ``loss``; an integer loss becomes a floating
            one. It is ``loss`` itself if no trainable parameter is inactive. If gradients are
            disabled, it is ``loss`` itself too, and the batch is not read. A loss that is not
            finite keeps its value.

        Raises:
            TypeError: ``loss`` is not a real-valued tensor.
            BatchMetadataError: The batch does not say which modalities it contains.
            UnknownModalityError: The batch names a modality that is not in the map.
            ParameterMapError: A path matches nothing any more, or a parameter can get no gradient:
                it is lazy, float8, or on the meta device.
            UnsupportedEngineError: ZeRO-3 has emptied an inactive parameter.
        """
        check_loss(loss, "`loss`")
        if not torch.is_grad_enabled():
            return loss
        return self.add(loss, self.reader.read(batch))

    def dummy(self, batch: Any) -> Tensor:
        """The dummy term alone; without a real loss there is no bound.

        Args:
            batch: The batch or its metadata, in any form of ``active_modalities``.

        Returns:
            A tensor of shape ``[]``. It is zero if the sum is not finite. It is zero and has no
            graph if no trainable parameter is inactive, or if gradients are disabled.

        Raises:
            ModalDummyError: What ``total`` raises about the batch and the parameters.
        """
        if not torch.is_grad_enabled():
            return torch.zeros((), device=self._device(()))
        return self.add(None, self.reader.read(batch))

    def add(self, loss: Tensor | None, active: Collection[str], share: float = 1.0) -> Tensor:
        """``total``, or ``dummy``, for known modalities; for code that extends this package.

        >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
        >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"}, gradient_only=True)
        >>> wrapper.add(torch.tensor(2.0), ["T1"])
        tensor(2., grad_fn=<AddBackward0>)

        Args:
            loss: The real loss, or None for the dummy term alone.
            active: The active modalities.
            share: Factor on ``scale``, for a step whose dummy terms come from several losses.

        Returns:
            What ``total`` returns with gradients enabled; without a loss, what ``dummy`` returns.

        Raises:
            UnknownModalityError: ``active`` names a modality that is not in the map.
        """
        step = self.parameters.split(active)
        scale = None if self._scale is None else self._scale * share
        if self._interceptor is not None and loss is not None:
            step, loss = self._interceptor.claim(step, loss, scale)
        device = self._device(step.inactive_entries) if loss is None else loss.device
        read_values = self.reads_parameters
        term = dummy_term(
            term_inputs(step.inactive_entries, scale, read_values=read_values, device=device),
            scale,
            loss=loss,
            max_fraction=self._max_fraction,
            read_values=read_values,
            device=device,
        )
        total = term.connected if loss is None else term.added_to(loss)
        self.last = report_of(step, term)
        for observe in list(self._observers.values()):
            observe(step, total)
        return total

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call a function with each new total or dummy; for code that extends this package.

        >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
        >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
        >>> unsubscribe = wrapper.subscribe(lambda step, total: print(step.inactive))
        >>> total = wrapper.total(torch.tensor(2.0), ["T1"])
        ('dMRI',)
        >>> unsubscribe()

        Args:
            observer: Gets the step, and the tensor that ``total``, ``dummy`` or a wrapped loss
                function returns. It is not called while gradients are disabled.

        Returns:
            A function that ends the subscription; a second call does nothing. A copy of the wrapper
            has no subscribers.
        """
        subscription = object()  # distinct, even if the observer is not
        self._observers[subscription] = observer

        def unsubscribe() -> None:
            self._observers.pop(subscription, None)

        return unsubscribe

    @property
    def interceptor(self) -> Interceptor | None:
        """What `intercept` was called with."""
        return self._interceptor

    def intercept(self, interceptor: Interceptor | None) -> None:
        """Let an object change each step and loss first; for code that extends this package.

        Args:
            interceptor: The object; None ends it. A copy of the wrapper has none.

        Raises:
            ValueError: The wrapper has an interceptor already.
        """
        if interceptor is not None and self._interceptor is not None:
            raise ValueError("The wrapper has a shadow already. Call `remove()` on its handle.")
        self._interceptor = interceptor

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_observers": {}, "_interceptor": None}

    def __repr__(self) -> str:
        paths = {key: list(paths) for key, paths in self.parameters.paths.items()}
        return (
            f"{type(self).__name__}({type(self.parameters.model).__name__}(...), {paths}, "
            f"scale={self._scale}, max_fraction={self._max_fraction}, "
            f"gradient_only={self._gradient_only}, resolver={self.reader.resolver})"
        )

    def _device(self, inactive: Sequence[ParameterEntry]) -> torch.device:
        """Device of a dummy term without a real loss."""
        parameter = inactive[0][1] if inactive else next(self.parameters.model.parameters())
        return parameter.device
