"""Training steps that `bench_shadow.py` times: a model, its engines, contenders, check."""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ddp import blocks
from from_tests import deepspeed_on_cpus
from measure import Contender
from mixing import Engine
from modaldummy import DummyLossWrapper, shadow_inactive

PATCH = 3 * 16 * 16  # elements of a patch of 16 x 16 pixels
NUM_WORDS = 1000
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    """Of the model and of the batch of a rank.

    Attributes:
        width: Of the activations, a multiple of 12.
        num_layers: In the tower, and as many again in the trunk.
        num_samples: In a batch.
        num_patches: In an image.
        num_tokens: In a text.
    """

    width: int
    num_layers: int
    num_samples: int
    num_patches: int
    num_tokens: int


class Model(nn.Module):
    """Classifies texts, with or without images."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        encoder = blocks(size.num_layers, size.width)
        self.tower = nn.Sequential(nn.Linear(PATCH, size.width), encoder)
        self.embedding = nn.Embedding(NUM_WORDS, size.width)
        self.trunk = blocks(size.num_layers, size.width)
        self.head = nn.Linear(size.width, NUM_CLASSES)

    def forward(
        self, text: Tensor, images: Tensor | None = None, fake_images: Tensor | None = None
    ) -> Tensor:
        """Logits `[samples, NUM_CLASSES]`; the tower runs on fake images for its collectives."""
        hidden = self.embedding(text)
        if images is not None:
            hidden = hidden + self.tower(images).mean(1, keepdim=True)
        if fake_images is not None:
            hidden = hidden + 0 * self.tower(fake_images).sum()
        logits: Tensor = self.head(self.trunk(hidden).mean(1))
        return logits


def fsdp2(model: Model) -> Engine:
    """FSDP2 with each block as a unit."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Engine(model, Tensor.backward, lambda p: p.grad.full_tensor(), step)


def zero(model: Model, stage: int) -> Engine:
    """A ZeRO stage of DeepSpeed; at stage 3 no parameter stays whole on each rank."""
    deepspeed = deepspeed_on_cpus()
    options = {"stage": stage, "reduce_bucket_size": 1_000_000}
    if stage == 3:
        options |= {"stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": options,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Engine(engine, engine.backward, deepspeed.utils.safe_get_full_grad, engine.step)


ENGINES: dict[str, Callable[[Model], Engine]] = {
    "fsdp2": fsdp2,
    "zero2": lambda model: zero(model, 2),
    "zero3": lambda model: zero(model, 3),
}

SHADOW = "shadow"
SMALLEST = "fake image, one patch"
REAL = "fake images, real size"
ALL = "images on both ranks"
ALL_SHADOW = "images on both ranks, shadow"
# With images on rank 0 alone, and on both ranks.
ONE_RANK, BOTH_RANKS = (SMALLEST, REAL, SHADOW), (ALL, ALL_SHADOW)
CONTENDERS = ONE_RANK + BOTH_RANKS


class Training:
    """Steps of one contender on its rank, with a model and an engine of its own.

    Those without a shadow do not use the library.

    Attributes:
        contender: What is timed.
        record_bytes: Of tensors that stay alive because of the shadow.
    """

    def __init__(self, name: str, engine: str, size: Size) -> None:
        torch.manual_seed(0)
        self._model = Model(size)
        self._engine = ENGINES[engine](self._model)
        self._inputs = inputs(name, dist.get_rank(), size)
        self._labels = torch.zeros(size.num_samples, dtype=torch.long)
        self._wrapper: DummyLossWrapper | None = None
        self.record_bytes = 0
        if name in (SHADOW, ALL_SHADOW):
            self._install_shadow()
        self.contender = Contender(self._forward, self._backward, dist.barrier)

    def _install_shadow(self) -> None:
        example = {"text": torch.zeros(1, 1, dtype=torch.long), "images": one_patch()}

        def step() -> None:
            self._engine.backward(self._engine.call(**example).sum())
            self._engine.clear()

        step()  # an engine allocates buffers in the first one
        before = living_bytes()
        self._wrapper = DummyLossWrapper(self._engine.call, {"image": "tower"})
        shadow_inactive(self._wrapper, self._engine.call, examples=[example])
        step()
        self.record_bytes = living_bytes() - before

    def _forward(self) -> Tensor:
        logits = self._engine.call(**self._inputs)
        loss = nn.functional.cross_entropy(logits, self._labels)
        if self._wrapper is None:
            return loss
        return self._wrapper.total(loss, ["image"] if "images" in self._inputs else [])

    def _backward(self, total: Tensor) -> None:
        self._engine.backward(total)
        self._engine.clear()

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradients of one step, by the names of parameters."""
        self._engine.backward(self._forward())
        named = self._model.named_parameters()
        found = {name: self._gradient(parameter) for name, parameter in named}
        self._engine.clear()
        return found

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self._engine.gradient(parameter)
        assert gradient is not None, "an engine gives each parameter a gradient here"
        return gradient.clone()


def living_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def one_patch() -> Tensor:
    """The smallest image."""
    return torch.zeros(1, 1, PATCH)


def inputs(name: str, rank: int, size: Size) -> dict[str, Tensor]:
    """What a contender passes to the model on a rank; texts and images do not depend on it."""
    draw = torch.Generator().manual_seed(rank)
    text = torch.randint(NUM_WORDS, (size.num_samples, size.num_tokens), generator=draw)
    images = torch.randn(size.num_samples, size.num_patches, PATCH, generator=draw)
    if rank == 0 or name in BOTH_RANKS:
        return {"text": text, "images": images}
    fakes = {SMALLEST: one_patch(), REAL: torch.zeros_like(images)}
    return {"text": text} | ({"fake_images": fakes[name]} if name in fakes else {})


def check(found: Mapping[str, Training], names: Iterable[str]) -> None:
    """Refuse contenders whose gradients differ, but for a dummy gradient of 1e-7.

    Raises:
        AssertionError: A gradient differs, on this rank.
    """
    first, *others = names
    expected = found[first].gradients()
    for name in others:
        for parameter, gradient in found[name].gradients().items():
            what = f"the gradient of `{parameter}` with {name!r} instead of {first!r}: "
            torch.testing.assert_close(
                gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=what.__add__
            )
