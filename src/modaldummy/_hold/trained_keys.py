"""Which keys of the map were trained since the gradients were last cleared, on all ranks."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import UnsupportedEngineError
from modaldummy._group import num_ranks, tensor_device

# What a rank knows of a key. The ranks agree on the largest number that one of them has.
_UNKNOWN, _UNTRAINED, _TRAINED = range(3)


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
        keys: All keys of the map, in the same order on all ranks.
        is_cleared: Returns whether no parameter of the optimizer has a gradient.
        trained: Keys that count as trained until the first step.
    """

    def __init__(
        self,
        keys: Sequence[ModalityKey],
        is_cleared: Callable[[], bool],
        trained: Iterable[ModalityKey],
    ) -> None:
        self._keys = keys
        self._is_cleared = is_cleared
        # None before the first backward pass, and a new set each time the gradients are cleared.
        self._trained: set[ModalityKey] | None = set(trained) or None
        # Keys that were trained since the last step, and before the gradients were cleared.
        self._trained_before: set[ModalityKey] = set()
        # These keys were active in losses whose backward pass cannot be observed.
        self._unobserved = {key: Flag() for key in keys}
        self._has_unobserved = Flag()

    def observe_loss(self, active_keys: Iterable[ModalityKey], loss: Tensor) -> None:
        """Count the active keys as trained once a backward pass reaches `loss`.

        They count at once where no hook can observe the backward pass. That is the case in compiled
        code, and for a loss without a graph, which may be added to a loss that has one.
        """
        if torch.compiler.is_compiling() or not loss.requires_grad:
            self._has_unobserved.is_set = True
            for key in active_keys:
                self._unobserved[key].is_set = True
            return
        check_not_capturing()
        hook = functools.partial(self._on_backward, list(active_keys), self._trained)
        loss.register_hook(hook)

    def start_over(self) -> None:
        """Forget everything after an optimizer step.

        With GradScaler, a fused optimizer skips a step on the device, and the host does not notice.
        The gradients are then not finite. Unless someone repairs them, all steps until they are
        cleared are skipped too, so that nothing is held wrongly.
        """
        self._trained = None
        self._trained_before = set()
        for flag in (self._has_unobserved, *self._unobserved.values()):
            flag.is_set = False

    def agree(
        self,
        has_training_gradient: Callable[[ModalityKey, Collection[ModalityKey]], bool],
        group: "dist.ProcessGroup | None",
        device: torch.device,
    ) -> tuple[list[ModalityKey], list[ModalityKey]]:
        """The trained keys and the untrained keys, alike on all ranks.

        Args:
            has_training_gradient: Gets a key and the trained keys. Returns whether parameters that
                no trained key owns have gradients of `key` that are more than dummy gradients. It
                is called for keys that were trained before the gradients were cleared,
                because a training loop may put gradients aside and bring them back.
            group: Ranks that must agree; None for all.
            device: Device of the parameters.

        Returns:
            Keys that were active in a backward pass of some rank, and keys that were inactive in
            all of them. Both are empty if no rank ran a backward pass.
        """
        trained = {key for key, flag in self._unobserved.items() if flag.is_set}
        trained |= self._trained or set()
        returned = self._trained_before - trained
        trained |= {key for key in returned if has_training_gradient(key, trained)}
        has_backward = self._trained is not None or self._has_unobserved.is_set
        otherwise = _UNTRAINED if has_backward else _UNKNOWN
        states = [_TRAINED if key in trained else otherwise for key in self._keys]
        agreed = list(zip(self._keys, _maximum_of_ranks(states, group, device), strict=True))
        return (
            [key for key, state in agreed if state == _TRAINED],
            [key for key, state in agreed if state == _UNTRAINED],
        )

    def _on_backward(
        self,
        active_keys: Iterable[ModalityKey],
        trained_at_loss: set[ModalityKey] | None,
        _gradient: Tensor,
    ) -> None:
        if self._trained is None:
            self._trained = set()
        # Only what was trained before the loss was computed can have been cleared since then.
        elif self._trained is trained_at_loss and self._is_cleared():
            self._trained_before |= self._trained
            self._trained = set()
        self._trained.update(active_keys)


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


def _maximum_of_ranks(
    numbers: list[int], group: "dist.ProcessGroup | None", device: torch.device
) -> list[int]:
    """The element-wise maximum over the ranks of `group`; `numbers` themselves on a single rank.

    Args:
        numbers: As many on each rank.
        group: None for all ranks.
        device: Device of the parameters.
    """
    if num_ranks(group) == 1:
        return numbers
    tensor = torch.tensor(numbers, device=tensor_device(group, device))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    maximum: list[int] = tensor.tolist()
    return maximum
