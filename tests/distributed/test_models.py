"""Models of transformers under every engine, whose ranks have batches with different modalities."""

import copy
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from modaldummy import DummyLossWrapper, shadow_inactive
from tests.distributed.deepspeed_engines import (
    BF16,
    NOTHING_PERSISTS,
    OFFLOADED,
    SHADOWED,
    TWICE,
    Zero,
    initialized,
)
from tests.distributed.engines import DDP, FSDP, FSDP1, NARROW, SMALL, shadowed
from tests.distributed.models import CASES, SCALE, Batch, Truth, batch_of, make, tower_paths
from tests.distributed.oracle import NAMES, Active, Outcome, Run, Schedule, held_against_truth
from tests.distributed.test_shadow import ENGINES as SMALL_ENGINES
from tests.fleet import Fleet, RankError

pytestmark = pytest.mark.long


def blocks(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Where the blocks of the towers and the layers of the trunk are."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [(parent, place) for parent in lists for place in range(len(parent))]


def fsdp2(model: nn.Module, variant: str, paths: Any) -> Run:
    """Each block is a unit."""
    options: dict[str, Any] = {}
    if variant == "HSDP":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    elif variant == "bf16":
        options["mp_policy"] = NARROW
    elif variant == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for parent, place in blocks(model):
        fully_shard(parent[place], **options)
    fully_shard(model, **options)
    return FSDP(model, model, DummyLossWrapper(model, paths, SCALE))


def fsdp1(model: nn.Module, _variant: str, paths: Any) -> Run:
    """Each block is a unit."""
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for parent, place in blocks(model):
        parent[place] = FullyShardedDataParallel(parent[place], **options)
    engine = FullyShardedDataParallel(model, **options)
    return FSDP1(engine, engine, DummyLossWrapper(engine, paths, SCALE))


def ddp(model: nn.Module, _variant: str, paths: Any) -> Run:
    engine = DistributedDataParallel(model, **SMALL)
    return DDP(engine, model, DummyLossWrapper(engine, paths, SCALE))


def zero(model: nn.Module, variant: str, paths: Any, stage: int, **options: Any) -> Run:
    config: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False}
    config |= {"accumulation": TWICE, "bf16": BF16}.get(variant, {})
    options |= OFFLOADED if variant == "offload" else {}
    engine = initialized(model, stage, config, overlap_comm=True, **options)
    return Zero(engine, model, DummyLossWrapper(engine, paths, SCALE))


def zero2(model: nn.Module, variant: str, paths: Any) -> Run:
    return zero(model, variant, paths, 2, reduce_bucket_size=200)


def zero3(model: nn.Module, variant: str, paths: Any) -> Run:
    return zero(model, variant, paths, 3, **NOTHING_PERSISTS)


ENGINES: dict[str, Callable[[nn.Module, str, Any], Run]] = {
    "FSDP2": fsdp2,
    "FSDP1": fsdp1,
    "DDP": ddp,
    "ZeRO-2": zero2,
    "ZeRO-3": zero3,
}
# With the engines that have them.
VARIANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("frozen trunk", "only projectors", "checkpoints", "accumulation"),
            *("reentrant checkpoints", "LoRA"),
        ),
        tuple(ENGINES),
    ),
    "bf16": ("FSDP2", "ZeRO-2", "ZeRO-3"),
    "offload": ("FSDP2", "ZeRO-2", "ZeRO-3"),
    "HSDP": ("FSDP2",),
}


class Cell(NamedTuple):
    engine: str
    name: str
    variant: str


def cells() -> Iterator[Cell]:
    """Each pair of an engine, a model and a variant is in one of them."""
    for engine, name in product(ENGINES, CASES):
        yield Cell(engine, name, "trained")
    for shift, (variant, engines) in enumerate(VARIANTS.items()):
        names = list(CASES)
        if variant == "reentrant checkpoints":
            # Mllama passes states by keyword, which they do not support. DeepSpeed does not support
            # them in a tower that is called twice, as that of Qwen3-VL is.
            names = ["LLaVA", "Qwen2.5-Omni"] * 2 + ["Qwen3-VL"]
        for place in range(max(len(engines), len(names))):
            name = names[(place + shift) % len(names)]
            yield Cell(engines[place % len(engines)], name, variant)


class Tolerance(NamedTuple):
    """By how much what an engine computes may differ from the truth.

    Attributes:
        relative: By what part of the largest element, a gradient.
        absolute: By how much more; far less than a dummy gradient.
        loss: By what part of its size, a loss in evaluation mode.
    """

    relative: float
    absolute: float
    loss: float


FINE = Tolerance(1e-5, 1e-8, 0.0)
ROUGH = Tolerance(2**-5, 1e-5, 2**-10)  # of bfloat16


