"""Trainings that `preflight` has something to say about, and trainings that are in order."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, AdamW

from tests.holding import NAMES
from tests.preflight_builders import (
    Arguments,
    accelerated,
    after_a_step,
    compiled,
    compiled_towers,
    ddp,
    ddp_and_held,
    ddp_below,
    ddp_with_loss_inside,
    ddp_with_optimizers,
    ddp_with_sparse_tables,
    ddp_with_unused_part,
    ddp_with_unused_trunk,
    ddp_with_wrapped_loss,
    detached,
    engine,
    frozen_tower,
    held,
    hold_of_another_wrapper,
    left_out,
    mixed_precision,
    of_another_model,
    on_meta,
    on_ranks,
    one_optimizer,
    optimizer_for_each_tower,
    real_loss,
    removed_hold,
    sharded_after_the_optimizer,
    sharded_and_held,
    two_held,
    unused_part,
    warming_up,
    with_dtype,
    with_fusion,
    with_gains,
    with_gradients,
    with_loss,
    with_optimizer,
    with_scale,
    with_value,
    without_modalities,
)
from tests.preflight_models import (
    FOUR,
    Adapted,
    Around,
    Checkpointed,
    Model,
    mapped,
    sharded,
    sparse_tables,
    tied,
    with_head,
    with_towers,
)

# The codes that `preflight` finds, no more and no less, and what makes its arguments.
SICK: dict[str, tuple[set[str], Callable[[], Arguments]]] = {
    "DDP that looks for unused parameters": ({"MD101"}, lambda: ddp(find_unused_parameters=True)),
    "the same below torch.compile": ({"MD101"}, lambda: ddp_below(find_unused_parameters=True)),
    "static graph without gradients": ({"MD102"}, lambda: ddp(None, static_graph=True)),
    "sparse table without gradients in DDP": (
        {"MD103", "MD119"},
        lambda: ddp_with_sparse_tables(None),
    ),
    "FSDP2, each tower by itself": (
        {"MD104"},
        lambda: {"wrapper": mapped(sharded("towers.T1", "towers.rsfMRI", "towers.dMRI", ""))},
    ),
    "FSDP2, one tower and no root": ({"MD104"}, lambda: {"wrapper": mapped(sharded("towers.T1"))}),
    "FSDP2, a root that reshards": (
        {"MD104"},
        lambda: {"wrapper": mapped(sharded("", reshard_after_forward=True))},
    ),
    "ZeRO-2": ({"MD105"}, lambda: engine(2)),
    "ZeRO-3": ({"MD106"}, lambda: engine(3)),
    "compiled, four modalities": ({"MD107"}, lambda: compiled(FOUR)),
    "compiled in place, four modalities": ({"MD107"}, lambda: compiled(FOUR, in_place=True)),
    "head that no batch uses": ({"MD111"}, lambda: with_loss(with_head(), "T1")),
    "the same in DDP": ({"MD111"}, ddp_with_unused_trunk),
    "real loss in place of the total": ({"MD121"}, real_loss),
    "part of a tower that forward leaves out": ({"MD121"}, unused_part),
    "the same in DDP, part of a tower": ({"MD121"}, ddp_with_unused_part),
    "head that no optimizer has": ({"MD112"}, left_out),
    "optimizer made before sharding": ({"MD112"}, sharded_after_the_optimizer),
    "frozen tower": ({"MD113"}, frozen_tower),
    "NaN in a tower": ({"MD114"}, lambda: with_value(float("nan"))),
    "infinity in a tower": ({"MD114"}, lambda: with_value(float("-inf"))),
    "all towers on meta": ({"MD115"}, lambda: on_meta(*NAMES)),
    "one tower on another device": ({"MD116"}, lambda: on_meta("T1", gradient_only=True)),
    "loss on another device": (
        {"MD116"},
        lambda: without_modalities(on_meta(*NAMES, gradient_only=True)),
    ),
    "weight of two towers": (
        {"MD117"},
        lambda: {"wrapper": mapped(tied("towers.T1", "towers.dMRI"))},
    ),
    "one tower for two modalities": (
        {"MD117"},
        lambda: {"wrapper": mapped(tied("towers.T1", "towers.dMRI", whole=True))},
    ),
    "weight of a tower and the trunk": (
        {"MD118"},
        lambda: {"wrapper": mapped(tied("towers.T1", "trunk"))},
    ),
    "sparse table": ({"MD119"}, lambda: {"wrapper": mapped(sparse_tables())}),
    "loss made of a number": ({"MD120"}, detached),
    "loss of another model": ({"MD120"}, of_another_model),
    "scale 0.0": ({"MD131"}, lambda: with_scale(0.0)),
    "scale of a real gradient": ({"MD132"}, lambda: with_scale(1e-3, max_fraction=None)),
    "scale below float16": ({"MD133"}, lambda: with_dtype(torch.float16, 1e-8)),
    "sum that is large": ({"MD134"}, lambda: with_gains(600)),
    "sum that is large for the last loss": ({"MD134"}, lambda: after_a_step(0.5)),
    "norm that is tight for float16": (
        {"MD135"},
        lambda: with_dtype(torch.float16, max_norm=0.1),
    ),
    "norm that is tight for these gradients": (
        {"MD135"},
        lambda: with_gradients(10.0, max_norm=1.0),
    ),
    "scaler that float16 cannot take": (
        {"MD136"},
        lambda: with_dtype(torch.float16, 1e-4, scaler=2.0**32),
    ),
    "float16 on four ranks": ({"MD137"}, lambda: on_ranks(4, torch.float16)),
    "float16 on two ranks, accumulated": (
        {"MD137"},
        lambda: on_ranks(2, torch.float16, accumulation_steps=4),
    ),
    "AdamW": ({"MD141"}, lambda: with_optimizer(AdamW)),
    "AdamW within another": (
        {"MD141"},
        lambda: with_optimizer(lambda params, lr: Around(AdamW(params, lr))),
    ),
    "hold that was removed": ({"MD141"}, removed_hold),
    "hold of another wrapper": ({"MD141"}, hold_of_another_wrapper),
    "FSDP2, between forward and backward": ({"MD142"}, lambda: sharded_and_held(forward=True)),
    "LBFGS": ({"MD142"}, lambda: with_optimizer(torch.optim.LBFGS)),
    "optimizer for each tower, no gradients": ({"MD143"}, lambda: optimizer_for_each_tower(None)),
}


# Those on which it must find nothing at all.
HEALTHY: dict[str, Callable[[], Arguments]] = {
    "plain SGD": lambda: with_optimizer(SGD),
    "AdamW, held": lambda: held(Model()),
    "Adam for towers and trunk, one held": two_held,
    "AdamW within another, held": accelerated,
    "mixed precision, clipped and accumulated": mixed_precision,
    "no gradients, one optimizer": lambda: one_optimizer(None),
    "an optimizer for each tower": lambda: optimizer_for_each_tower(1e-7),
    "fusion of two": with_fusion,
    "batch without a modality": lambda: without_modalities(with_optimizer(SGD)),
    "bfloat16, held": lambda: held(Model().to(torch.bfloat16)) | {"max_norm": 0.1},
    "float16, scaled": lambda: with_dtype(torch.float16, scaler=2.0**16, max_norm=1.0),
    "float64": lambda: with_dtype(torch.float64, max_norm=1e-3, accumulation_steps=64),
    "complex": lambda: {
        "wrapper": mapped(with_towers(lambda: nn.Linear(3, 4, dtype=torch.cfloat)))
    },
    "adapters": lambda: with_loss(with_towers(Adapted), "T1"),
    "weight norm": lambda: with_loss(with_towers(lambda: weight_norm(nn.Linear(3, 4))), "dMRI"),
    "checkpoint of the trunk": lambda: with_loss(Checkpointed(), "rsfMRI"),
    "warm-up from a rate of 0": warming_up,
    "all modalities at once": lambda: with_loss(Model(), *NAMES),
    "gains of norms": lambda: with_gains(100),
    "values are not read": lambda: on_meta(*NAMES, gradient_only=True),
    "compiled, three modalities": lambda: compiled(NAMES),
    "compiled towers, four modalities": compiled_towers,
    "DDP, held": ddp_and_held,
    "DDP, static graph": lambda: ddp(static_graph=True),
    "DDP around a wrapped loss function": ddp_with_wrapped_loss,
    "DDP around the loss": lambda: ddp_with_loss_inside(find_unused_parameters=True),
    "DDP, no gradients": ddp_with_optimizers,
    "bfloat16 on many ranks": lambda: on_ranks(512, torch.bfloat16, accumulation_steps=8),
    "FSDP2, the whole model": lambda: with_loss(sharded(""), "T1"),
    "FSDP2, the whole model, held": sharded_and_held,
    "ZeRO-1": lambda: engine(1),
}

# Those that need a process group, of one process and for the CPU.
NEEDS_GROUP = {
    "DDP that looks for unused parameters",
    "the same below torch.compile",
    "static graph without gradients",
    "sparse table without gradients in DDP",
    "the same in DDP",
    "the same in DDP, part of a tower",
    "optimizer made before sharding",
    "float16 on four ranks",
    "float16 on two ranks, accumulated",
    "bfloat16 on many ranks",
    *(name for name in [*SICK, *HEALTHY] if name.startswith(("DDP", "FSDP2"))),
}
