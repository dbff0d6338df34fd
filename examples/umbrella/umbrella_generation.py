"""What the model says about held-out crops while it trains."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from umbrella_batches import ask, to_device
from umbrella_model import Umbrella
from umbrella_scans import Sample
from umbrella_words import decode, encode, facts

_SHOWN = 2  # crops of each modality whose text is shown


class Generation(TrainerCallback):
    """Has the model describe held-out crops every so many steps, prints and writes what it says.

    Each line of the file is of one step and one modality: `step`, `modality`, `shown`, pairs of a
    generated text and the true one, `right`, in how many crops each fact was right, and `of`.

    Args:
        held_out: Modality to samples that training does not see.
        path: The file; a resumed run keeps the lines of the steps before it.
        every: How many steps.

    Attributes:
        last: The lines that were written last.
    """

    def __init__(self, held_out: Mapping[str, Sequence[Sample]], path: Path, every: int) -> None:
        self.last: list[dict[str, Any]] = []
        self._held_out, self._path, self._every = held_out, path, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Drop what an earlier run wrote about steps that are yet to come."""
        if not state.is_world_process_zero:
            return
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(line + "\n" for line in kept))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Describe, at the first rank; the others go on until they have to wait for it."""
        due = state.global_step % self._every == 0 or state.global_step == state.max_steps
        if not due or not state.is_world_process_zero:
            return
        model: Umbrella = kwargs["model"]
        self.last = [
            {"step": state.global_step, **describe(model, samples, args.device)}
            for samples in self._held_out.values()
        ]
        with self._path.open("a") as file:
            for line in self.last:
                file.write(json.dumps(line) + "\n")
                print(_text(line), flush=True)


def describe(model: Umbrella, samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    """What the model says of samples of one modality, and how often it is right."""
    (modality,) = {sample.modality for sample in samples}
    was_training = model.training
    model.eval()
    length = max(len(encode(sample.answer)) for sample in samples)
    tokens = model.generate(to_device(ask(samples), device), length)[modality]
    model.train(was_training)
    texts = [decode(row) for row in tokens.tolist()]
    right = Counter(dict.fromkeys(facts(samples[0].answer), 0))
    for text, sample in zip(texts, samples, strict=True):
        right.update(dict(facts(text).items() & facts(sample.answer).items()).keys())
    shown = [list(pair) for pair in zip(texts, (s.answer for s in samples), strict=True)]
    return {
        "modality": modality,
        "shown": shown[:: max(1, len(shown) // _SHOWN)][:_SHOWN],
        "right": dict(right),
        "of": len(samples),
    }


def _text(line: Mapping[str, Any]) -> str:
    right = ", ".join(f"{fact} {count}" for fact, count in line["right"].items())
    first = f"step {line['step']}, {line['modality']}: right in {line['of']} crops: {right}"
    return "\n".join([first, *(f"  {said!r}, true: {true!r}" for said, true in line["shown"])])
