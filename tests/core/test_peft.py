"""Adapters that PEFT injects, before or after the wrapper is made."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PolyConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from modaldummy import DummyLossWrapper
from modaldummy._core.paths import strip_wrappers
from tests.asserts import connected
from tests.zoo import T1, WAYS, Brain

LORA = LoraConfig(target_modules=["T1_patch_embed"], r=1)
SAVE = LoraConfig(target_modules=["trunk"], modules_to_save=["T1_patch_embed"], r=1)
# What becomes of a layer's weight: all of it, and the part that PEFT leaves trainable.
CONFIGS: dict[str, tuple[LoraConfig, set[str], set[str]]] = {
    "LoRA": (
        LORA,
        {"base_layer", "lora_A.default", "lora_B.default"},
        {"lora_A.default", "lora_B.default"},
    ),
    "modules_to_save": (
        SAVE,
        {"original_module", "modules_to_save.default"},
        {"modules_to_save.default"},
    ),
}


def weights(parts: set[str]) -> set[str]:
    return {f"{T1}.{part}.weight" for part in parts}


@pytest.mark.parametrize(("config", "whole", "trained"), CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("spec", WAYS.values(), ids=WAYS.keys())
def test_a_parameter_is_found_after_adapters_came(
    config: LoraConfig, whole: set[str], trained: set[str], spec: Callable[[Brain], Any]
) -> None:
    """The wrapper is made first; PEFT freezes what it adapts, and frozen means no dummy."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": spec(model), "dMRI": "fusion"})
    adapted = get_peft_model(model, config)
    assert set(wrapper.named_parameters("T1")) == weights(whole)
    assert connected(wrapper, ["dMRI"]) == weights(trained)
    adapted.requires_grad_(True)
    assert connected(wrapper, ["dMRI"]) == weights(whole)


@pytest.mark.parametrize(("config", "whole", "trained"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_module_is_found_after_adapters_came(
    config: LoraConfig, whole: set[str], trained: set[str]
) -> None:
    """A module owns whatever is below its path."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": model.vision_tower["T1_patch_embed"]})
    get_peft_model(model, config)
    names = set(wrapper.named_parameters("T1"))
    assert weights(whole) < names
    assert all(name.startswith(T1) for name in names)


@pytest.mark.parametrize(("config", "whole", "trained"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_path_of_the_bare_model_selects_in_an_adapted_one(
    config: LoraConfig, whole: set[str], trained: set[str]
) -> None:
    """The wrapper is made last, with the map that the bare model had."""
    adapted = get_peft_model(Brain(), config)
    wrapper = DummyLossWrapper(adapted, {"T1": f"{T1}.weight", "dMRI": "fusion"})
    assert {strip_wrappers(name) for name in wrapper.named_parameters("T1")} == weights(whole)
    assert connected(wrapper, ["dMRI"]) == weights(trained)


PROJ: dict[str, Any] = {"target_modules": ["proj"]}
KINDS: list[PeftConfig] = [
    AdaLoraConfig(**PROJ, total_step=10),
    FourierFTConfig(**PROJ, n_frequency=8),
    HRAConfig(**PROJ, r=2),
    IA3Config(**PROJ, feedforward_modules=[]),
    LNTuningConfig(**PROJ),
    LoHaConfig(**PROJ, r=2),
    LoKrConfig(**PROJ, r=2),
    LoraConfig(**PROJ, r=2, use_dora=True),
    LoraConfig(target_modules=["dMRI"], trainable_token_indices={"proj": [0]}),
    MissConfig(**PROJ, r=4),
    OFTConfig(**PROJ, oft_block_size=4),
    PolyConfig(**PROJ, r=4),
    TrainableTokensConfig(**PROJ, token_indices=[0]),
    VBLoRAConfig(**PROJ, r=2, num_vectors=4, vector_length=4),
    VeraConfig(**PROJ, r=2),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("spec", ["T1.*", "T1.proj.weight", "T1"])
def test_adapters_of_each_kind_are_found(config: PeftConfig, spec: str) -> None:
    """They are beside the layer whose parameters the map names, under names of their own."""
    model = nn.ModuleDict({"T1": nn.ModuleDict({"proj": nn.Linear(16, 16)})})
    model["dMRI"] = nn.Linear(1, 1)
    before = DummyLossWrapper(model, {"T1": spec, "dMRI": "dMRI"})
    adapted = get_peft_model(model, copy.deepcopy(config))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("T1")}
    assert trained
    assert connected(before, ["dMRI"]) == trained
    after = DummyLossWrapper(adapted, {"T1": spec, "dMRI": "dMRI"})
    # PEFT gives the vector bank of VB-LoRA a second name.
    assert connected(after, ["dMRI"]) - {"base_model.vblora_vector_bank.default"} == trained
