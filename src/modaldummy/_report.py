"""What one step did, kept for logs and checks."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepReport:
    """What the last call of a `DummyLossWrapper` did.

    The tensors are detached copies of shape `[]` in the accumulation dtype, on the device of the
    loss; reading `fraction` or calling `as_dict` copies them to the host, nothing else does.

    Attributes:
        active: Modalities in the batch, in map order.
        inactive: The other modalities of the map, in map order.
        real: The real loss; the mean of its magnitudes if it is not a scalar; NaN after
            `DummyLossWrapper.dummy`, which sees no real loss.
        dummy: The value added to the loss, after the cap.
        uncapped: `scale * sum` before the cap; inf or NaN if a parameter is.
        num_params: How many parameters the dummy term reached.
        num_elements: How many elements of these it reached: of a DTensor those of this rank's
            shard, of a sparse embedding none.
    """

    active: tuple[str, ...]
    inactive: tuple[str, ...]
    real: Tensor = field(repr=False)
    dummy: Tensor = field(repr=False)
    uncapped: Tensor = field(repr=False)
    num_params: int
    num_elements: int

    @property
    def fraction(self) -> float:
        """`|dummy| / |real|`; 0 where the dummy is 0, NaN where the real loss is NaN."""
        real, dummy, _ = self._values()
        return _fraction(real, dummy)

    def as_dict(self, prefix: str = "modaldummy/") -> dict[str, float]:
        """Everything as numbers for a logger, under keys that are the same at each step.

        The keys, each behind `prefix`: `real`, `dummy`, `uncapped`, `fraction`, `num_params`,
        `num_elements`, and for each modality `active/<modality>`, 1 or 0.
        """
        real, dummy, uncapped = self._values()
        numbers = {
            "real": real,
            "dummy": dummy,
            "uncapped": uncapped,
            "fraction": _fraction(real, dummy),
            "num_params": float(self.num_params),
            "num_elements": float(self.num_elements),
        }
        names = sorted(self.active + self.inactive)
        flags = {f"active/{name}": float(name in self.active) for name in names}
        return {prefix + key: number for key, number in (numbers | flags).items()}

    def _values(self) -> tuple[float, float, float]:
        # Stacked, so that a logger waits for the device once.
        real, dummy, uncapped = torch.stack([self.real, self.dummy, self.uncapped]).tolist()
        return real, dummy, uncapped


def _fraction(real: float, dummy: float) -> float:
    if math.isnan(real):
        return math.nan
    if dummy == 0:
        return 0.0
    return abs(dummy) / abs(real) if real else math.inf
