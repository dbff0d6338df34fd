"""Lightning's strategy for FSDP2, on two CPU ranks with different modalities.

`FSDPStrategy` and `DeepSpeedStrategy` of Lightning 2.6 refuse CPUs.
"""

import random
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from modaldummy import DummyLossWrapper, shadow_inactive
from modaldummy.integrations.lightning import DummyLossCallback
from tests.distributed.engines import needs_averages
from tests.distributed.oracle import MAP, NAMES, Active, Model, batch_of, loss_of, whole
from tests.fleet import Fleet
from tests.integrations.lightning_modules import QUIET, trainer
from tests.integrations.test_lightning_ddp import Ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.long,
    needs_averages,
    *map(pytest.mark.filterwarnings, QUIET),
]
LR = 0.1
NUM_STEPS = 10


class Sharded(LightningModule):
    """The reference model of the tests of engines; each tower is a unit of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.wrapper = DummyLossWrapper(self, {key: f"model.{path}" for key, path in MAP.items()})
        self.shadowed: list[tuple[Any, ...]] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for part in (*self.model.towers.values(), self.model.fusion, self.model):
            fully_shard(part, mesh=mesh)

    def on_train_start(self) -> None:
        self.shadow = shadow_inactive(self.wrapper, self.model, examples=[(batch_of(NAMES, 99),)])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.model(batch))
        self.shadowed.append(self.shadow.shadowed)
        return self.wrapper.total(loss, [name for name in NAMES if name in batch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), LR)


def actives() -> list[list[Active]]:
    """What each rank has at each step; dMRI never comes."""
    draw = random.Random(0)
    return [
        [tuple(n for n in NAMES[:2] if draw.random() < 0.5) for _ in range(2)]
        for _ in range(NUM_STEPS)
    ]


def trained(rank: int) -> tuple[dict[str, Tensor], int]:
    """The weights after some steps, and in how many of them this rank shadowed a tower."""
    module = Sharded()
    batches: Any = [batch_of(step[rank], place, rank) for place, step in enumerate(actives())]
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    made = trainer(
        DummyLossCallback(hold=True),
        devices=2,
        strategy=strategy,
        plugins=Ranks(rank),
        use_distributed_sampler=False,
    )
    made.fit(module, DataLoader(batches, batch_size=None))
    named = module.model.named_parameters()
    return {name: whole(p.detach()) for name, p in named}, sum(map(bool, module.shadowed))


def test_weights_are_those_of_one_process(two: Fleet) -> None:
    plain = Model()
    optimizer = torch.optim.SGD(plain.parameters(), LR)
    for place, step in enumerate(actives()):
        for rank, active in enumerate(step):
            (loss_of(plain(batch_of(active, place, rank))) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, num_shadowed in two.ask(trained):
        assert num_shadowed == NUM_STEPS  # dMRI at least
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-6)
    start = Model().get_parameter("towers.dMRI.weight")
    assert torch.equal(found["towers.dMRI.weight"], start)