class Training:
    """A model under an engine, which is compared with the same model in one process.

    Args:
        cell: What is trained.
        rank: Of this process.
        has_shadow: Whether it has a shadow.

    Attributes:
        truth: What is right.
        run: The model under the engine.
        shadow: The shadow, or None.
        shadowed: Keys that were shadowed in some step.
    """

    def __init__(self, cell: Cell, rank: int, *, has_shadow: bool = True) -> None:
        self.cell, self.rank = cell, rank
        engine, name, variant = cell
        plain, model = make(name, variant), make(name, variant)
        if variant == "bf16":
            narrow(plain, buffers="ZeRO" in engine)
        self.truth = Truth(name, plain)
        if "FSDP" not in engine:  # the others need a gradient of each parameter
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path in self.truth.used)
        self.run = ENGINES[engine](model, variant, CASES[name].paths)
        examples = [self.cast(self.truth.everything)]
        self.shadow = None
        if has_shadow:
            self.shadow = shadow_inactive(self.run.wrapper, self.run.call, examples=examples)
        self.shadowed: set[Any] = set()
        self._choices = random.Random(1)

    def cast(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch in the dtype of the model."""
        if self.cell.variant != "bf16":
            return batch
        return {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()}

    def random_batch(self, *place: int) -> Batch:
        active = [key for key in self.truth.keys if self._choices.random() < 0.5]
        return active, self.cast(batch_of(self.cell.name, active, *place))

    def updated_plain(self) -> nn.Module:
        """The model in one process, with the parameters that training has now."""
        plain = self.truth.plain
        for path, value in self.run.values().items():
            plain.get_parameter(path).data.copy_(value)
        return plain

    def step(self, place: int) -> list[str]:
        """What is wrong in a step on random batches, and before it in evaluation mode."""
        plain = self.updated_plain()
        count = 2 if self.cell.variant == "accumulation" else 1
        tolerance = ROUGH if self.cell.variant == "bf16" else FINE
        world = range(dist.get_world_size())
        batches = [[self.random_batch(place, n, rank) for rank in world] for n in range(count)]
        wrong = []
        for micro, of_ranks in enumerate(batches):
            active, batch = of_ranks[self.rank]
            right, found = evaluated(plain, batch), evaluated(self.run.call, batch)
            if not torch.allclose(found, right, rtol=tolerance.loss, atol=0):
                wrong.append(f"loss {found} in place of {right}")
            with self.run.syncing(micro == count - 1):
                self.run.learn(self.run.call(**batch).loss, tuple(active), count)
            self.shadowed |= {*self.shadow.shadowed} if self.shadow else set()
        expected = self.truth.gradients([batch for of_ranks in batches for batch in of_ranks])
        wrong += differences(self.run.gradients(), expected, tolerance)
        self.run.step()
        return [f"step {place}, {text}" for text in wrong]


def narrow(model: nn.Module, *, buffers: bool) -> None:
    """Cast parameters to bfloat16 as FSDP2 does, or with the buffers as DeepSpeed does."""
    if buffers:
        model.bfloat16()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def evaluated(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss in evaluation mode."""
    model.eval()
    with torch.no_grad():
        loss: Tensor = model(**batch).loss
    model.train()
    return loss


def differences(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor], tolerance: Tolerance
) -> list[str]:
    """Gradients that are not as they should be; of what is never used, None or zero is right."""
    assert expected.keys() <= actual.keys()
    wrong = []
    for path, found in actual.items():
        right = expected.get(path)
        if right is None or found is None:
            if right is not None or (found is not None and found.any()):
                wrong.append(f"{path}: {found} in place of {right}")
            continue
        error, size = (found - right).abs().max(), right.abs().max()
        if not error <= tolerance.relative * size + tolerance.absolute:
            wrong.append(f"{path}: {error} wrong of {size}")
    return wrong


def train(rank: int, cell: Cell, has_shadow: bool = True) -> tuple[list[str], set[Any]]:
    """What is wrong in a few steps, and what was shadowed."""
    training = Training(cell, rank, has_shadow=has_shadow)
    wrong = [text for place in range(6) for text in training.step(place)]
    return wrong, training.shadowed


@pytest.fixture(scope="module")
def ranks(fleets: Callable[..., Fleet]) -> Callable[[str, str], Fleet]:
    """Ranks for an engine and a variant. DeepSpeed changes functions of torch in its process."""

    def of(engine: str, variant: str = "") -> Fleet:
        return fleets(4 if variant == "HSDP" else 2, "DeepSpeed" if "ZeRO" in engine else "")

    return of


