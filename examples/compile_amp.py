"""Train under torch.compile and autocast, in float16 with a GradScaler or in bfloat16.

    python examples/compile_amp.py
    python examples/compile_amp.py --dtype bfloat16

Model, loss and dummy term are one graph for each set of modalities that a batch holds; the first
run compiles them, which may take minutes. The scans come with `pip install '.[demo]'`.
Exit code 0 means that all promises held.
"""

import argparse
import random
import sys

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from modaldummy import DummyLossWrapper, gradient_norms, hold_inactive, missing_gradients
from modaldummy.demo.model import MaskedAutoencoder, parameter_map
from modaldummy.demo.scans import load_scans


def train(options: argparse.Namespace, device: torch.device) -> bool:
    """Train, and tell whether all promises held."""
    scans = {name: data.to(device) for name, data in load_scans().items()}
    torch.manual_seed(options.seed)
    model = MaskedAutoencoder({name: data.shape[1] for name, data in scans.items()}).to(device)
    wrapper = DummyLossWrapper(model, parameter_map(tuple(scans)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hold_inactive(wrapper, optimizer)
    dtype = getattr(torch, options.dtype)
    # In float16 a factor of 65,536, the default, makes the first gradients infinite.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype is torch.float16)

    @torch.compile(backend=options.backend, fullgraph=True)
    def total(batch: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        losses = [reconstruction_error(model, name, batch[name], masks[name]) for name in batch]
        return wrapper.total(torch.stack(losses).mean(), batch)

    before = evaluate(model, scans)
    draw = random.Random(options.seed)
    drawn, largest, sizes = set(), 0.0, []
    for _ in range(options.steps):
        names = draw.sample(list(scans), draw.choice([1, 1, 1, 2]))
        # Always in the same order: Dynamo takes another one for another graph.
        names.sort()
        drawn.add(tuple(names))
        batch = {n: scans[n][draw.sample(range(len(scans[n])), 64)] for n in names}
        masks = {name: torch.rand_like(samples) < 0.5 for name, samples in batch.items()}
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = total(batch, masks)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        missing_gradients(wrapper, strict=True)  # raises if any is
        norms = gradient_norms(wrapper)
        assert wrapper.last is not None
        largest = max(largest, wrapper.last.fraction)
        for name in wrapper.last.inactive:
            own = wrapper.named_parameters(name).values()
            expected = 1e-7 * sum(parameter.numel() for parameter in own) ** 0.5
            sizes.append(norms[f"grad_norm/{name}"] / expected)
        scaler.step(optimizer)
        scaler.update()
    after = evaluate(model, scans)

    for name in scans:
        print(f"{name:<8} error {before[name]:.3f} before, {after[name]:.3f} after")
    graphs = counters["stats"]["unique_graphs"]
    promises = {
        f"{len(sizes)} dummy gradients had their size": all(abs(s - 1) < 1e-3 for s in sizes),
        f"the dummy was at most {largest:.1e} of the loss": largest <= 1e-4,
        f"{len(drawn)} sets of modalities took {graphs} graphs": graphs == len(drawn),
        "the error fell for each modality": all(after[name] < before[name] for name in scans),
    }
    for promise, held in promises.items():
        print("yes:" if held else "NO: ", promise)
    return all(promises.values())


def reconstruction_error(
    model: MaskedAutoencoder, name: str, samples: Tensor, masked: Tensor
) -> Tensor:
    """As the model's own, with masks from outside and of a shape that is known to the compiler."""
    visible = torch.cat([samples.masked_fill(masked, 0.0), (~masked).to(samples.dtype)], dim=1)
    hidden = model.trunk(model.vision_tower[f"{name}_patch_embed"](visible))
    squared: Tensor = (model.heads[name](hidden) - samples).square()
    return (squared * masked).sum() / masked.sum()


@torch.no_grad()
def evaluate(model: MaskedAutoencoder, scans: dict[str, Tensor]) -> dict[str, float]:
    """Error of each modality over all of its samples, under masks that are always the same."""
    masks = torch.Generator(next(model.parameters()).device).manual_seed(0)
    return {name: error.item() for name, error in model(scans, masks).items()}


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return 0 if train(options, device) else 1


if __name__ == "__main__":
    sys.exit(main())
