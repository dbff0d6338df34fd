"""Small models of transformers whose towers need not run, with batches for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper

# What is active in a batch, and the batch.
Batch: TypeAlias = tuple[list[str], dict[str, Tensor]]

SCALE = 1e-3  # large enough to show beside real gradients

TOKENS = {"image": 31, "video": 30, "audio": 29}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TEXT = SIZES | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
CLIP = SIZES | {"num_hidden_layers": 3, "image_size": 4, "patch_size": 2}
QWEN = SIZES | {"depth": 2, "patch_size": 2, "temporal_patch_size": 1, "out_hidden_size": 16}
ONES = torch.ones(2, 1).long()
GRID = torch.tensor([[1, 4, 4]] * 2)  # four of these patches make a token
IMAGE = {"pixel_values": (32, 12), "image_grid_thw": GRID}
VIDEO = {"pixel_values_videos": (32, 12), "video_grid_thw": GRID}


class Case(NamedTuple):
    """A small model of transformers.

    Attributes:
        config: The name of the class of its configuration.
        kind: The name of its class.
        options: Of the configuration, beside those of the text.
        paths: The map.
        inputs: What each key adds to a batch: tensors, or shapes of random ones.
    """

    config: str
    kind: str
    options: dict[str, Any]
    paths: dict[str | tuple[str, ...], Any]
    inputs: dict[str, dict[str, Any]]


CASES: dict[str, Case] = {
    # It reads the output of the last layer but one: the last layer gets no gradient.
    "LLaVA": Case(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"vision_config": CLIP | {"model_type": "clip_vision_model"}, "vision_feature_layer": -2},
        {"image": ["model.vision_tower", "model.multi_modal_projector"]},
        {"image": {"pixel_values": (2, 3, 4, 4)}},
    ),
    # Two keys have the same tower; the trunk also takes a list of its outputs, or None.
    "Qwen3-VL": Case(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"vision_config": QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        {"image": "model.visual", "video": "model.visual"},
        {"image": IMAGE, "video": VIDEO},
    ),
    # The audio tower has a module that it never calls.
    "Qwen2.5-Omni": Case(
        "Qwen2_5OmniThinkerConfig",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "vision_start_token_id": 28,
            "vision_config": QWEN | {"window_size": 8, "fullatt_block_indexes": [1]},
            "audio_config": {
                "num_mel_bins": 4,
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "max_source_positions": 8,
                "n_window": 8,
                "output_dim": 16,
            },
        },
        {"audio": "model.audio_tower", "image": "model.visual"},
        {
            "audio": {"input_features": (2, 4, 16), "feature_attention_mask": ONES.expand(2, 16)},
            "image": IMAGE,
        },
    ),
    # A tower is inside the trunk and takes a cache; the trunk takes only tokens or another tower.
    "Mllama": Case(
        "MllamaConfig",
        "MllamaForConditionalGeneration",
        {
            "text_config": TEXT | {"cross_attention_layers": [1]},
            "vision_config": CLIP
            | {
                "num_global_layers": 1,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
        {
            "image": [
                *("model.vision_model", "model.multi_modal_projector"),
                "model.language_model.layers.1",
            ]
        },
        {
            "image": {
                "pixel_values": (2, 1, 1, 3, 4, 4),
                "aspect_ratio_ids": ONES,
                "aspect_ratio_mask": ONES[..., None],
            }
        },
    ),
}


# What stays trained if the towers are frozen.
PROJECTORS = ("multi_modal_projector", "merger", "audio_tower.proj")
TRUNK = ("language_model", "lm_head")


def make(name: str, variant: str) -> nn.Module:
    """A model with the same values on each rank, none of which is zero.

    Args:
        name: A key of `CASES`.
        variant: "frozen trunk", "only projectors", "checkpoints", "reentrant checkpoints" or
            "LoRA" make it special; any other string does not.
    """
    import transformers

    torch.manual_seed(0)
    config, kind, options, *_ = CASES[name]
    ids = {f"{key}_token_{end}": TOKENS[key] for key in TOKENS for end in ("id", "index")}
    model: Any = getattr(transformers, kind)(
        getattr(transformers, config)(**{"text_config": TEXT} | options | ids)
    )
    if variant == "LoRA":
        add_adapters(model)
    for path, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)  # gates and adapters are zero in a new model
        if variant == "only projectors":
            parameter.requires_grad_(any(part in path for part in PROJECTORS))
        elif variant == "frozen trunk" and any(part in path for part in TRUNK):
            parameter.requires_grad_(path.startswith(tuple(tower_paths(name))))
    if "checkpoints" in variant:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in variant})
    made: nn.Module = model.train()
    return made


def add_adapters(model: nn.Module) -> None:
    """Freeze the model, and add a LoRA adapter to each linear layer of its trunk and towers."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = [path for path in linear if path != "lm_head"]
    inject_adapter_in_model(LoraConfig(target_modules=targets, r=2), model)


def tower_paths(name: str) -> list[str]:
    """The towers of a model."""
    specs = CASES[name].paths.values()
    return [path for spec in specs for path in ([spec] if isinstance(spec, str) else spec)]


def batch_of(name: str, active: list[str], *place: int) -> dict[str, Tensor]:
    """Two rows; the tokens of each medium come before the labelled text."""
    torch.manual_seed(hash(place))
    media = [torch.full((2, 4), TOKENS[key]) for key in active]
    ids = torch.cat([*media, torch.randint(3, 25, (2, 8))], dim=1)
    batch = {"input_ids": ids, "labels": ids.where(ids < 25, -100)}
    if name == "Qwen3-VL" and active:
        batch["mm_token_type_ids"] = (ids == 31).int() + 2 * (ids == 30).int()
    for key in active:
        for input_name, value in CASES[name].inputs[key].items():
            batch[input_name] = value if isinstance(value, Tensor) else torch.randn(value)
    return batch


def real_gradients(plain: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    plain.zero_grad()
    loss = plain(**batch).loss
    if loss.requires_grad:  # not with text alone and a frozen trunk
        loss.backward()
    return {path: p.grad.float() for path, p in plain.named_parameters() if p.grad is not None}


class Truth:
    """The average over ranks and micro-batches of real gradients, plus the scale where inactive.

    Args:
        name: A key of `CASES`.
        plain: The model, in one process.

    Attributes:
        keys: Of the map.
        everything: A batch that contains them all.
        used: Parameters that get a gradient from such a batch.
    """

    def __init__(self, name: str, plain: nn.Module) -> None:
        self.name, self.plain = name, plain
        self.keys = list(CASES[name].inputs)
        self.everything = batch_of(name, self.keys, 99)
        wrapper = DummyLossWrapper(plain, CASES[name].paths)
        self.owned = {key: set(wrapper.named_parameters(key)) for key in self.keys}
        self.used = real_gradients(plain, self.everything).keys()

    def gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradients that all of these batches should give together."""
        summed: dict[str, Tensor] = {}
        for active, batch in batches:
            parts = real_gradients(self.plain, batch)
            owned = self.owned.values()
            inactive = set().union(*owned).difference(*(self.owned[key] for key in active))
            assert not inactive & parts.keys()
            for path in inactive & self.used:
                parts[path] = torch.full_like(self.plain.get_parameter(path), SCALE).float()
            for path, part in parts.items():
                summed[path] = summed.get(path, 0) + part
        return {path: total / len(batches) for path, total in summed.items()}
