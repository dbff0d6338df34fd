"""Small models of transformers for `test_foreign_models.py`, and what a user writes for each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLM = TOWER | {
    "vocab_size": 32,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MEDIA = 31  # the token that images and sounds replace


class Foreign(NamedTuple):
    """A model of another library and what its user writes.

    Attributes:
        make: Makes the model.
        spec: The map, only of paths and globs.
        resolver: Reads the active modalities from the inputs of `forward`.
        batches: Inputs of `forward`, by their content.
    """

    make: Callable[[], nn.Module]
    spec: dict[str | tuple[str, ...], Any]
    resolver: Callable[[Mapping[str, Any]], list[str]]
    batches: Callable[[], dict[str, Batch]]


# --- FLAVA: towers for images, text and pairs, and heads for losses of their own -----------------


def make_flava() -> nn.Module:
    from transformers import FlavaConfig, FlavaForPreTraining

    config = FlavaConfig(
        image_config=TOWER | {"image_size": 8, "patch_size": 4, "vocab_size": 20},
        text_config=TOWER | {"vocab_size": 20, "max_position_embeddings": 8},
        multimodal_config=TOWER,
        hidden_size=16,
        projection_dim=16,
        init_codebook=False,
    )
    model = FlavaForPreTraining(config)
    # These are zero in a new model, so that masked patches look alike and queries get zeros.
    for parameter in model.flava.image_model.embeddings.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def make_flava_without_poolers() -> nn.Module:
    model = make_flava()
    for name in ("image_model", "text_model", "multimodal_model"):
        model.get_submodule(f"flava.{name}.pooler").requires_grad_(False)
    return model


def flava_modalities(batch: Mapping[str, Any]) -> list[str]:
    """What the batch contains, and the losses that FLAVA computes only without anything else."""
    image, text = "pixel_values" in batch, "input_ids" in batch
    if image and text:
        return ["image", "text"]
    return ["image", "mim"] if image else ["text", "mlm"]


def flava_batches() -> dict[str, Batch]:
    ids = torch.randint(3, 20, (2, 6))
    chosen = torch.arange(6) < 3
    text = {
        "input_ids": ids,
        "input_ids_masked": ids.where(~chosen, torch.tensor(1)),
        "mlm_labels": ids.where(chosen, torch.tensor(-100)),
    }
    image = {
        "pixel_values": torch.randn(2, 3, 8, 8),
        "bool_masked_pos": torch.tensor([[True, False, True, False]] * 2),
        "mim_labels": torch.randint(20, (2, 4)),
    }
    return {
        "text": text,
        "image": image,
        "both": text | image | {"itm_labels": torch.ones(2).long()},
    }


FLAVA_MAP: dict[str | tuple[str, ...], Any] = {
    "image": "flava.image_model",
    "text": "flava.text_model",
    ("image", "text"): [
        "flava.multimodal_model",
        "flava.*_projection.*",
        "flava.logit_scale",
        "itm_head",
        "mmm_*",
    ],
    "mim": "mim_head",
    "mlm": "mlm_head",
}

# --- language models with a tower ----------------------------------------------------------------


def make_qwen() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config=LLM | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=MEDIA,
        video_token_id=30,
        vision_start_token_id=28,
        vision_end_token_id=29,
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.model.visual.patch_embed.requires_grad_(False)  # as many recipes do
    return model


def with_media(data: Batch) -> dict[str, Batch]:
    """A batch of text alone, and one whose first four tokens stand for `data`."""
    plain = torch.randint(3, 28, (2, 8))
    ids = torch.cat([torch.full((2, 4), MEDIA), plain], dim=1)
    labels = ids.where(ids != MEDIA, torch.tensor(-100))
    return {
        "text": {"input_ids": plain, "labels": plain},
        "media": data | {"input_ids": ids, "labels": labels},
    }


def qwen_batches() -> dict[str, Batch]:
    # Two images of 4 x 4 patches, of which 2 x 2 make a token.
    patches = torch.randn(2 * 16, 3 * 2 * 2)
    batches = with_media({"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)})
    media = batches["media"]
    return batches | {"media": media | {"mm_token_type_ids": (media["input_ids"] == MEDIA).int()}}


def make_voxtral() -> nn.Module:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config = VoxtralConfig(
        audio_config=TOWER | {"num_mel_bins": 4, "max_source_positions": 8},
        text_config=LLM | {"head_dim": 8},
        audio_token_id=MEDIA,
    )
    return VoxtralForConditionalGeneration(config)


def voxtral_batches() -> dict[str, Batch]:
    return with_media({"input_features": torch.randn(2, 4, 16)})


FOREIGN = {
    "FLAVA": Foreign(make_flava_without_poolers, FLAVA_MAP, flava_modalities, flava_batches),
    "Qwen2-VL": Foreign(
        make_qwen,
        {"image": "model.visual"},
        lambda batch: ["image"] if "pixel_values" in batch else [],
        qwen_batches,
    ),
    "Voxtral": Foreign(
        make_voxtral,
        {"audio": ["model.audio_tower.*", "model.multi_modal_projector"]},
        lambda batch: ["audio"] if "input_features" in batch else [],
        voxtral_batches,
    ),
}
