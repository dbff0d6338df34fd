"""A LLaVA-like model: a vision tower with an embedding a modality, and a language model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from umbrella_batches import IGNORED
from umbrella_scans import SIZES
from umbrella_words import END, PAD, VOCABULARY

WIDTH = 64
# Over three axes or four. Those of T1 reach from right to left, those of rsfMRI over all of the
# time: what differs between halves of a crop is then to be seen in a single patch.
PATCHES = {"T1": (8, 4, 4), "rsfMRI": (2, 2, 3, 10), "dMRI": (2, 2, 4, 64)}


def parameter_map(towers: Sequence[str]) -> dict[str, str]:
    """What each modality owns in an `Umbrella`: its patch embedding and its positions."""
    return {name: f"vision_tower.{name}_*" for name in towers}


class VisionTower(nn.Module):
    """Turns a crop of any modality into image tokens.

    Args:
        towers: The modalities that it has patch embeddings for.
    """

    def __init__(self, towers: Sequence[str]) -> None:
        super().__init__()
        for name in towers:
            patch = PATCHES[name]
            num_patches = math.prod(SIZES[name]) // math.prod(patch)
            embed: nn.Module
            if len(patch) == 3:
                embed = nn.Conv3d(1, WIDTH, kernel_size=patch, stride=patch)
            else:  # there is no convolution over four axes
                embed = nn.Linear(math.prod(patch), WIDTH)
            self.add_module(f"{name}_patch_embed", embed)
            positions = nn.Parameter(0.02 * torch.randn(num_patches, WIDTH))
            self.register_parameter(f"{name}_positions", positions)
        self.block = nn.TransformerEncoderLayer(
            WIDTH,
            nhead=4,
            dim_feedforward=2 * WIDTH,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )

    def forward(self, modality: str, pixel_values: Tensor) -> Tensor:
        """Image tokens, `[samples, patches, width]`."""
        embed = self.get_submodule(f"{modality}_patch_embed")
        if isinstance(embed, nn.Conv3d):
            tokens = embed(pixel_values).flatten(2).transpose(1, 2)
        else:
            tokens = embed(_patches(pixel_values, PATCHES[modality]))
        features: Tensor = self.block(tokens + self.get_parameter(f"{modality}_positions"))
        return features


class Umbrella(nn.Module):
    """Says in words what a crop shows.

    Args:
        towers: The modalities that it has patch embeddings for.
    """

    def __init__(self, towers: Sequence[str]) -> None:
        super().__init__()
        self.vision_tower = VisionTower(towers)
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.language_model = LlamaForCausalLM(
            LlamaConfig(  # type: ignore[call-arg]  # attention is one of its **kwargs
                vocab_size=len(VOCABULARY),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                pad_token_id=PAD,
                bos_token_id=None,
                eos_token_id=END,
                tie_word_embeddings=False,  # the Trainer saves no shared tensors of a plain module
                use_cache=False,
                attn_implementation="eager",
            )
        )

    def forward(
        self,
        T1: Mapping[str, Tensor] | None = None,  # noqa: N803  # the keys of the batch
        rsfMRI: Mapping[str, Tensor] | None = None,  # noqa: N803
        dMRI: Mapping[str, Tensor] | None = None,  # noqa: N803
    ) -> dict[str, Any]:
        """The loss of a batch, and what was predicted.

        Args:
            T1: `pixel_values`, `input_ids`, `attention_mask` and `labels`, as `collate` makes them.
            rsfMRI: As for T1.
            dMRI: As for T1.

        Returns:
            `loss`, the mean over the samples of all modalities of the mean over the tokens of the
            answer; `logits`, modality to `[samples, image and text tokens, vocabulary]`.
        """
        parts = {"T1": T1, "rsfMRI": rsfMRI, "dMRI": dMRI}
        batch = {name: part for name, part in parts.items() if part is not None}
        logits = {name: self._logits(name, part) for name, part in batch.items()}
        losses = [_losses(logits[name], part["labels"]) for name, part in batch.items()]
        return {"loss": torch.cat(losses).mean(), "logits": logits}

    @torch.no_grad()
    def generate(self, batch: Mapping[str, Mapping[str, Tensor]], num_tokens: int) -> Any:
        """Modality to the tokens that follow its prompts, `[samples, num_tokens]`.

        The likeliest token each time; prompts are as `ask` makes them, all of one length.
        """
        answers = {}
        for name, part in batch.items():
            tokens = part["input_ids"]
            for _ in range(num_tokens):
                texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                following = self._logits(name, {**part, **texts})[:, -1].argmax(dim=-1)
                tokens = torch.cat([tokens, following[:, None]], dim=1)
            answers[name] = tokens[:, part["input_ids"].shape[1] :]
        return answers

    def _logits(self, modality: str, part: Mapping[str, Tensor]) -> Tensor:
        images = self.projector(self.vision_tower(modality, part["pixel_values"]))
        texts = self.language_model.get_input_embeddings()(part["input_ids"])
        mask = part["attention_mask"]
        logits: Tensor = self.language_model(
            inputs_embeds=torch.cat([images, texts], dim=1),
            attention_mask=torch.cat([mask.new_ones(images.shape[:2]), mask], dim=1),
        ).logits
        return logits


def _patches(pixel_values: Tensor, patch: Sequence[int]) -> Tensor:
    """Disjoint patches over four axes, `[samples, patches, elements]`."""
    for axis, size in enumerate(patch, start=1):
        pixel_values = pixel_values.unfold(axis, size, size)
    return pixel_values.flatten(5).flatten(1, 4)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each sample the mean over the tokens of its answer, `[samples]`."""
    # Each token is predicted from the one before; images have no labels.
    texts = logits[:, -labels.shape[1] - 1 : -1]
    losses = cross_entropy(texts.flatten(0, 1), labels.flatten(), reduction="none")
    counted = (labels != IGNORED).sum(dim=1)
    return losses.view_as(labels).sum(dim=1) / counted
