"""A small masked autoencoder: a patch embedding and a head per modality, and a shared trunk."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MASK_RATIO = 0.5


class MaskedAutoencoder(nn.Module):
    """Reconstructs masked entries of samples of any modality.

    Args:
        widths: Modality to the number of entries of one sample.
        hidden: Width of the trunk.
    """

    def __init__(self, widths: Mapping[str, int], hidden: int = 128) -> None:
        super().__init__()
        # The input of an embedding: the visible entries, and a mask of which ones are visible.
        self.vision_tower = nn.ModuleDict(
            {f"{name}_patch_embed": nn.Linear(2 * width, hidden) for name, width in widths.items()}
        )
        self.trunk = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden)
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden, width) for name, width in widths.items()}
        )

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the reconstruction error of each modality in the batch.

        Args:
            batch: Modality to its samples, `[samples, width]`.
            generator: Draws the masks.

        Returns:
            Modality to its mean squared error over masked entries, of shape `[]`. A prediction of
            the mean has an error of 1.
        """
        return {name: self._error(name, samples, generator) for name, samples in batch.items()}

    def _error(self, name: str, samples: Tensor, generator: torch.Generator) -> Tensor:
        masked = torch.rand(samples.shape, generator=generator, device=samples.device) < MASK_RATIO
        visible = torch.cat([samples.masked_fill(masked, 0.0), (~masked).to(samples.dtype)], dim=1)
        output = self.heads[name](self.trunk(self.vision_tower[f"{name}_patch_embed"](visible)))
        squared: Tensor = (output - samples).square()
        return squared[masked].mean()


def parameter_map(modalities: tuple[str, ...]) -> dict[str, list[str]]:
    """What each modality owns in a `MaskedAutoencoder`; no modality owns the trunk."""
    return {name: [f"vision_tower.{name}_patch_embed", f"heads.{name}"] for name in modalities}
