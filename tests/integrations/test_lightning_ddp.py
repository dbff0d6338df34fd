"""Lightning's DDP, which runs `training_step` in its forward and so sees the dummy term."""

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from modaldummy import DummyLossWrapper, UnsupportedEngineError
from modaldummy.integrations.lightning import DummyLossCallback
from tests.holding import NAMES
from tests.integrations.lightning_modules import QUIET, TURNS, Batch, Kept, Module, fit

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]


class Outside(Module):
    """The wrapper is not an attribute of it."""

    def __init__(self) -> None:
        super().__init__(wrapped=False)
        spec = {name: f"model.towers.{name}" for name in NAMES}
        self.total = DummyLossWrapper(self, spec).total  # a method hides it

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total: Any = self.total
        return cast(Tensor, total(self.model.loss(batch["modality"]), batch))


class Manual(Module):
    """Backward by hand."""

    automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.wrapper.total(self.model.loss(batch["modality"]), batch))
        optimizer.step()


@pytest.mark.usefixtures("a_group")
@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (Module, None),
        (Module, "find_unused_parameters"),
        (Module, "static_graph"),
        (Outside, "find_unused_parameters"),
        (Manual, "find_unused_parameters"),
    ],
)
def test_ddp_trains(kind: type[Module], option: str | None) -> None:
    """No gradient is missing, there are no findings, and the hold is exact."""
    module = kind()
    start = module.model.towers["dMRI"].weight.detach().clone()
    total: Any = getattr(module, "total", None)
    callback = DummyLossCallback(getattr(total, "__self__", None), hold=True)
    options: Any = {option: True} if option else {}
    strategy = DDPStrategy(process_group_backend="gloo", **options)
    fit(module, TURNS, callback, strategy=strategy)
    assert all(g is not None for step in module.stepped for g in step.values())
    assert callback.findings == []
    assert torch.equal(module.model.towers["dMRI"].weight, start)
    assert not torch.equal(module.model.towers["rsfMRI"].weight, start)


@pytest.mark.usefixtures("a_group")
def test_a_static_graph_refuses_a_scale_of_none() -> None:
    strategy = DDPStrategy(static_graph=True, process_group_backend="gloo")
    with pytest.raises(UnsupportedEngineError, match="never reduces the gradients"):
        fit(Module(scale=None), TURNS, DummyLossCallback(), strategy=strategy)


class Ranks(LightningEnvironment):
    """Ranks that have a process group already."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


TWO = [[["T1"], ["T1"]], [["rsfMRI"], ["T1"]]]  # active on each rank at each step


def train(rank: int) -> tuple[Any, Any, Any]:
    """Gradients of each step, logged rows and parameters of one rank."""
    torch.manual_seed(0)
    module, logger = Module(), Kept()
    fit(
        module,
        TWO[rank],
        DummyLossCallback(hold=True),
        logger=logger,
        devices=2,
        strategy=DDPStrategy(find_unused_parameters=True, process_group_backend="gloo"),
        plugins=Ranks(rank),
        use_distributed_sampler=False,
    )
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return module.stepped, logger.ours(), parameters


@pytest.mark.long
def test_ranks_with_different_modalities(two: Any) -> None:
    """Gradients are averages over the ranks, and each rank has its own labels."""
    ours = two.ask(train)
    alone: list[Any] = []
    for turns in TWO:
        module = Module()
        fit(module, turns[:1])
        alone.append(module.stepped[0])
    for stepped, _, parameters in ours:
        for name, gradient in stepped[0].items():
            torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2)
        assert all(torch.equal(p, ours[0][2][name]) for name, p in parameters.items())
    held = Module().model.towers["dMRI"].weight
    assert torch.equal(ours[0][2]["model.towers.dMRI.weight"], held)
    first = [rows[0] for _, rows, _ in ours]
    assert [row["modaldummy/active/T1"] for row in first] == [1, 0]
    assert [row["grad_ranks"] for row in first] == [2, 2]
