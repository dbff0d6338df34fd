"""TRL's `SFTTrainer` with the mixin, under engines that need a shadow.

Not under FSDP2, where TRL 1.16 did not train as in one process without the mixin either.
"""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from modaldummy.integrations.transformers import DummyLossMixin
from tests.fleet import Fleet
from tests.integrations.vlm import (
    PLACES,
    largest_error,
    trained_in_one_process,
    trainer_under,
    weights_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.long,
    pytest.mark.skipif(find_spec("trl") is None, reason="`make test-integrations` installs TRL"),
]
FLEET = "DeepSpeed"


def tokenizer() -> Any:
    """One that knows the tokens by their numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    words = {str(number): number for number in range(32)}
    special = {"pad_token": "0", "eos_token": "1", "unk_token": "2"}
    return make(tokenizer_object=Tokenizer(WordLevel(words, "2")), **special)


def trained(rank: int, engine: str, folder: str) -> dict[str, Tensor]:
    """The weights after 20 steps of SGD."""
    datasets: Any = import_module("datasets")  # of the extra `integrations`
    trl: Any = import_module("trl")

    class MixedSFTTrainer(DummyLossMixin, trl.SFTTrainer):  # type: ignore[misc]
        """As a user would write it."""

    args = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False}
    kind = partial(MixedSFTTrainer, processing_class=tokenizer())
    data = datasets.Dataset.from_list(PLACES)
    with trainer_under(
        engine, rank, folder, kind, config=trl.SFTConfig, args=args, train_dataset=data
    ) as trainer:
        trainer.train()
        return weights_of(trainer)


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_weights_are_those_of_one_process(engine: str, two: Fleet, tmp_path: Path) -> None:
    right = trained_in_one_process(20)
    for found in two.ask(trained, engine, str(tmp_path)):
        assert largest_error(found, right) < 1e-6
