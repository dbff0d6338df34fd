"""Lets ranks with different modalities train under every engine."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from modaldummy._arguments import called_model, check_model, check_wrapper
from modaldummy._core import DummyLossWrapper
from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import describe
from modaldummy._group import check_group
from modaldummy._handles import Handle
from modaldummy._shadow.shadow import Shadow


def shadow_inactive(
    wrapper: DummyLossWrapper,
    model: nn.Module,
    *,
    examples: Iterable[Any] | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> "ShadowHandle":
    """Let each rank take part in the collectives of towers that it does not run.

    FSDP with a unit per tower and ZeRO-3 gather the parameters of a tower when it runs; ZeRO-2
    reduces gradients in the order in which they arrive. Ranks with different modalities then hang,
    or silently get wrong gradients. After this call, a rank whose batch lacks a modality calls the
    tower on a recorded input and ties its outputs to the loss with a gradient of exactly zero. The
    parameters get the dummy gradient, ``scale`` times the upstream gradient of the loss.

    Args:
        wrapper: The wrapper, whose map names the towers.
        model: The module that training calls: an FSDP root, a DeepSpeed engine, DDP, or the plain
            module before any of these.
        examples: Batches that together contain every modality. Each is passed to the model,
            ``model(**batch)`` for a mapping and ``model(*batch)`` otherwise, without a backward
            pass. Small ones make cheap shadows. Under an engine all ranks need the same.
        group: The ranks that train together; all ranks by default. They compare their records once,
            in the first forward pass.

    Returns:
        A handle. Its ``record()`` records a model that is called in another way.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The wrapper has a shadow already, or ``model`` shares no parameter with it.
        RecordError: From the record, or with several ranks from the first forward pass: a key of
            the map has no tower that was called, or towers were called in different orders. From
            any forward pass: it does not fit the record, or the model has changed.
        UnsupportedEngineError: From the same places: a tower runs inside another one, an argument
            of it cannot be copied, or something else that the how-to page lists.
        RankDisagreementError: From the first forward pass: another rank did not come to it in time.
    """
    check_wrapper(wrapper, model)
    check_model(model)
    check_group(group)
    batches = None if examples is None else batches_of(examples, "`examples`")
    handle = ShadowHandle(Shadow(wrapper, called_model(wrapper, model), group))
    if batches is not None:
        try:
            with handle.record():
                for example in batches:
                    model(**example) if isinstance(example, Mapping) else model(*example)
        except BaseException:
            handle.remove()
            raise
    return handle


def batches_of(examples: Any, name: str) -> list[Any]:
    """The batches that an argument called `name` lists; a single batch in its place is refused."""
    if isinstance(examples, (Tensor, Mapping, str)) or not isinstance(examples, Iterable):
        raise TypeError(f"{name} must be a list of batches, got {describe(examples)}.")
    batches = list(examples)
    for batch in batches:
        if not isinstance(batch, (Mapping, tuple, list)):
            raise TypeError(
                f"{name} must contain mappings, for `model(**batch)`, or tuples, for "
                f"`model(*batch)`, got {describe(batch)}. Put a single argument into a tuple."
            )
    return batches


class ShadowHandle(Handle):
    """What ``shadow_inactive`` returns. ``remove()``, or the end of a ``with`` block, ends it."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__(shadow.remove, type(shadow.model).__name__)
        self._shadow = shadow

    @property
    def shadowed(self) -> tuple[ModalityKey, ...]:
        """Keys of the map whose towers the last forward pass shadowed."""
        return self._shadow.shadowed

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward passes in a ``with`` block, in place of earlier records.

        Buffers and the random state are as before afterwards. Do not call ``backward`` in it.
        """
        with self._shadow.record():
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave forward passes alone in a ``with`` block, for code that is alike on all ranks."""
        before, self._shadow.is_paused = self._shadow.is_paused, True
        try:
            yield
        finally:
            self._shadow.is_paused = before
