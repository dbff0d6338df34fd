"""The training loop of the demo, and the record that it makes of each step."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modaldummy import DummyLossWrapper, gradient_norms
from modaldummy.demo.model import MaskedAutoencoder, parameter_map

BATCH_SIZE = 64
LEARNING_RATE = 0.3
PAIR_PROBABILITY = 0.25

Record = dict[str, float | None]


class Training:
    """Trains masked reconstruction with plain SGD. Most batches contain one modality, some two.

    Args:
        scans: Modality to its samples, `[samples, width]`; the model is built for all of them.
        present: The modalities that batches contain; the others are never active.
        seed: Seed of weights, batches and masks.
        use_dummy: Whether the dummy term is added to the loss.

    Attributes:
        model: The model; it has towers for all modalities.
        wrapper: The wrapper of the model.
        use_dummy: As given.
        missed: Modality to those of its parameters that had no gradient after some backward pass.
        records: One record for each step.
    """

    def __init__(
        self, scans: dict[str, Tensor], present: Sequence[str], *, seed: int, use_dummy: bool
    ) -> None:
        torch.manual_seed(seed)
        self.model = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()})
        self.wrapper = DummyLossWrapper(self.model, parameter_map(tuple(scans)))
        self.use_dummy = use_dummy
        self.missed: dict[str, set[str]] = {name: set() for name in scans}
        self.records: list[Record] = []
        self._scans, self._present = scans, list(present)
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        # Plain SGD moves an inactive parameter by at most lr * scale.
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def run(self, steps: int) -> Iterator[Record]:
        """Train, and yield a record of each step.

        Its keys are `step` and `loss`; `active/<modality>`, 1 or 0, and `loss/<modality>`, None
        where it is inactive; the keys of `gradient_norms`; and those of the `StepReport`, if the
        dummy term is used.
        """
        for step in range(1, steps + 1):
            self._optimizer.zero_grad()
            batch = self._draw_batch()
            errors = self.model(batch, self._generator)
            loss = torch.stack(list(errors.values())).mean()
            if self.use_dummy:
                loss = self.wrapper.total(loss, batch)
            loss.backward()
            record = self._record(step, loss, errors)
            self._optimizer.step()
            self.records.append(record)
            yield record

    def _draw_batch(self) -> dict[str, Tensor]:
        pair = len(self._present) > 1 and self._random.random() < PAIR_PROBABILITY
        batch = {}
        for name in self._random.sample(self._present, 2 if pair else 1):
            data = self._scans[name]
            batch[name] = data[torch.randint(len(data), (BATCH_SIZE,), generator=self._generator)]
        return batch

    def _record(self, step: int, loss: Tensor, errors: dict[str, Tensor]) -> Record:
        record: Record = {"step": step, "loss": loss.item()}
        for name in self._scans:
            parameters = self.wrapper.named_parameters(name)
            self.missed[name].update(key for key, p in parameters.items() if p.grad is None)
            record[f"active/{name}"] = float(name in errors)
            record[f"loss/{name}"] = errors[name].item() if name in errors else None
        if self.wrapper.last is not None:
            record |= self.wrapper.last.as_dict()
        return record | gradient_norms(self.wrapper, active=list(errors))
