"""The sets of parameters that the benchmarks go through: what modalities own in practice."""

import random
from collections.abc import Callable, Iterable

import torch
from torch import nn


def patch_embeddings() -> nn.Module:
    """T1 and rsfMRI volumes and 64 diffusion directions, cut into patches of width 768."""
    return nn.ModuleDict(
        {
            "T1": nn.Conv3d(1, 768, 16, 16),
            "rsfMRI": nn.Conv3d(1, 768, 8, 8),
            "dMRI": nn.Conv3d(64, 768, 4, 4),
        }
    )


def tensors(sizes: Iterable[int]) -> nn.Module:
    """Vectors of the given sizes in one module."""
    return nn.ParameterList(torch.randn(size) / 50 for size in sizes)


def layer_norms() -> nn.Module:
    """The same number and size of vectors as `tensors([768] * 300)`, two to a module."""
    return nn.Sequential(*(nn.LayerNorm(768) for _ in range(150)))


def vit_b() -> nn.Module:
    """The parameters of a ViT-B/16: 12 layers of width 768, 86M elements in 148 tensors."""
    layers = (nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(12))
    embedding = nn.ParameterDict({"cls": torch.zeros(1, 1, 768), "pos": torch.zeros(1, 197, 768)})
    patches = nn.Conv2d(3, 768, 16, 16)
    return nn.Sequential(patches, embedding, *layers, nn.LayerNorm(768))


def lora_factors() -> nn.Module:
    """1,000 factors of rank 8, as adapters of a network of width 768 have them."""

    def adapter() -> nn.Module:
        return nn.ParameterDict({"a": torch.randn(8, 768), "b": torch.randn(768, 8)})

    return nn.Sequential(*(adapter() for _ in range(500)))


def mixed() -> nn.Module:
    """2,000 vectors of 10 to 100,000 elements, each scalar_loss as frequent as any other."""
    draw = random.Random(0)
    return tensors(int(10 ** draw.uniform(1, 5)) for _ in range(2000))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "patches": patch_embeddings,
    "small": lambda: tensors([768] * 300),
    "norms": layer_norms,
    "vit_b": vit_b,
    "lora": lora_factors,
    "mixed": mixed,
    "grow_100": lambda: tensors([768] * 100),
    "grow_1000": lambda: tensors([768] * 1000),
    "grow_10000": lambda: tensors([768] * 10_000),
    "billion": lambda: tensors([2**30]),
}
# Run where none are named; the growth takes long on few cores, the billion needs a large GPU.
USUAL = ("patches", "small", "norms", "vit_b", "lora", "mixed")