@pytest.mark.parametrize("cell", list(cells()), ids=", ".join)
def test_gradients_are_those_of_one_process(ranks: Any, cell: Cell) -> None:
    """Losses in evaluation mode, also with different modalities, are compared as well."""
    answers = ranks(cell.engine, cell.variant).ask(train, cell)
    assert [wrong for wrong, _ in answers] == [[]] * len(answers)
    assert set().union(*(keys for _, keys in answers)) == CASES[cell.name].inputs.keys()


@pytest.mark.parametrize(
    "cell",
    [Cell(engine, name, "trained") for engine in ("FSDP2", "ZeRO-2", "ZeRO-3") for name in CASES],
    ids=", ".join,
)
def test_without_a_shadow_they_are_not(cell: Cell) -> None:
    """Ranks hang, stop in the engine, or get wrong gradients."""
    with Fleet(2, timeout=5, limit=60, quiet=True) as fleet:
        answers = fleet.answers(train, cell, False)
    # What gloo makes of mismatched collectives: it ends the process, times out or raises.
    kinds = {answer.kind for answer in answers if isinstance(answer, RankError)}
    assert kinds <= {"gone", "hangs", "RuntimeError"}
    assert kinds or all(wrong for wrong, _ in answers)


# Of each engine, that with the most collectives.
STEADY = {
    "FSDP2": SMALL_ENGINES["FSDP2, all parts"],
    "FSDP1": SMALL_ENGINES["FSDP1, towers"],
    "DDP": SMALL_ENGINES["DDP, several buckets"],
    # ZeRO-3 replaces the linear function of torch for good. From then on, weights and biases get
    # their gradients together, so that ZeRO-2 has to see them in the same order on all ranks.
    "ZeRO-3": SHADOWED["ZeRO-3, overlapping"],
    "ZeRO-2": SHADOWED["ZeRO-2, small buckets"],
}


def steady(rank: int, engine: str, schedule: Schedule) -> Outcome:
    return held_against_truth(rank, shadowed(STEADY[engine]), SCALE, schedule)


@pytest.mark.parametrize("engine", STEADY)
def test_a_hundred_steps_of_a_small_model(ranks: Any, engine: str) -> None:
    choices = random.Random(1)

    def active() -> Active:
        return tuple(name for name in NAMES if choices.random() < 0.5)

    schedule = tuple(((active(), active()),) for _ in range(100))
    for found in ranks(engine).ask(steady, engine, schedule):
        assert found.error <= 1e-6 * found.largest, found
        assert not found.missing, found


def generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Four tokens after a batch."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    model.eval()
    tokens: Tensor = model.generate(**prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    model.train()
    return tokens


def tokens_between_steps(rank: int, cell: Cell) -> list[str]:
    """What is wrong in steps around a generation, and in what is generated.

    All ranks generate from all modalities under FSDP2, and rank 0 alone does under DDP.
    """
    training = Training(cell, rank)
    assert training.shadow is not None
    wrong = training.step(0)
    batch = batch_of(cell.name, training.truth.keys, rank)
    right = generate(training.updated_plain(), batch)
    model = training.run.bare
    if cell.engine == "FSDP2":
        # `generate` calls the towers before the model itself.
        register_fsdp_forward_method(model, "generate")
    if cell.engine == "FSDP2" or rank == 0:
        with training.shadow.paused():
            found = generate(model, batch)
        if not torch.equal(found, right):
            wrong.append(f"{found} generated in place of {right}")
    return wrong + training.step(1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["FSDP2", "DDP"])
def test_ranks_generate_between_steps(two: Fleet, engine: str, name: str) -> None:
    for wrong in two.ask(tokens_between_steps, Cell(engine, name, "trained")):
        assert wrong == []


def copied(rank: int, cell: Cell) -> list[str]:
    """What is wrong in steps around the use of a copy on text alone, which calls no tower."""
    training = Training(cell, rank)
    assert training.shadow is not None
    wrong = training.step(0)
    before = training.shadow.shadowed
    average = copy.deepcopy(training.run.call)
    calls: list[str] = []
    for path in tower_paths(cell.name):
        tower = average.get_submodule(f"module.{path}")
        tower.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
    batch = batch_of(cell.name, [], rank)
    if not torch.equal(evaluated(average, batch), evaluated(training.updated_plain(), batch)):
        wrong.append("the copy has another loss")
    wrong += [f"the copy calls {path}" for path in calls]
    assert training.shadow.shadowed == before
    return wrong + training.step(1)


@pytest.mark.parametrize("name", CASES)
def test_a_copy_has_no_shadow(two: Fleet, name: str) -> None:
    for wrong in two.ask(copied, Cell("DDP", name, "trained")):
        assert wrong == []
