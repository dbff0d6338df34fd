"""Which keys of the map backward passes on this rank have trained since gradients were cleared."""

import functools
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import UnsupportedEngineError


class Flag:
    """A flag that compiled code can set.

    Dynamo guards on the values of a dict, so a change of one makes it compile again. It does not
    guard on an attribute that the code only sets.
    """

    is_set = False


class TrainedKeys:
    """The keys that were active in a backward pass since the gradients were last cleared.

    Gradients count as cleared after each optimizer step, and when all of them are None at the start
    of a backward pass.

    Args:
        keys: All keys of the map.
        is_cleared: Returns whether no parameter of the optimizer has a gradient.
        all_trained: Whether all keys count as trained until the first step.

    Attributes:
        before_cleared: Keys that were trained since the last step, before gradients were cleared.
    """

    def __init__(
        self, keys: Collection[ModalityKey], is_cleared: Callable[[], bool], all_trained: bool
    ) -> None:
        self.before_cleared: set[ModalityKey] = set()
        self._is_cleared = is_cleared
        # None before the first backward pass, and a new set each time the gradients are cleared.
        self._observed: set[ModalityKey] | None = set(keys) if all_trained else None
        # These keys were active in losses whose backward pass cannot be observed.
        self._unobserved = {key: Flag() for key in keys}
        self._has_unobserved = False

    @property
    def trained(self) -> set[ModalityKey] | None:
        """The trained keys; None if no backward pass has run since the gradients were cleared."""
        if self._observed is None and not self._has_unobserved:
            return None
        unobserved = {key for key, flag in self._unobserved.items() if flag.is_set}
        return unobserved | (self._observed or set())

    def observe_loss(self, active_keys: Iterable[ModalityKey], loss: Tensor) -> None:
        """Count the active keys as trained once a backward pass reaches `loss`.

        They count at once where no hook can observe the backward pass. That is the case in compiled
        code, and for a loss without a graph, which may be added to a loss that has one.
        """
        if torch.compiler.is_compiling() or not loss.requires_grad:
            self._has_unobserved = True
            for key in active_keys:
                self._unobserved[key].is_set = True
            return
        check_not_capturing()
        hook = functools.partial(self._on_backward, list(active_keys), self._observed)
        loss.register_hook(hook)

    def start_over(self) -> None:
        """Forget everything after an optimizer step.

        With GradScaler, a fused optimizer skips a step on the device, and the host does not notice.
        The gradients are then not finite. Unless someone repairs them, all steps until they are
        cleared are skipped too, so that nothing is held wrongly.
        """
        self.before_cleared = set()
        self._observed = None
        self._has_unobserved = False
        for flag in self._unobserved.values():
            flag.is_set = False

    def _on_backward(
        self,
        active_keys: Iterable[ModalityKey],
        observed_at_loss: set[ModalityKey] | None,
        _gradient: Tensor,
    ) -> None:
        if self._observed is None:
            self._observed = set()
        # Only what was trained before the loss was computed can have been cleared since then.
        elif self._observed is observed_at_loss and self._is_cleared():
            self.before_cleared |= self._observed
            self._observed = set()
        self._observed.update(active_keys)


def check_not_capturing() -> None:
    """Refuse to take part in a CUDA graph, whose replays run no Python.

    Raises:
        UnsupportedEngineError: A CUDA graph is being captured on the current stream.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedEngineError(
            "`hold_inactive` decides at each step what to hold, which a replayed CUDA graph does "
            "not do. Capture the model alone. Leave the loss and `optimizer.step()` outside."
        )
