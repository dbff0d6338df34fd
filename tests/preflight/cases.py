"""Setups with one thing wrong, which `preflight` must find, and setups with nothing wrong."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modaldummy import DummyLossWrapper, attach_to_outputs, hold_inactive
from tests.holding import NAMES
from tests.preflight.models import (
    FOUR,
    Around,
    Checkpointed,
    Engine,
    Inside,
    Model,
    Ranks,
    mapped,
    partition,
    sharded,
    sparse_table,
    tied,
    with_extra,
    with_head,
    with_towers,
    with_two_layers,
)
from tests.zero_engine import Zero12, ZeroEngine

Arguments = dict[str, Any]


def given(
    model: nn.Module,
    scale: float | None = 1e-7,
    *,
    active: Collection[str] | None = None,
    called: nn.Module | None = None,
    **others: Any,
) -> Arguments:
    """The arguments of `preflight` for a model, with the total of a batch if `active` is given."""
    wrapper = mapped(model, scale)
    arguments: Arguments = {"wrapper": wrapper, "model": called, **others}
    if active is not None:
        arguments["loss"] = wrapper.total((called or model)(active), active)
    return arguments


# --- DDP, FSDP2, DeepSpeed, torch.compile ---


def ddp(
    scale: float | None = 1e-7,
    model: Model | None = None,
    active: Collection[str] | None = None,
    **options: Any,
) -> Arguments:
    model = model or Model()
    called = DistributedDataParallel(model, **options)
    return given(model, scale, called=called, active=active)


def ddp_below(**options: Any) -> Arguments:
    model = Model()
    called: Any = torch.compile(DistributedDataParallel(model, **options), backend="eager")
    return given(model, called=called)


def ddp_with_loss_inside(own_wrapper: bool) -> Arguments:
    model = Inside()
    around = DistributedDataParallel(model, find_unused_parameters=True)
    return {"wrapper": model.wrapper if own_wrapper else model.model.wrapper(), "model": around}


def ddp_with_wrapped_loss() -> Arguments:
    """The model has the wrapped loss function as an attribute, but not the wrapper."""
    model = Model()
    wrapper = mapped(model)
    model.criterion = wrapper(nn.MSELoss())  # type: ignore[assignment]
    around = DistributedDataParallel(model, find_unused_parameters=True)
    return {"wrapper": wrapper, "model": around}


def attached() -> Arguments:
    arguments = ddp(find_unused_parameters=True)
    wrapper, around = arguments["wrapper"], arguments["model"]
    attach_to_outputs(wrapper, around)
    return arguments | {"loss": wrapper.total(around(["T1"]), "T1")}


def ddp_around_the_trunk() -> Arguments:
    model = Model()
    model.trunk = DistributedDataParallel(model.trunk, find_unused_parameters=True)
    return given(model)


def on_ranks(number: int, dtype: torch.dtype, **arguments: Any) -> Arguments:
    model = Model().to(dtype)
    around: Any = DistributedDataParallel(model)
    around.process_group = Ranks(number)
    return given(model, called=around, **arguments)


def resharding_later() -> Arguments:
    model: Any = sharded("")
    model.set_reshard_after_forward(True)
    return given(model)


def sharded_after_the_optimizer() -> Arguments:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return given(model, optimizer=optimizer)


def with_dtensor() -> Arguments:
    """A DTensor that FSDP2 does not manage: as a rule, ranks of its mesh see the same batch."""
    model = Model()
    tower = model.towers["dMRI"]
    mesh = init_device_mesh("cpu", (1,))
    tower.weight = nn.Parameter(distribute_tensor(tower.weight, mesh, [Replicate()]))
    return given(model)


def engine(stage: int, scale: float | None = 1e-7, overlap: bool = False) -> Arguments:
    model = Model()
    return given(model, scale, called=Engine(model, stage, overlap))


def zero(
    *,
    has_groups: bool = False,
    held: bool = True,
    model: Model | None = None,
    active: Collection[str] | None = None,
) -> Arguments:
    """ZeRO-1 on a single rank, with AdamW."""
    model = model or Model()
    parts = [*model.towers.values(), model.trunk] if has_groups else [model]
    groups = [list(part.parameters()) for part in parts]
    called = ZeroEngine(model, 1, Zero12(groups, partial(AdamW, lr=0.1), None))
    arguments = given(model, called=called, active=active)
    if held:
        hold_inactive(arguments["wrapper"], called)
    return arguments


def zero_of_another_kind() -> Arguments:
    """It keeps flat tensors somewhere else."""
    arguments = zero(held=False)
    del arguments["model"].optimizer.single_partition_of_fp32_groups
    return arguments


def zero_on_nvme() -> Arguments:
    arguments = zero(held=False)
    arguments["model"].optimizer.swap_optimizer = True
    return arguments


def partitioned(attribute: str) -> Arguments:
    arguments = given(Model())
    partition(arguments["wrapper"].parameters.model, attribute)
    return arguments


def compiled(names: Iterable[str], in_place: bool = False) -> Arguments:
    model = Model(names)
    if in_place:
        model.compile(backend="eager")
        return given(model)
    called: Any = torch.compile(model, backend="eager")
    return given(model, called=called)


def compiled_towers() -> Arguments:
    model = Model(FOUR)
    for tower in model.towers.values():
        tower.compile(backend="eager")
    return given(model)


# --- losses and maps ---


def real_loss() -> Arguments:
    model = Model()
    arguments = given(model, active=["T1"])
    return arguments | {"loss": model(["T1"])}


def with_names(name: str, fusion: tuple[str, ...]) -> Arguments:
    """A map that may have other names than the batch of T1 and dMRI, which is keyed by modality."""
    model = with_two_layers()
    paths = {"T1": "towers.T1", "rsfMRI": "towers.rsfMRI", name: "towers.dMRI"}
    wrapper = DummyLossWrapper(model, {**paths, fusion: "trunk.0"})
    batch = {name: torch.ones(2, 3) for name in ("T1", "dMRI")}
    return {"wrapper": wrapper, "loss": wrapper.total(model(batch), batch)}


def tied_to_what_runs() -> Arguments:
    """An inactive tower shares its weight with a layer of the trunk that runs."""
    model = with_two_layers()
    model.towers["T1"] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model.towers["T1"][1].weight = model.trunk[0].weight
    return given(model, active=["dMRI"])


def towers_of(**paths: Any) -> Arguments:
    return {"wrapper": DummyLossWrapper(Model(), paths)}


def tower_of_two() -> Arguments:
    """As is right for images and videos that go through one tower, each in a call of its own."""
    return towers_of(T1="towers.T1", dMRI="towers.T1")


def frozen(model: Model, path: str, active: Collection[str] | None = None) -> Arguments:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(path))
    return given(model, active=active)


def sum_of_totals() -> Arguments:
    """The loss is the sum of the totals of two batches with different modalities."""
    model = Model()
    wrapper = model.wrapper()
    return {"wrapper": wrapper, "loss": model.total(wrapper, "T1") + model.total(wrapper, "dMRI")}


def without_modalities(arguments: Arguments) -> Arguments:
    """Add the loss of a batch that trains only the trunk."""
    wrapper = arguments["wrapper"]
    trunk = wrapper.parameters.model.trunk
    return arguments | {"loss": wrapper.total(trunk(torch.ones(1, 4)).sum(), [])}


# --- values and dtypes ---


def with_value(value: float) -> Arguments:
    model = Model()
    with torch.no_grad():
        model.towers["dMRI"].weight[1, 2] = value
    return given(model)


def on_meta(*names: str, **options: Any) -> Arguments:
    model = Model()
    for name in names:
        model.towers[name].to("meta")
    return {"wrapper": mapped(model, **options)}


def half(scale: float = 1e-7, **arguments: Any) -> Arguments:
    return given(Model().half(), scale, **arguments)


def with_gradients(value: float, **arguments: Any) -> Arguments:
    arguments = half(**arguments)
    for parameter in arguments["wrapper"].parameters.model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return arguments


# --- optimizers ---


def with_optimizer(make: Callable[..., Optimizer], **options: Any) -> Arguments:
    model = Model()
    return given(model, optimizer=make(model.parameters(), lr=0.1, **options))


def around(*makes: Callable[..., Optimizer]) -> Arguments:
    model = Model()
    inner = [make(model.parameters(), lr=0.1) for make in makes]
    return given(model, optimizer=Around(*inner))


def left_out() -> Arguments:
    model = with_two_layers()
    return given(model, optimizer=SGD([*model.towers.parameters(), *model.trunk[1].parameters()]))


def held(module: nn.Module, active: Collection[str] | None = None, **others: Any) -> Arguments:
    wrapper, optimizer = mapped(module), AdamW(module.parameters(), lr=0.1)
    hold_inactive(wrapper, optimizer)
    arguments = {"wrapper": wrapper, "optimizer": optimizer, **others}
    return (
        arguments if active is None else arguments | {"loss": wrapper.total(module(active), active)}
    )


def after_a_step() -> Arguments:
    """The optimizer has a state and a schedule."""
    arguments = with_optimizer(AdamW)
    optimizer, model = arguments["optimizer"], arguments["wrapper"].parameters.model
    LambdaLR(optimizer, lambda epoch: min(epoch / 10, 1.0))
    model(NAMES).backward()
    optimizer.step()
    return arguments


def removed_hold() -> Arguments:
    arguments = with_optimizer(AdamW)
    hold_inactive(arguments["wrapper"], arguments["optimizer"]).remove()
    return arguments


def hold_of_another_wrapper() -> Arguments:
    model = Model()
    return held(model) | {"wrapper": model.wrapper()}


def accelerated() -> Arguments:
    arguments = held(Model())
    return arguments | {"optimizer": Around(arguments["optimizer"])}


def optimizer_for_each_tower(scale: float | None, in_ddp: bool = False) -> Arguments:
    model = Model()
    optimizers = [SGD(part.parameters(), lr=0.1) for part in [*model.towers.values(), model.trunk]]
    scaler = torch.amp.GradScaler("cpu")
    called = DistributedDataParallel(model) if in_ddp else None
    return given(model, scale, called=called, optimizer=optimizers, scaler=scaler)


def mixed_precision(scale: float | None = 1e-7) -> Arguments:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu")
    options: Arguments = {"scaler": scaler, "max_norm": 1.0, "accumulation_steps": 4}
    with torch.autocast("cpu", torch.bfloat16):
        return given(model, scale, active=["T1"], optimizer=optimizer, **options)


class Sick(NamedTuple):
    """A setup with one thing wrong.

    Attributes:
        finding: Code and severity of the only finding.
        build: Makes the arguments of `preflight`.
        text: Parts of the text of the finding, with "..." between them.
    """

    finding: str
    build: Callable[[], Arguments]
    text: str

    @property
    def code(self) -> str:
        return self.finding.partition(" ")[0]


SICK: dict[str, Sick] = {
    "DDP that looks for unused parameters": Sick(
        "MD101 error", lambda: ddp(find_unused_parameters=True), "ready only once...model=Model"
    ),
    "DDP that looks for unused parameters, below torch.compile": Sick(
        "MD101 error", lambda: ddp_below(find_unused_parameters=True), "find_unused_parameters"
    ),
    "DDP around the loss of another wrapper": Sick(
        "MD101 error", lambda: ddp_with_loss_inside(False), "model=Inside...attach_to_outputs"
    ),
    "DDP, static graph without gradients": Sick(
        "MD102 error", lambda: ddp(None, static_graph=True), "static_graph=True...scale=0.0"
    ),
    "DDP, sparse table without gradients": Sick(
        "MD103 error", lambda: ddp(None, sparse_table()), "towers.dMRI.weight...scale=0.0"
    ),
    "FSDP2, one tower and no root": Sick(
        "MD104 warning", lambda: given(sharded("towers.T1")), "[towers.T1.weight, towers.T1.bias]"
    ),
    "FSDP2, a root that reshards": Sick(
        "MD104 warning", lambda: given(sharded("", reshard_after_forward=True)), "has resharded"
    ),
    "FSDP2, resharding that was set later": Sick(
        "MD104 warning", resharding_later, "has resharded...towers.dMRI.bias"
    ),
    "FSDP2, no gradients": Sick(
        "MD104 warning", lambda: given(sharded(""), None), "scale=None...scale=0.0"
    ),
    "ZeRO-2": Sick("MD105 warning", lambda: engine(2), "engine=Engine...zero_optimization_stage=2"),
    "ZeRO-2, no gradients": Sick(
        "MD105 error", lambda: engine(2, None), "first inactive...scale=0.0...towers.T1.bias"
    ),
    "ZeRO-1 that overlaps": Sick(
        "MD105 warning", lambda: engine(1, overlap=True), "zero_optimization_stage=1"
    ),
    "ZeRO-1, no gradients": Sick("MD105 warning", lambda: engine(1, None), "scale=0.0"),
    "partitioned by ZeRO-1 or ZeRO-2": Sick(
        "MD105 warning", lambda: partitioned("_hp_mapping"), "`model=engine`...towers.T1.bias"
    ),
    "ZeRO-3": Sick("MD106 error", lambda: engine(3), "zero_optimization_stage=3...Use ZeRO-1"),
    "compiled, four modalities": Sick(
        "MD107 warning", lambda: compiled(FOUR), "after 8...recompile_limit = 15"
    ),
    "compiled in place, four modalities": Sick(
        "MD107 warning", lambda: compiled(FOUR, in_place=True), "active_sets=15"
    ),
    "head that no batch uses": Sick(
        "MD111 warning", lambda: given(with_head(), active=["T1"]), "head.weight...head.bias"
    ),
    "DDP, head that no batch uses": Sick(
        "MD111 error", lambda: ddp(model=with_head(), active=["T1"]), "finished reduction"
    ),
    "DDP, static graph, head that no batch uses": Sick(
        "MD111 warning", lambda: ddp(1e-7, with_head(), ["T1"], static_graph=True), "head.bias"
    ),
    "layer that no optimizer has": Sick("MD112 warning", left_out, "trunk.0.weight...2 of 10"),
    "FSDP2, optimizer made before sharding": Sick(
        "MD112 warning", sharded_after_the_optimizer, "8 of 8...after you shard"
    ),
    "NaN in a tower": Sick("MD114 error", lambda: with_value(torch.nan), "[towers.dMRI.weight]"),
    "all towers on meta": Sick(
        "MD115 error", lambda: on_meta(*NAMES), "towers.T1.weight...gradient_only=True"
    ),
    "a tower, a part of which is all that another modality has": Sick(
        "MD117 warning",
        lambda: towers_of(T1="towers.T1", dMRI="towers.T1.weight"),
        "belongs to dMRI...towers.T1.weight: [T1, dMRI]",
    ),
    "a tower of two modalities, a part of which is all that a third has": Sick(
        "MD117 warning",
        lambda: towers_of(T1="towers.T1", dMRI="towers.T1", rsfMRI="towers.T1.bias"),
        "belongs to rsfMRI...towers.T1.bias: [T1, dMRI, rsfMRI]",
    ),
    "tower of which only a shared part is trained": Sick(
        "MD117 warning",
        lambda: frozen(tied("towers.T1", "towers.dMRI"), "towers.dMRI.bias"),
        "without_own=[dMRI]...towers.T1.weight: [T1, dMRI]",
    ),
    "weight of a tower and the trunk": Sick(
        "MD118 warning", lambda: given(tied("towers.T1", "trunk")), "[towers.T1.weight]"
    ),
    "weight of an inactive tower and the trunk": Sick(
        "MD118 warning", tied_to_what_runs, "towers.T1.1.weight...Leave them out"
    ),
    "loss made of a number": Sick(
        "MD120 error", lambda: given(Model()) | {"loss": torch.tensor(2.0)}, "has no graph"
    ),
    "loss of another model": Sick(
        "MD120 error", lambda: given(Model()) | {"loss": Model()(NAMES)}, "trainable=8"
    ),
    "real loss in place of the total": Sick(
        "MD121 warning", real_loss, "of inactive modalities...dMRI.bias...wrapper.total"
    ),
    "part of a tower that forward leaves out": Sick(
        "MD121 warning", lambda: given(with_extra(), active=["T1"]), "T1.extra.bias...Freeze"
    ),
    "ZeRO on one rank, part of a tower that forward leaves out": Sick(
        "MD121 warning",
        lambda: zero(model=with_extra(), active=["T1"], has_groups=True),
        "get no gradient...T1.extra.bias...Freeze",
    ),
    "DDP, part of a tower that forward leaves out": Sick(
        "MD121 error", lambda: ddp(model=with_extra(), active=["T1"]), "finished reduction"
    ),
    "name that is misspelt in the map": Sick(
        "MD122 warning", lambda: with_names("dmri", ("T1", "dMRI")), "leaves dmri...dMRI.bias"
    ),
    "name that is misspelt in a tuple of the map": Sick(
        "MD122 warning", lambda: with_names("dMRI", ("T1", "dmri")), "T1-dmri...trunk.0.weight"
    ),
    "scale of a real gradient": Sick("MD132 warning", lambda: given(Model(), 1e-3), "0.001"),
    "scale below float16": Sick("MD133 warning", lambda: half(1e-8), "scale=1e-08...5.96"),
    "norm that is tight for float16": Sick(
        "MD135 warning", lambda: half(max_norm=0.1), "float16...max_norm=0.1...assumed"
    ),
    "norm that is tight for these gradients": Sick(
        "MD135 warning", lambda: with_gradients(10.0, max_norm=1.0), "gradients...total_norm=7"
    ),
    "scaler that float16 cannot take": Sick(
        "MD136 error", lambda: half(1e-4, scaler=2.0**32), "float16...factor=4.295e+09"
    ),
    "DDP, float16 on four ranks": Sick(
        "MD137 warning", lambda: on_ranks(4, torch.float16), "float16...4 ranks"
    ),
    "DDP, float16 on two ranks, accumulated": Sick(
        "MD137 warning",
        lambda: on_ranks(2, torch.float16, accumulation_steps=4),
        "accumulation_steps=4...no_sync()",
    ),
    "AdamW": Sick("MD141 warning", lambda: with_optimizer(AdamW), "AdamW...up to 0.9 ...dMRI"),
    "AdamW within another": Sick(
        "MD141 warning",
        lambda: around(AdamW),
        "Around...hold_inactive(wrapper, optimizer)...hold_inactive(wrapper, engine)",
    ),
    "AdamW after a step of a warm-up": Sick("MD141 warning", after_a_step, "AdamW...rates={T1: "),
    "ZeRO, no hold": Sick(
        "MD141 warning",
        lambda: zero(held=False),
        "AdamW...rates={T1: 0.9...hold_inactive(wrapper, engine)...own before",
    ),
    "ZeRO, no hold, state on NVMe": Sick("MD141 warning", zero_on_nvme, "refuses...on NVMe"),
    "ZeRO, no hold, another kind of optimizer": Sick(
        "MD142 info", zero_of_another_kind, "AdamW...single_partition_of_fp32_groups"
    ),
    "ZeRO, held, one parameter group": Sick(
        "MD144 info", zero, "step counters go on...modalities=[T1, rsfMRI, dMRI]"
    ),
    "hold that was removed": Sick("MD141 warning", removed_hold, "AdamW"),
    "hold of another wrapper": Sick("MD141 warning", hold_of_another_wrapper, "AdamW"),
    "FSDP2, between forward and backward": Sick(
        "MD142 info", lambda: held(sharded(""), ["T1"]), "AdamW...without `loss`"
    ),
    "LBFGS": Sick("MD142 info", lambda: with_optimizer(LBFGS), "LBFGS...TypeError...closure"),
    "optimizers within another": Sick(
        "MD142 info", lambda: around(AdamW, SGD), "Around...steps other optimizers"
    ),
    "optimizer for each tower, no gradients": Sick(
        "MD143 error", lambda: optimizer_for_each_tower(None), "SGD...No inf checks...scale=0.0"
    ),
}


# Setups in which it must find nothing.
HEALTHY: dict[str, Callable[[], Arguments]] = {
    "plain SGD": lambda: with_optimizer(SGD),
    "one tower for two modalities": tower_of_two,
    "AdamW, held": lambda: held(Model()),
    "AdamW within another, held": accelerated,
    "mixed precision, clipped and accumulated": mixed_precision,
    "no gradients, one optimizer": lambda: mixed_precision(None),
    "an optimizer for each tower": lambda: optimizer_for_each_tower(1e-7),
    "fusion of two": lambda: with_names("dMRI", ("T1", "dMRI")),
    "batch without a modality": lambda: without_modalities(with_optimizer(SGD)),
    "bfloat16, held": lambda: held(Model().to(torch.bfloat16), max_norm=0.1),
    "float16, scaled": lambda: half(scaler=2.0**16, max_norm=1.0),
    "float16, infinite norm": lambda: half(max_norm=torch.inf),
    "float64": lambda: given(Model().double(), max_norm=1e-3, accumulation_steps=64),
    "complex": lambda: given(with_towers(lambda: nn.Linear(3, 4, dtype=torch.cfloat))),
    "scale just below that of a real gradient": lambda: given(Model(), 9e-4),
    "scale 0.0": lambda: half(0.0, scaler=2.0**99, max_norm=1e-9),
    "checkpoint of the trunk": lambda: given(Checkpointed(), active=["rsfMRI"]),
    "sum of the totals of two batches": sum_of_totals,
    "all modalities at once": lambda: given(Model(), active=NAMES),
    "frozen tower": lambda: frozen(Model(), "towers.dMRI", ["T1"]),
    "weight of two towers": lambda: given(tied("towers.T1", "towers.dMRI")),
    "sparse table": lambda: given(sparse_table()),
    "sparse tables alone": lambda: given(
        with_towers(lambda: nn.Embedding(5, 4, sparse=True)).half(), 1e-30, scaler=2.0**99
    ),
    "one tower on another device": lambda: on_meta("T1", gradient_only=True),
    "values are not read": lambda: without_modalities(on_meta(*NAMES, gradient_only=True)),
    "compiled, three modalities": lambda: compiled(NAMES),
    "compiled towers, four modalities": compiled_towers,
    "DDP, static graph": lambda: ddp(static_graph=True),
    "DDP, static graph, scale 0.0": lambda: ddp(0.0, static_graph=True),
    "DDP, no gradients": lambda: optimizer_for_each_tower(None, in_ddp=True),
    "DDP, sparse table": lambda: ddp(model=sparse_table()),
    "DDP around a wrapped loss function": ddp_with_wrapped_loss,
    "DDP around the loss": lambda: ddp_with_loss_inside(True),
    "DDP around the trunk": ddp_around_the_trunk,
    "DDP that looks for unused parameters, attached": attached,
    "DDP, bfloat16 on many ranks": lambda: on_ranks(512, torch.bfloat16, accumulation_steps=8),
    "FSDP2, the whole model": lambda: given(sharded(""), active=["T1"]),
    "FSDP2, the whole model, held": lambda: held(sharded("")),
    "DTensor without FSDP2": with_dtensor,
    "ZeRO-1": lambda: engine(1),
    "ZeRO, held, a parameter group for each modality": lambda: zero(has_groups=True),
}


def needs_group(name: str) -> bool:
    """Whether a setup needs a process group, of one process and for the CPU."""
    return name.startswith(("DDP", "FSDP2", "DTensor", "ZeRO,", "ZeRO on"))
