"""Tells dummy gradients from others by their values, and warns if others are held."""

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from modaldummy._core.parameter import OwnedParameter
from modaldummy._core.parameter_map import ModalityKey, text_of
from modaldummy._engines import local_shard, num_stored_values

# Largest difference between elements of a dummy gradient, relative to the first element. Ranks may
# have different dummy gradients, and a reduction adds them in another order in each part of a
# gradient, perhaps in bfloat16.
_RELATIVE_ROUNDING = 1 / 16


class HeldGradientCheck:
    """Warns, once for each key, if a held gradient is more than a dummy gradient.

    Reading a gradient makes the host wait for the device. So a key is checked only in the first,
    second, fourth, eighth... step that holds it.
    """

    def __init__(self) -> None:
        self._num_steps_held: Counter[ModalityKey] = Counter()
        self._warned: set[ModalityKey] = set()

    def check(self, key: ModalityKey, held: Iterable[OwnedParameter]) -> None:
        """Warn if the gradient of a parameter that this step holds for `key` is not a dummy."""
        self._num_steps_held[key] += 1
        is_power_of_two = self._num_steps_held[key].bit_count() == 1
        if key in self._warned or not is_power_of_two:
            return
        for owned in held:
            gradient = owned.parameter.grad
            if gradient is not None and not may_be_dummy_gradient(gradient, _RELATIVE_ROUNDING):
                self._warned.add(key)
                warnings.warn(
                    f"`hold_inactive` holds {text_of(key)}, which the batches leave inactive, but "
                    f"the gradient of {owned.name!r} is more than a dummy gradient. Compare the "
                    "names in the batch and in the map: a misspelt name is ignored. A loss without "
                    "the wrapper may have trained it: pass that loss through the wrapper too. If "
                    "the gradient comes from filler for an inactive modality, a penalty on weights "
                    "or noise, nothing is wrong.",
                    stacklevel=2,
                )
                return


def may_be_dummy_gradient(gradient: Tensor, tolerance: float = 0.0) -> bool:
    """Whether a gradient is the same number everywhere, or empty, as dummy gradients are.

    Args:
        gradient: The gradient on this rank; of a DTensor only the local shard is read.
        tolerance: Largest difference between elements, relative to the first element.
    """
    shard = local_shard(gradient)
    if shard.layout != torch.strided:
        return num_stored_values(shard) == 0
    return torch.allclose(shard, shard.reshape(-1)[:1], rtol=tolerance, atol=0.0)
