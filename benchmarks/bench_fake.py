"""What becomes of a vision tower in the steps without an image: fake input, shadow, and hold.

A small LLaVA learns to continue texts; 30 % of its batches show images that say which word comes.
AdamW with weight decay trains it in one process, in four arms:

- `no help`: the tower has no gradient in steps without an image, so that AdamW skips it. No engine
  that shards allows this; it is the truth that the others are compared with.
- `fake * 0`: the tower runs on zeros, and `0 * output.sum()` is added to the loss.
- `shadow`: `shadow_inactive`, with the default scale.
- `shadow + hold`: `hold_inactive` as well.

`moved` is the root mean square by which a step without an image moves the weights of the tower and
its projector, in learning rates, averaged over these steps. The loss is the mean over validation
batches of each kind after training. Seeds are paired: each gives all arms the same initial weights
and batches. Differences are to `no help`, with 95 % t intervals over seeds.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learning import interval
from measure import environment, print_environment, result_path, write_csv
from modaldummy import DummyLossWrapper, hold_inactive, shadow_inactive

ARMS = ("no help", "fake * 0", "shadow", "shadow + hold")
PATHS = ["model.vision_tower", "model.multi_modal_projector"]
SHARE = 0.3  # of batches with images
IMAGE, NUM_WORDS = 31, 24  # the token of a patch; words are 1 to 24
SIZE = 8  # of a batch
VALIDATION = 10_000  # the first seed of validation batches
CPU = torch.device("cpu")
Batch = dict[str, Tensor]


def main() -> None:
    """Train all arms with each seed, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be 2 or more: one seed has no interval")
    torch.set_num_threads(1)
    found = {arm: [train(arm, seed, given) for seed in range(given.seeds)] for arm in ARMS}
    rows = [row(arm, found, given) for arm in ARMS]
    print_table(rows)
    if given.csv is not None:
        write_csv(result_path(given.csv, "bench_fake.csv", CPU), rows)


def train(arm: str, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """What became of one training."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, weight_decay=given.weight_decay)
    loss_of = loss_function(arm, model, optimizer)
    tower = [p for path in PATHS for p in model.get_submodule(path).parameters()]
    moved = []
    for batch in batches(seed, given.steps):
        before = torch.cat([p.detach().flatten() for p in tower])
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = torch.cat([p.detach().flatten() for p in tower])
        if "pixel_values" not in batch:
            moved.append((after - before).square().mean().sqrt().item() / given.lr)
    return {"moved": float(np.mean(moved)), **validation_losses(model)}


def loss_function(
    arm: str, model: Any, optimizer: torch.optim.Optimizer
) -> Callable[[Batch], Tensor]:
    """The loss of a batch as an arm has it."""
    if arm == "no help":

        def without_help(batch: Batch) -> Tensor:
            loss: Tensor = model(**batch).loss
            return loss

        return without_help
    if arm == "fake * 0":
        fake = torch.zeros(1, 3, 8, 8)

        def with_fake(batch: Batch) -> Tensor:
            loss: Tensor = model(**batch).loss
            if "pixel_values" in batch:
                return loss
            hidden = model.model.vision_tower(fake).last_hidden_state
            loss += 0 * model.model.multi_modal_projector(hidden).sum()
            return loss

        return with_fake
    wrapper = DummyLossWrapper(model, {"image": PATHS}, resolver=modalities_of)
    shadow_inactive(wrapper, model, examples=[batch_of(1, True, size=1)])
    if arm == "shadow + hold":
        hold_inactive(wrapper, optimizer)

    def with_shadow(batch: Batch) -> Tensor:
        total: Tensor = wrapper.total(model(**batch).loss, batch)
        return total

    return with_shadow


def modalities_of(batch: Batch) -> list[str]:
    """What a batch contains."""
    return ["image"] if "pixel_values" in batch else []


def make_model() -> nn.Module:
    """A LLaVA whose tower and trunk have two layers each."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", "vocab_size": 32, "pad_token_id": 0, "num_key_value_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision | sizes,
            text_config=text | sizes,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )
    # LLaVA does not use the pooled output, so that this norm gets no gradient.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    trained: nn.Module = model.train()
    return trained


def batches(seed: int, steps: int) -> Iterator[Batch]:
    """Batches of training, of one kind each."""
    draw = np.random.default_rng(seed)
    for step in range(steps):
        yield batch_of(1000 * seed + step, bool(draw.random() < SHARE))


def batch_of(seed: int, with_images: bool, size: int = SIZE) -> Batch:
    """Texts of one word that repeats with some noise; an image shows the word, as a noisy color."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, NUM_WORDS + 1, (size, 1), generator=draw)
    others = torch.randint(1, NUM_WORDS + 1, (size, 6), generator=draw)
    text = torch.where(torch.rand(size, 6, generator=draw) < 0.2, others, words)
    if not with_images:
        return {"input_ids": text, "labels": text}
    patches = torch.full((size, 4), IMAGE)
    angle = words[..., None, None] * (2 * torch.pi / NUM_WORDS)
    color = torch.stack([angle.sin(), angle.cos(), torch.zeros_like(angle)], dim=1)[:, :, 0]
    return {
        "input_ids": torch.cat([patches, text], dim=1),
        "labels": torch.cat([torch.full_like(patches, -100), text], dim=1),
        "pixel_values": color + 0.3 * torch.randn(size, 3, 8, 8, generator=draw),
    }


@torch.no_grad()
def validation_losses(model: Any) -> dict[str, float]:
    """The mean loss of batches with images, and of those without."""
    model.eval()
    found = {}
    for name, with_images in {"image loss": True, "text loss": False}.items():
        losses = [model(**batch_of(VALIDATION + i, with_images)).loss for i in range(20)]
        found[name] = torch.stack(losses).mean().item()
    return found


def row(
    arm: str, found: dict[str, list[dict[str, float]]], given: argparse.Namespace
) -> dict[str, Any]:
    """Means over the seeds, and differences to `no help`."""
    own, base = found[arm], found[ARMS[0]]
    result: dict[str, Any] = {"arm": arm}
    for what in own[0]:
        differences = np.array(
            [one[what] - other[what] for one, other in zip(own, base, strict=True)]
        )
        low, high = interval(differences) if differences.any() else (0.0, 0.0)
        result |= {what: float(np.mean([one[what] for one in own]))}
        result |= {f"{what} difference": float(differences.mean())}
        result |= {f"{what} low": low, f"{what} high": high}
    settings = {name: value for name, value in vars(given).items() if name != "csv"}
    return result | settings | environment(CPU)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown."""
    print_environment(rows[0])
    kinds = ("image loss", "text loss")
    print(f"\n{rows[0]['seeds']} seeds, {rows[0]['steps']} steps\n")
    titles = [cell for kind in kinds for cell in (kind, "difference")]
    print("|", " | ".join(["arm", "moved, in learning rates", *titles]), "|")
    print("|---|" + "---|" * (1 + len(titles)))
    for each in rows:
        cells = [each["arm"], f"{each['moved']:.3f}"]
        for kind in kinds:
            points = [each[f"{kind} {name}"] for name in ("difference", "low", "high")]
            cells.append(f"{each[kind]:.4f}")
            cells.append("{:+.4f} ({:+.4f} to {:+.4f})".format(*points) if any(points) else "0")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
