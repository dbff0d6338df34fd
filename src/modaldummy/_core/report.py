"""What one step did, kept for logs and checks."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modaldummy._core.parameter_map import Step
from modaldummy._core.term import Term


@dataclass(frozen=True, eq=False)
class StepReport:
    """What the last call of a ``DummyLossWrapper`` did.

    The tensors are detached copies of shape ``[]`` in the accumulation dtype, float32 or wider, on
    the device of the loss. Only ``fraction`` and ``as_dict`` synchronize with the device, once per
    call.

    >>> from torch import nn
    >>> from modaldummy import DummyLossWrapper
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"}, gradient_only=True)
    >>> loss = wrapper.total(torch.tensor(2.0), ["T1"])
    >>> wrapper.last
    StepReport(active=('T1',), inactive=('dMRI',), num_params=2, num_elements=14)
    >>> wrapper.last.fraction
    0.0
    >>> wrapper.last.as_dict(prefix="")["real"]
    2.0

    Attributes:
        active: Modalities in the batch, in map order.
        inactive: The other modalities of the map, in map order.
        real: The real loss; the mean of its absolute values if it is not a scalar; NaN after
            ``DummyLossWrapper.dummy``, which gets no real loss.
        dummy: The value added to the loss, after the cap. It is exactly zero where the sum or the
            real loss is not finite.
        uncapped: ``scale * sum`` before the cap; inf or NaN if a parameter is; 0 where no parameter
            is read.
        num_params: Number of parameters that the dummy term reaches.
        num_elements: Number of elements that it reaches. A DTensor counts with this rank's shard
            and a sparse embedding with none; with a scale of None both count in full.
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
        """``|dummy| / |real|``; 0 where the dummy is 0, NaN where the real loss is NaN.

        It is infinite where the real loss is 0 and the dummy is not, which needs a ``max_fraction``
        of None.
        """
        return self.as_dict("")["fraction"]

    def as_dict(self, prefix: str = "modaldummy/") -> dict[str, float]:
        """Everything as numbers for a logger, under keys that are the same at each step.

        Args:
            prefix: Text before each key.

        Returns:
            ``real``, ``dummy``, ``uncapped``, ``fraction``, ``num_params``, ``num_elements``, and
            ``active/<modality>``, 1 or 0, for each modality.
        """
        # Stacked, so that a logger synchronizes with the device once.
        real, dummy, uncapped = torch.stack([self.real, self.dummy, self.uncapped]).tolist()
        fraction = math.inf if dummy else 0.0
        if real:
            fraction = abs(dummy / real)
        numbers = {
            "real": real,
            "dummy": dummy,
            "uncapped": uncapped,
            "fraction": fraction,
            "num_params": float(self.num_params),
            "num_elements": float(self.num_elements),
        }
        names = sorted(self.active + self.inactive)
        active = set(self.active)
        flags = {f"active/{name}": float(name in active) for name in names}
        return {prefix + key: number for key, number in (numbers | flags).items()}


def report_of(step: Step, term: Term) -> StepReport:
    """The report of a step and of the term that was added in it."""
    return StepReport(
        active=step.active,
        inactive=step.inactive,
        real=term.loss,
        dummy=term.value,
        uncapped=term.uncapped,
        num_params=term.num_params,
        num_elements=term.num_elements,
    )
