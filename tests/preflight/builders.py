"""Arguments for `preflight`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import DummyLossWrapper, attach_to_outputs, hold_inactive
from tests.holding import NAMES
from tests.preflight.models import (
    FOUR,
    Around,
    Engine,
    Inside,
    Model,
    Ranks,
    mapped,
    partition,
    sharded,
    sparse_tables,
    with_head,
)

Arguments = dict[str, Any]


def with_scale(scale: float, **options: Any) -> Arguments:
    return {"wrapper": mapped(Model(), scale, **options)}


def with_dtype(dtype: torch.dtype, scale: float = 1e-7, **arguments: Any) -> Arguments:
    return {"wrapper": Model().to(dtype).wrapper(scale), **arguments}


def with_loss(model: nn.Module, *active: str, **arguments: Any) -> Arguments:
    wrapper = mapped(model)
    return {"wrapper": wrapper, "loss": wrapper.total(model(active), active), **arguments}


def with_optimizer(kind: Callable[..., Optimizer], **options: Any) -> Arguments:
    model = Model()
    return {"wrapper": model.wrapper(), "optimizer": kind(model.parameters(), lr=0.1, **options)}


def held(model: nn.Module, kind: Callable[..., Optimizer] = AdamW, **options: Any) -> Arguments:
    wrapper = mapped(model)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    hold_inactive(wrapper, optimizer)
    return {"wrapper": wrapper, "optimizer": optimizer}


def ddp(scale: float | None = 1e-7, **options: Any) -> Arguments:
    model = Model()
    return {"wrapper": model.wrapper(scale), "model": DistributedDataParallel(model, **options)}


def ddp_below(scale: float | None = 1e-7, **options: Any) -> Arguments:
    model = Model()
    around: Any = torch.compile(DistributedDataParallel(model, **options), backend="eager")
    return {"wrapper": model.wrapper(scale), "model": around}


def ddp_with_loss_inside(**options: Any) -> Arguments:
    model = Inside()
    around = DistributedDataParallel(model, **options)
    return {"wrapper": model.wrapper, "model": around, "loss": around(["T1"])}


def ddp_with_wrapped_loss() -> Arguments:
    """The model has the wrapped loss function as an attribute, but not the wrapper."""
    model = Model()
    wrapper = mapped(model)
    model.criterion = wrapper(nn.MSELoss())  # type: ignore[assignment]
    around = DistributedDataParallel(model, find_unused_parameters=True)
    return {"wrapper": wrapper, "model": around}


def ddp_with_unused_trunk() -> Arguments:
    model = Model()
    model.head = nn.Linear(4, 4)
    return with_loss_of(DistributedDataParallel(model), model, "T1")


def real_loss() -> Arguments:
    model = Model()
    wrapper = mapped(model)
    real = model(["T1"])
    wrapper.total(real, ["T1"])
    return {"wrapper": wrapper, "loss": real}


def misspelt(name: str, fusion: tuple[str, ...]) -> Arguments:
    """The map has other names than the batch, which is keyed by modality."""
    model = with_head(used=True)
    paths = {"T1": "towers.T1", "rsfMRI": "towers.rsfMRI", name: "towers.dMRI"}
    wrapper = DummyLossWrapper(model, {**paths, fusion: "trunk.0"})
    batch = {name: torch.ones(2, 3) for name in ("T1", "dMRI")}
    return {"wrapper": wrapper, "loss": wrapper.total(model(batch), batch)}


def tied_to_what_runs() -> Arguments:
    """An inactive tower shares its weight with a layer of the trunk that runs."""
    model = with_head(used=True)
    model.towers["T1"] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model.towers["T1"][1].weight = model.trunk[0].weight
    return with_loss(model, "dMRI")


def unused_part() -> Arguments:
    model = Model()
    model.towers["T1"].extra = nn.Linear(2, 2)
    return with_loss(model, "T1")


def ddp_with_unused_part() -> Arguments:
    model = Model()
    model.towers["T1"].extra = nn.Linear(2, 2)
    return with_loss_of(DistributedDataParallel(model), model, "T1")


def attached() -> Arguments:
    model = Model()
    around = DistributedDataParallel(model, find_unused_parameters=True)
    wrapper = model.wrapper()
    attach_to_outputs(wrapper, around)
    return {"wrapper": wrapper, "model": around, "loss": wrapper.total(around(["T1"]), "T1")}


def sum_of_totals() -> Arguments:
    """The loss is the sum of the totals of two batches with different modalities."""
    model = Model()
    wrapper = model.wrapper()
    return {"wrapper": wrapper, "loss": model.total(wrapper, "T1") + model.total(wrapper, "dMRI")}


def with_loss_of(called: nn.Module, model: nn.Module, *active: str) -> Arguments:
    wrapper = mapped(model)
    total = wrapper.total(called(active), active)
    return {"wrapper": wrapper, "model": called, "loss": total}


def ddp_with_sparse_tables(scale: float | None) -> Arguments:
    model = sparse_tables()
    return {"wrapper": mapped(model, scale), "model": DistributedDataParallel(model)}


def sharded_after_the_optimizer() -> Arguments:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return {"wrapper": mapped(model), "optimizer": optimizer}


def engine(stage: int, scale: float | None = 1e-7, **options: Any) -> Arguments:
    model = Model()
    return {"wrapper": model.wrapper(scale), "model": Engine(model, stage, **options)}


def partitioned(attribute: str) -> Arguments:
    model = Model()
    wrapper = model.wrapper()
    partition(model, attribute)
    return {"wrapper": wrapper}


def compiled(names: Iterable[str], in_place: bool = False) -> Arguments:
    model = Model(names)
    wrapper = mapped(model)
    if in_place:
        model.compile(backend="eager")
        return {"wrapper": wrapper}
    return {"wrapper": wrapper, "model": torch.compile(model, backend="eager")}


def compiled_towers() -> Arguments:
    model = Model(FOUR)
    for tower in model.towers.values():
        tower.compile(backend="eager")
    return {"wrapper": mapped(model)}


def left_out() -> Arguments:
    model = with_head(used=True)
    optimizer = SGD([*model.towers.parameters(), *model.trunk[1].parameters()], lr=0.1)
    return {"wrapper": mapped(model), "optimizer": optimizer}


def frozen_tower() -> Arguments:
    model = Model()
    model.towers["dMRI"].requires_grad_(False)
    return with_loss(model, "T1")


def with_value(value: float) -> Arguments:
    model = Model()
    with torch.no_grad():
        model.towers["dMRI"].weight[1, 2] = value
    return {"wrapper": model.wrapper()}


def on_meta(*names: str, **options: Any) -> Arguments:
    model = Model()
    for name in names:
        model.towers[name].to("meta")
    return {"wrapper": mapped(model, **options)}


def without_modalities(arguments: Arguments) -> Arguments:
    """Add the loss of a batch that trains only the trunk."""
    wrapper = arguments["wrapper"]
    trunk = wrapper.parameters.model.trunk
    return arguments | {"loss": wrapper.total(trunk(torch.ones(1, 4)).sum(), [])}


def detached() -> Arguments:
    wrapper = Model().wrapper()
    return {"wrapper": wrapper, "loss": wrapper.total(torch.tensor(2.0), NAMES)}


def of_another_model() -> Arguments:
    return {"wrapper": Model().wrapper(), "loss": Model()(NAMES)}


def with_gains(number: int, **arguments: Any) -> Arguments:
    """Towers with norm layers, whose gains are 1 and do not cancel."""
    model = Model()
    for name in NAMES:
        model.towers[name] = nn.Sequential(nn.LayerNorm(number), nn.Linear(number, 4))
    return {"wrapper": mapped(model), **arguments}


def after_a_step(loss: float) -> Arguments:
    arguments = with_gains(500)
    arguments["wrapper"].total(torch.tensor(loss), "T1")
    return arguments


def with_gradients(value: float, **arguments: Any) -> Arguments:
    model = Model().half()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return {"wrapper": model.wrapper(), **arguments}


def on_ranks(number: int, dtype: torch.dtype, **arguments: Any) -> Arguments:
    model = Model().to(dtype)
    around: Any = DistributedDataParallel(model)
    around.process_group = Ranks(number)
    return {"wrapper": model.wrapper(), "model": around, **arguments}


def optimizer_for_each_tower(scale: float | None) -> Arguments:
    model = Model()
    optimizers = [SGD(part.parameters(), lr=0.1) for part in [*model.towers.values(), model.trunk]]
    scaler = torch.amp.GradScaler("cpu")
    return {"wrapper": model.wrapper(scale), "optimizer": optimizers, "scaler": scaler}


def ddp_with_optimizers() -> Arguments:
    arguments = optimizer_for_each_tower(None)
    return arguments | {"model": DistributedDataParallel(arguments["wrapper"].parameters.model)}


def one_optimizer(scale: float | None) -> Arguments:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    return {"wrapper": model.wrapper(scale), "optimizer": optimizer, "scaler": scaler}


def removed_hold() -> Arguments:
    model = Model()
    wrapper, optimizer = mapped(model), AdamW(model.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer).remove()
    return {"wrapper": wrapper, "optimizer": optimizer}


def hold_of_another_wrapper() -> Arguments:
    model = Model()
    return held(model) | {"wrapper": model.wrapper()}


def with_fusion() -> Arguments:
    model = with_head(used=True)
    paths: Mapping[Any, str] = {name: f"towers.{name}" for name in NAMES}
    wrapper = DummyLossWrapper(model, {**paths, ("T1", "dMRI"): "trunk.0"})
    loss = wrapper.total(model.loss(["T1", "dMRI"]), ["T1", "dMRI"])
    return {"wrapper": wrapper, "loss": loss, "max_norm": 1.0}


def mixed_precision() -> Arguments:
    model = Model()
    wrapper = model.wrapper()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapper.total(model(["T1"]), ["T1"])
    scaler = torch.amp.GradScaler("cpu")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    clipped = {"scaler": scaler, "max_norm": 1.0, "accumulation_steps": 4}
    return {"wrapper": wrapper, "loss": loss, "optimizer": optimizer, **clipped}


def sharded_and_held(forward: bool = False) -> Arguments:
    model = sharded("")
    arguments = held(model)
    if forward:
        return arguments | {"loss": model.total(arguments["wrapper"], "T1")}
    return arguments


def warming_up() -> Arguments:
    arguments = with_optimizer(SGD, momentum=0.9)
    LambdaLR(arguments["optimizer"], lambda epoch: epoch / 10)
    return arguments


def accelerated() -> Arguments:
    arguments = held(Model())
    return arguments | {"optimizer": Around(arguments["optimizer"])}


def ddp_and_held() -> Arguments:
    model = Model()
    around = DistributedDataParallel(model)
    arguments = held(model) | {"model": around, "max_norm": 1.0, "accumulation_steps": 2}
    return arguments | {"loss": arguments["wrapper"].total(around(["dMRI"]), "dMRI")}


def two_held() -> Arguments:
    model = Model()
    wrapper = model.wrapper()
    optimizers = [Adam(part.parameters(), lr=0.1) for part in (model.towers, model.trunk)]
    hold_inactive(wrapper, optimizers[0])
    return {"wrapper": wrapper, "optimizer": optimizers, "loss": model.total(wrapper, "T1")}
