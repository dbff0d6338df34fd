"""What the values of gradients say about whether a batch has taught a key."""

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._engines import local_shard, num_stored_values

# Spread of the elements of a dummy, as a part of the first: those of several ranks may differ, and
# are then added up in another order from one part of a gradient to the next, perhaps in bfloat16.
_ROUNDING = 1 / 16


class Lookout:
    """Warns, once for each key, where a gradient that is held is more than a dummy.

    To look at one makes the host wait for the device, so it is done in the first step that holds a
    key, and in each that comes twice as late as the one before.
    """

    def __init__(self) -> None:
        self._times_held: Counter[ModalityKey] = Counter()
        self._warned: set[ModalityKey] = set()

    def is_due(self, key: ModalityKey) -> bool:
        """Count a step that holds `key`, and say whether it is one to look at."""
        self._times_held[key] += 1
        times = self._times_held[key]
        return key not in self._warned and not times & (times - 1)

    def look(self, key: ModalityKey, held: Iterable[OwnedParameter]) -> None:
        """Warn if a gradient of the parameters that are held for `key` is more than a dummy."""
        real = (name for name, p, _ in held if p.grad is not None and not _is_near_dummy(p.grad))
        if (name := next(real, None)) is None:
            return
        self._warned.add(key)
        warnings.warn(
            f"`hold_inactive` holds {text_of(key)}, which the batches leave inactive, but the "
            f"gradient of {name!r} is more than a dummy. A name that is misspelt in the batch or "
            "in the map is ignored: compare them. A loss without the wrapper may have taught it: "
            "pass that through the wrapper too. If it is filler for an absent modality, a penalty "
            "on weights or noise, nothing is wrong.",
            stacklevel=2,
        )


def may_be_dummy(gradient: Tensor, tolerance: float = 0.0) -> bool:
    """Whether a gradient can be that of dummies alone: the same number everywhere, or empty.

    Args:
        gradient: Of this rank; of a DTensor the local shard counts.
        tolerance: By what part of the first element others may differ from it.
    """
    shard = local_shard(gradient)
    if shard.layout != torch.strided:
        return num_stored_values(shard) == 0
    return torch.allclose(shard, shard.reshape(-1)[:1], rtol=tolerance, atol=0.0)


def _is_near_dummy(gradient: Tensor) -> bool:
    return may_be_dummy(gradient, _ROUNDING)
