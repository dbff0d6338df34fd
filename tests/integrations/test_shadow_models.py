"""Models of transformers under FSDP2 whose ranks have batches with different modalities."""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from modaldummy import DummyLossWrapper
from modaldummy._shadow import shadow_inactive
from tests.distributed.oracle import whole
from tests.fleet import Fleet

pytestmark = pytest.mark.long

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


CASES = {
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


def make(name: str, variant: str) -> nn.Module:
    """A model with the same values on each rank, none of which is zero."""
    import transformers

    torch.manual_seed(0)
    config, kind, options, *_ = CASES[name]
    ids = {f"{key}_token_{end}": TOKENS[key] for key in TOKENS for end in ("id", "index")}
    made: nn.Module = getattr(transformers, kind)(
        getattr(transformers, config)(**{"text_config": TEXT} | options | ids)
    )
    projectors = ("multi_modal_projector", "merger", "audio_tower.proj")
    for path, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=0.2)  # gates are zero in a new model
        parameter.requires_grad_(variant != "frozen" or any(part in path for part in projectors))
    if variant == "checkpointed":
        made.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return made.train()


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


def shard(model: nn.Module) -> nn.Module:
    """Make each block of a tower and each layer of the trunk an FSDP2 unit."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for unit in (*itertools.chain(*lists), model):
        fully_shard(unit)
    return model


def real_gradients(plain: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    plain.zero_grad()
    loss = plain(**batch).loss
    if loss.requires_grad:  # not with text alone and a frozen trunk
        loss.backward()
    return {path: p.grad for path, p in plain.named_parameters() if p.grad is not None}


def compare(rank: int, name: str, variant: str, has_shadow: bool) -> tuple[list[str], list[Any]]:
    """What differs from one process in steps with random modalities, and what was shadowed."""
    plain, model = make(name, variant), shard(make(name, variant))
    keys = list(CASES[name].inputs)
    wrapper = DummyLossWrapper(model, CASES[name].paths, SCALE)
    owned = {key: set(wrapper.named_parameters(key)) for key in keys}
    everything = batch_of(name, keys, 99)
    used = real_gradients(plain, everything).keys()
    shadow = shadow_inactive(wrapper, model, examples=[everything]) if has_shadow else None
    wrong, shadowed = [], []
    choices = random.Random(1)
    for step in range(6):
        expected: dict[str, Tensor] = {}
        for other in range(2):
            active = [key for key in keys if choices.random() < 0.5]
            batch = batch_of(name, active, step, other)
            parts = real_gradients(plain, batch)
            inactive = (set().union(*owned.values()) & used).difference(*(owned[k] for k in active))
            assert not inactive & parts.keys()
            parts |= {path: torch.full_like(plain.get_parameter(path), SCALE) for path in inactive}
            for path, part in parts.items():
                expected[path] = expected.get(path, 0) + part / 2
            if other == rank:
                mine = active, batch
        with torch.no_grad():
            evaluated = [m.eval()(**mine[1]).loss for m in (plain, model)]
        wrong += [] if torch.equal(*evaluated) else [f"step {step}: losses {evaluated}"]
        wrapper.total(model.train()(**mine[1]).loss, mine[0]).backward()
        plain.train()
        shadowed += [*shadow.shadowed] if shadow else []
        for path, parameter in model.named_parameters():
            right = expected.get(path)
            if parameter.grad is None or right is None:
                if parameter.grad is not right:
                    wrong.append(f"step {step}, {path}: {parameter.grad} in place of {right}")
                continue
            error = (whole(parameter.grad) - right).abs().max()
            if error > 1e-5 * right.abs().max() + 1e-8:
                wrong.append(f"step {step}, {path}: {error} wrong of {right.abs().max()}")
            with torch.no_grad():
                plain.get_parameter(path).sub_(right, alpha=0.1)
                parameter.sub_(parameter.grad, alpha=0.1)
        model.zero_grad()
    return wrong, shadowed


@pytest.mark.parametrize("variant", ["trained", "frozen", "checkpointed"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(two: Fleet, name: str, variant: str) -> None:
    """Every block and layer is an FSDP2 unit; losses in evaluation mode are compared as well."""
    for wrong, shadowed in two.ask(compare, name, variant, True):
        assert wrong == []
        assert set(shadowed) == CASES[name].inputs.keys()


def test_without_a_shadow_they_are_not() -> None:
    fleet = Fleet(2, timeout=5, limit=60, quiet=True)
    with fleet, pytest.raises(RuntimeError, match="ranks failed"):
        fleet.ask(compare, "LLaVA", "trained", False)
