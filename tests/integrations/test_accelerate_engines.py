"""A loop with Accelerate under DeepSpeed and FSDP2, on ranks with different modalities."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modaldummy import DummyLossWrapper, hold_inactive, shadow_inactive
from tests.distributed.models import CASES, make
from tests.fleet import Fleet
from tests.integrations.vlm import (
    FSDP2,
    LR,
    NUM_RANKS,
    WITH_IMAGE,
    accelerate_on,
    collate,
    largest_error,
    modalities_of,
    read_whole,
    trained_in_one_process,
    zero,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]
FLEET = "DeepSpeed"
NUM_STEPS = 10


def engine_plugin(engine: str) -> dict[str, Any]:
    """The argument of `Accelerator` that sets an engine up."""
    from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    if engine == "FSDP2":
        plugin: Any = FullyShardedDataParallelPlugin
        classes = FSDP2["transformer_layer_cls_to_wrap"]
        return {
            "fsdp_plugin": plugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=classes,
            )
        }
    config = zero(int(engine[-1]))["deepspeed"] | {"train_micro_batch_size_per_gpu": 1}
    config["gradient_accumulation_steps"] = 1
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}


def trained(rank: int, engine: str) -> dict[str, Tensor]:
    """The weights after some steps."""
    from accelerate import Accelerator

    with accelerate_on(engine, rank):
        bare = make("LLaVA", "")
        accelerator = Accelerator(cpu=engine == "FSDP2", **engine_plugin(engine))
        optimizer: Any = torch.optim.SGD(bare.parameters(), LR)
        model, optimizer = accelerator.prepare(bare, optimizer)
        wrapper = DummyLossWrapper(model, CASES["LLaVA"].paths, resolver=modalities_of)
        shadow_inactive(wrapper, model, examples=[WITH_IMAGE])
        hold_inactive(wrapper, optimizer.optimizer if engine == "FSDP2" else model)
        for step in range(NUM_STEPS):
            batch = collate([{"place": NUM_RANKS * step + rank}])
            accelerator.backward(wrapper.total(model(**batch).loss, batch))
            optimizer.step()
            optimizer.zero_grad()
        return read_whole(bare, engine)


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3", "FSDP2"])
def test_weights_are_those_of_one_process(engine: str, two: Fleet) -> None:
    right = trained_in_one_process(NUM_STEPS)
    for found in two.ask(trained, engine):
        assert largest_error(found, right) < 1e-6
