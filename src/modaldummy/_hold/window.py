"""What the backward passes between two steps of an optimizer have taught, on all ranks."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from modaldummy._core.parameter_map import ModalityKey
from modaldummy._errors import UnsupportedEngineError
from modaldummy._ranks.group import num_ranks, tensor_device

# What the ranks tell each other of a key; the largest number wins.
_UNSEEN, _INACTIVE, _TAUGHT = range(3)


@dataclass
class _Record:
    """What backward passes since the gradients were found to be gone, or since the step, said."""

    seen: bool = False
    taught: set[ModalityKey] = field(default_factory=set)
    # Taught before the gradients were found to be gone.
    forgotten: set[ModalityKey] = field(default_factory=set)


class Mark:
    """A flag that compiled code can raise without a guard on what it was, as on a dict's values."""

    raised = False


class Window:
    """The keys of a map that were active in a backward pass since the gradients were last cleared.

    Args:
        keys: All keys of the map, in the same order on all ranks.
        is_cleared: Whether the optimizer has no gradient at all.
        taught: Keys that count as active in the first window.
    """

    def __init__(
        self,
        keys: Sequence[ModalityKey],
        is_cleared: Callable[[], bool],
        taught: Iterable[ModalityKey],
    ) -> None:
        self._keys = keys
        self._is_cleared = is_cleared
        known = set(taught)
        self._record = _Record(bool(known), known)
        self._at_once = {key: Mark() for key in keys}
        self._seen_at_once = Mark()

    def watch(self, active: Iterable[ModalityKey], loss: Tensor) -> None:
        """Note the `active` keys once a backward pass reaches `loss`.

        They count at once where that cannot be seen: in compiled code, and for a loss without a
        graph, which may be part of one that has a graph.
        """
        if torch.compiler.is_compiling() or not loss.requires_grad:
            self._seen_at_once.raised = True
            for key in active:
                self._at_once[key].raised = True
            return
        check_not_capturing()
        # What was noted before this loss was computed, and only that, can have been cleared since.
        before = self._record if self._record.seen else None
        loss.register_hook(functools.partial(self._on_backward, list(active), before))

    def close(self) -> None:
        """The optimizer has stepped.

        Where GradScaler had the device skip the step, the gradients are not finite and, unless
        someone mends them, every step until they are cleared is skipped too.
        """
        self._record = _Record()
        for mark in (self._seen_at_once, *self._at_once.values()):
            mark.raised = False

    def outcome(
        self,
        learned: Callable[[ModalityKey, Collection[ModalityKey]], bool],
        group: "dist.ProcessGroup | None",
        device: torch.device,
    ) -> tuple[list[ModalityKey], list[ModalityKey]]:
        """Keys active in some backward pass of some rank, and those inactive in all there were.

        Args:
            learned: Whether the gradients of a key, but for what it shares with those that are
                taught, are more than dummies. Asked only of keys that were taught before the
                gradients were found to be gone: they may have been put aside, and be back.
            group: Ranks that have to agree; None for all.
            device: Where parameters are.
        """
        record = self._record
        taught = record.taught | {key for key, mark in self._at_once.items() if mark.raised}
        taught |= {key for key in record.forgotten - taught if learned(key, taught)}
        seen = record.seen or self._seen_at_once.raised
        marks = [
            _UNSEEN if not seen else _TAUGHT if key in taught else _INACTIVE for key in self._keys
        ]
        marks = _maximum(marks, group, device)
        by_mark = {
            mark: [key for key, own in zip(self._keys, marks, strict=True) if own == mark]
            for mark in (_TAUGHT, _INACTIVE)
        }
        return by_mark[_TAUGHT], by_mark[_INACTIVE]

    def _on_backward(
        self, active: Iterable[ModalityKey], before: _Record | None, _gradient: Tensor
    ) -> None:
        record = self._record
        if before is record and self._is_cleared():
            self._record = _Record(forgotten=record.taught | record.forgotten)
        self._record.seen = True
        self._record.taught.update(active)


def check_not_capturing() -> None:
    """Refuse to take part in a CUDA graph, whose replays run no Python.

    Raises:
        UnsupportedEngineError: The current stream is being captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedEngineError(
            "`hold_inactive` decides at each step what to hold, and a replayed CUDA graph does not "
            "ask; capture the model alone, and leave the loss and `optimizer.step()` outside."
        )


def _maximum(
    numbers: list[int], group: "dist.ProcessGroup | None", device: torch.device
) -> list[int]:
    """The element-wise maximum over the ranks of `group`, `numbers` themselves if there is one.

    Args:
        numbers: As many on each rank.
        group: None for all ranks.
        device: Where parameters are.
    """
    if num_ranks(group) == 1:
        return numbers
    tensor = torch.tensor(numbers, device=tensor_device(group, device))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    agreed: list[int] = tensor.tolist()
    return agreed
