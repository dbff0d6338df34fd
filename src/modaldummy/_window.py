"""What the backward passes between two steps of an optimizer have taught, on all ranks."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from modaldummy._errors import UnsupportedEngineError
from modaldummy._modalities import ModalityKey

# What the ranks tell each other of a key; the largest number wins.
_UNSEEN, _INACTIVE, _TAUGHT = range(3)


@dataclass
class _Record:
    seen: bool = False
    taught: set[ModalityKey] = field(default_factory=set)


class Window:
    """The keys of a map that were active in a backward pass since the gradients were last cleared.

    Args:
        keys: All keys of the map, in the same order on all ranks.
        is_cleared: Whether the optimizer has no gradient at all.
    """

    def __init__(self, keys: Sequence[ModalityKey], is_cleared: Callable[[], bool]) -> None:
        self._keys = keys
        self._is_cleared = is_cleared
        self._record = _Record()

    def watch(self, active: Iterable[ModalityKey], loss: Tensor) -> None:
        """Note the `active` keys once a backward pass reaches `loss`.

        Where that cannot be seen they count at once, which may hold too little, never too much: in
        compiled code, and for a loss without a graph, which may be part of one that has a graph.
        """
        if torch.compiler.is_compiling() or not loss.requires_grad:
            self._note(active)
            return
        check_not_capturing()
        # What was noted before this loss was computed, and only that, can have been cleared since.
        before = self._record if self._record.seen else None
        loss.register_hook(functools.partial(self._on_backward, list(active), before))

    def close(self) -> None:
        """The optimizer has stepped.

        Where GradScaler had the device skip the step, the gradients are not finite, and every
        step until they are cleared is skipped too.
        """
        self._record = _Record()

    def outcome(
        self, group: "dist.ProcessGroup | None"
    ) -> tuple[list[ModalityKey], list[ModalityKey]]:
        """Keys active in some backward pass of some rank, and those inactive in all there were."""
        taught = self._record.taught
        marks = [
            _UNSEEN if not self._record.seen else _TAUGHT if key in taught else _INACTIVE
            for key in self._keys
        ]
        marks = _maximum(marks, group)
        by_mark = {
            mark: [key for key, own in zip(self._keys, marks, strict=True) if own == mark]
            for mark in (_TAUGHT, _INACTIVE)
        }
        return by_mark[_TAUGHT], by_mark[_INACTIVE]

    def _on_backward(
        self, active: Iterable[ModalityKey], before: _Record | None, _gradient: Tensor
    ) -> None:
        if before is self._record and self._is_cleared():
            self._record = _Record()
        self._note(active)

    def _note(self, active: Iterable[ModalityKey]) -> None:
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


def _maximum(marks: list[int], group: "dist.ProcessGroup | None") -> list[int]:
    """The element-wise maximum over the ranks of `group`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return marks
    tensor = torch.tensor(marks, device=_device(group))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    agreed: list[int] = tensor.tolist()
    return agreed


def _device(group: "dist.ProcessGroup | None") -> str:
    """Type of device that the backend of `group` takes tensors on, the CPU if it can.

    A tensor on the CPU needs no wait for the device.
    """
    # Such as "cpu:gloo,cuda:nccl".
    types = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in types else types[0]
