"""Facts about the libraries around a model: torch, DDP, FSDP, DTensor, DeepSpeed, PEFT, Lightning.

This is the only file that reads private attributes of other libraries or knows the names that they
use internally. When a new release of one of them breaks something, the repair belongs here.
"""

import copy
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.utils import _python_dispatch
from torch.utils.checkpoint import checkpoint

from modaldummy._errors import UnsupportedEngineError

# --- Modules and tensors of torch ---------------------------------------------------------------

# A parameter of any other type is a tensor of a subclass, such as a DTensor.
PLAIN_TENSORS = (Tensor, nn.Parameter)
# A class of a parameter of a lazy module. `torch.nn.parameter.is_lazy` asks for it, but Dynamo does
# not trace that function.
Uninitialized = UninitializedTensorMixin
# Calls that torch has no public name for.
foreach_norm = torch._foreach_norm
# Context managers: subclasses of Tensor are handled like plain tensors, and modes that see each
# operation do not see any.
without_dispatch_modes = _python_dispatch._disable_current_modes
without_tensor_subclasses = torch._C.DisableTorchFunctionSubclass


_CHECKPOINT_CODE = inspect.unwrap(checkpoint).__code__


def running_checkpoint() -> FrameType | None:
    """The frame of the checkpoint that is running, None without one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _CHECKPOINT_CODE:
        frame = frame.f_back
    return frame


def is_reentrant(frame: FrameType) -> bool:
    """`use_reentrant` of a running checkpoint."""
    return bool(frame.f_locals["use_reentrant"])


def child_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Children of a module by name. `named_children` is slower, and this runs at each step."""
    return module._modules


def direct_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Parameters of a module without those of its children, by name; see `child_modules`."""
    return module._parameters


def module_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Buffers of a module without those of its children, by name; a change is one of the module."""
    return module._buffers


def forward_hooks(module: nn.Module) -> Iterable[Any]:
    """The forward hooks that are registered on a module."""
    return module._forward_hooks.values()


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; writing to `tensor.data` does not count."""
    return tensor._version


def num_stored_values(sparse: Tensor) -> int:
    """Number of explicit entries of a sparse tensor, without coalescing it."""
    return int(sparse._nnz())


def is_transformed() -> bool:
    """Whether `torch.compile` or `torch.func` runs the code, so that tensors have no values yet."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, in eager mode without its Python part.

    That part examines each argument for what only `torch.func` needs. With 300 tensors it takes
    longer than their sum.
    """
    if is_transformed():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for many, as under `torch.autograd.grad(is_grads_batched=True)`.

    That call vectorizes without a functorch level, so only the dispatch keys show it.
    """
    return is_transformed() or "Batched" in str(torch._C._dispatch_keys(gradient))


def function_of(node: Any) -> type | None:
    """The `torch.autograd.Function` subclass behind a node of an autograd graph, or None."""
    function: type | None = getattr(node, "_forward_cls", None)
    return function


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node of an autograd graph hides a part that backward computes again."""
    return "CheckpointFunction" in type(node).__name__


# --- torch.compile ------------------------------------------------------------------------------


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made the module, or `module.compile()` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def recompile_limit(module: nn.Module) -> int:
    """How many graphs Dynamo makes for a compiled module before it gives up."""
    from torch._dynamo import config

    context = getattr(module, "dynamo_ctx", None)
    limit = getattr(getattr(context, "callback", None), "_recompile_limit", None)
    return int(limit or config.recompile_limit)


# --- Names that libraries put into the path of a parameter ---------------------------------------

# Child names under which DDP, torch.compile, FSDP1, activation checkpointing and Fabric keep the
# module that they wrap.
WRAPPER_NAMES = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
# Fabric registers the wrapped module a second time under this name.
_FABRIC_ALIAS = "_original_module"
# PEFT puts these two around a whole model, always together.
PEFT_MODEL_NAMES = ("base_model", "model")
# PEFT keeps the module that an adapter replaced under one of the first two names, or inside of the
# layer that has the third.
_PEFT_REPLACED = ("base_layer", "original_module", "token_adapter")
# weight_norm, spectral_norm and pruning of `torch.nn.utils` rename a parameter with these endings.
_RENAMED_ENDINGS = ("_orig", "_g", "_v")


def num_wrapper_segments(path: list[str]) -> int:
    """How many segments at the start of a path belong to a wrapper: 0, 1 or 2."""
    if tuple(path[:2]) == PEFT_MODEL_NAMES:
        return 2
    return 1 if path[0] in (*WRAPPER_NAMES, _FABRIC_ALIAS) else 0


def wrapped_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules below `module` that take its place, such as `ddp.module`."""
    children = module._modules
    for name in WRAPPER_NAMES + _PEFT_REPLACED:
        if (child := children.get(name)) is not None:
            yield name, child
    outer = children.get(PEFT_MODEL_NAMES[0])
    if outer is not None and (inner := outer._modules.get(PEFT_MODEL_NAMES[1])) is not None:
        yield ".".join(PEFT_MODEL_NAMES), inner
    if (saved := children.get("modules_to_save")) is not None:
        for name, child in saved.named_children():
            yield f"modules_to_save.{name}", child


def adapters_beside(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the adapters, of any kind, that PEFT puts beside a `base_layer`."""
    names = getattr(module, "adapter_layer_names", ()) if name == "base_layer" else ()
    yield from ((n, child) for n in names if (child := module._modules.get(n)) is not None)


def parametrization_of(module: nn.Module, name: str) -> nn.Module | None:
    """What `torch.nn.utils.parametrize` computes a parameter of a module from, or None."""
    parametrizations = module._modules.get("parametrizations")
    return None if parametrizations is None else parametrizations._modules.get(name)


def renamed_parameters(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """What weight_norm, spectral_norm and pruning made of a parameter: new names and parameters.

    They leave the tensor that they compute in `module` under the old name.
    """
    if isinstance(vars(module).get(name), Tensor):
        for ending in _RENAMED_ENDINGS:
            if (parameter := module._parameters.get(name + ending)) is not None:
                yield name + ending, parameter


# --- DTensor, FSDP1 and FSDP2 -------------------------------------------------------------------


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    # By attribute: importing the DTensor class is slow, and a model without one does not need it.
    return type(parameter) not in PLAIN_TENSORS and hasattr(parameter, "to_local")


def local_shard(tensor: Any) -> Tensor:
    """The part of a DTensor that this rank stores; any other tensor unchanged."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


FSDP1_FLAT = (
    "FSDP1 has put parameters of the model into a flat parameter, which no modality owns alone. "
    "Pass `use_orig_params=True` to `FullyShardedDataParallel`."
)


def is_fsdp1_unit(module: nn.Module) -> bool:
    """Whether the module is a `FullyShardedDataParallel`."""
    return _is_of_fsdp(module, "FullyShardedDataParallel")


def is_fsdp1_parameter(parameter: Tensor) -> bool:
    """Whether it is a parameter that FSDP1 shards, as the shard of this rank.

    In forward, FSDP1 puts a whole tensor in its place, for which the answer is False.
    """
    return getattr(parameter, "_fsdp_flattened", False)


def is_flat_parameter(parameter: Tensor) -> bool:
    """Whether FSDP1 with `use_orig_params=False` put it in place of the parameters of a unit."""
    return getattr(parameter, "_is_flat_param", False)


def is_fsdp2_unit(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was called on the module."""
    return _is_of_fsdp(module, "FSDPModule")


def _is_of_fsdp(module: nn.Module, class_name: str) -> bool:
    # Code that shards has imported the class; importing it here would be slow.
    unit_class: Any = getattr(sys.modules.get("torch.distributed.fsdp"), class_name, ())
    return isinstance(module, unit_class)


def fsdp2_reshard_all(model: nn.Module) -> None:
    """Shard all parameters again that a forward pass without a backward pass has left whole."""
    for unit in filter(is_fsdp2_unit, model.modules()):
        unit.reshard()  # type: ignore[operator]


def fsdp2_reduces_unused(unit: nn.Module) -> bool:
    """Whether an FSDP2 unit reduces zeros for parameters without a gradient (torch 2.13)."""
    groups = _fsdp2_groups(_fsdp2_state(unit))
    return bool(groups) and all(
        getattr(group, "reduce_scatter_unused_params", False) for group in groups
    )


def fsdp2_reshards(unit: nn.Module, *, outermost: bool) -> bool:
    """Whether an FSDP2 unit shards its parameters again after forward.

    No public attribute says so. Where the private ones are missing, FSDP2's default is assumed.
    """
    state = _fsdp2_state(unit)
    if outermost and getattr(state, "_auto_reshard_after_forward", True):
        return False
    groups = _fsdp2_groups(state)
    if not groups:
        return not outermost
    return any(getattr(group, "post_forward_mesh_info", None) is not None for group in groups)


def _fsdp2_state(unit: Any) -> Any:
    return unit._get_fsdp_state() if hasattr(unit, "_get_fsdp_state") else None


def _fsdp2_groups(state: Any) -> list[Any]:
    # torch 2.8 has a single group under the second name.
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return [group for group in groups if group is not None]


# --- DeepSpeed ----------------------------------------------------------------------------------


def is_deepspeed_engine(module_class: type[nn.Module]) -> bool:
    """Whether a class is that of a DeepSpeed engine."""
    return hasattr(module_class, "zero_optimization_stage")


def zero_stage(engine: Any) -> int:
    """The ZeRO stage of a DeepSpeed engine, 0 for none."""
    return int(engine.zero_optimization_stage())


def is_zero_engine(module: Any) -> bool:
    """Whether a module is a DeepSpeed engine of ZeRO-1, 2 or 3."""
    return is_deepspeed_engine(type(module)) and 1 <= zero_stage(module) <= 3


def zero_overlaps_communication(engine: Any) -> bool:
    """Whether `overlap_comm` is on, with which ZeRO-1 reduces gradients as ZeRO-2 does."""
    return hasattr(engine, "zero_overlap_comm") and bool(engine.zero_overlap_comm())


def zero_reduces_once(engine: Any) -> bool:
    """Whether the code runs inside of `with engine.coalesce_grad_reduction():`.

    All gradients are then reduced at its end, in the order of the parameters.
    """
    optimizer = getattr(engine, "optimizer", None)
    return bool(getattr(optimizer, "_coalesce_grad_reduction", False))


ZERO3_REMEDY = (
    "Use ZeRO-1. Or give all ranks the same modalities at each step, for instance with "
    "`ModalityBatchSampler`, and compute the total and its backward pass inside `with "
    "deepspeed.zero.GatheredParameters(parameters):` for the parameters of all modalities. Or run "
    "all towers on every rank, inactive ones on an empty batch, and pass `wrapper.modalities` as "
    "the batch."
)


def is_zero3_parameter(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return "ds_id" in vars(parameter)


def is_zero_parameter(parameter: Tensor) -> bool:
    """Whether any stage of ZeRO steps a copy of the parameter and keeps its gradient to itself."""
    # Stage 3 sets the first attribute on parameters, stages 1 and 2 set the second.
    return not vars(parameter).keys().isdisjoint(("ds_id", "_hp_mapping"))


def has_zero3_elements(parameter: Tensor) -> bool:
    """Whether ZeRO-3 stores elements of a parameter, in the shards of all ranks."""
    return bool(getattr(parameter, "ds_numel", False))


class FlatRange(NamedTuple):
    """The part of a flat tensor that a parameter of the module has on this rank.

    Attributes:
        parameter: The parameter.
        start: Its first element in the flat tensor.
        stop: The element after its last.
    """

    parameter: nn.Parameter
    start: int
    stop: int


class FlatParameter(NamedTuple):
    """A tensor that the optimizer inside ZeRO steps: this rank's part of a group of parameters.

    Attributes:
        flat: The tensor.
        parameters: All parameters of the group, also those of which other ranks have all elements.
        ranges: Where those of this rank are.
    """

    flat: Tensor
    parameters: list[nn.Parameter]
    ranges: list[FlatRange]


def zero_flat_parameters(engine: Any) -> list[FlatParameter]:
    """The flat tensors of a DeepSpeed engine of ZeRO-1, 2 or 3, by group or sub-group.

    Raises:
        AttributeError: Its optimizer keeps them in another way.
    """
    zero = engine.optimizer
    if zero_stage(engine) == 3:
        return [
            FlatParameter(flat, group, [_zero3_range(zero, parameter) for parameter in group])
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        ]
    found = []
    for place, flat in enumerate(zero.single_partition_of_fp32_groups):
        size = zero.partition_size[place]
        first = size * dist.get_rank(zero.real_dp_process_group[place])
        # Not those of `bit16_groups`, which are in another order with `round_robin_gradients`.
        group = zero.round_robin_bit16_groups[place]
        offsets = zero.round_robin_bit16_offsets[place]
        ranges = []
        for parameter, offset in zip(group, offsets, strict=True):
            start = max(offset - first, 0)
            stop = min(offset - first + parameter.numel(), size)
            if start < stop:
                ranges.append(FlatRange(parameter, start, stop))
        found.append(FlatParameter(flat, group, ranges))
    return found


def zero_options(engine: Any) -> list[Mapping[str, Any]]:
    """Between steps: the learning rate and other options of each of `zero_flat_parameters`."""
    groups = zero_optimizer(engine).param_groups
    if zero_stage(engine) == 3:
        group_of = engine.optimizer.sub_group_to_group_id
        return [groups[group_of[place]] for place in range(len(group_of))]
    return list(groups)


def zero_optimizer(engine: Any) -> Any:
    """The optimizer inside ZeRO, which steps the flat tensors; None without one."""
    return getattr(getattr(engine, "optimizer", None), "optimizer", None)


def zero_elements(parameter: nn.Parameter) -> Tensor:
    """What this rank has of the values of a parameter that ZeRO steps, as a vector."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach().reshape(-1)
    # The parts of all ranks have one size, and the last ones end with padding.
    first = part.numel() * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    elements: Tensor = part.detach()[: max(parameter.ds_numel - first, 0)]  # type: ignore[attr-defined]
    return elements


def zero_swaps_state(engine: Any) -> bool:
    """Whether ZeRO-3 keeps the state of its optimizer on NVMe."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def _zero3_range(zero: Any, parameter: nn.Parameter) -> FlatRange:
    _, start, length = zero.grad_position[zero.get_param_id(parameter)]
    return FlatRange(parameter, start, start + length)


# --- GradScaler and optimizers ------------------------------------------------------------------


def has_unscaled(scaler: Any) -> bool:
    """Whether a `torch.amp.GradScaler` has unscaled the gradients of an optimizer already."""
    states = getattr(scaler, "_per_optimizer_states", {}).values()
    return any(getattr(state.get("stage"), "name", "READY") != "READY" for state in states)


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides gradients by the loss scale itself, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def copy_settings(optimizer: Optimizer) -> Optimizer:
    """A new optimizer with the settings of another, but without its parameters, state and hooks.

    Where settings contain parameters, those of the copy contain an empty tensor in their place.
    """
    settings = {
        name: value
        for name, value in vars(optimizer).items()
        # A learning rate schedule replaces `step` by one that is bound to the optimizer itself.
        if name not in ("step", "state", "param_groups") and not name.startswith("_optimizer_")
    }
    copied = object.__new__(type(optimizer))
    memo = {id(p): torch.empty(0) for group in optimizer.param_groups for p in group["params"]}
    settings = copy.deepcopy(settings, memo)
    copied.__setstate__(settings | {"state": defaultdict(dict), "param_groups": []})
    return copied


def step_alone(optimizer: Optimizer) -> None:
    """Take a step that calls no step hooks, and that fails if it needs the default process group.

    Users may have registered step hooks for all optimizers.
    """
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)(optimizer)
    finally:
        dist.group.WORLD = world


# --- Lightning ----------------------------------------------------------------------------------


def lightning_logs_this_step(trainer: Any) -> bool:
    """Whether Lightning's Trainer hands metrics to its loggers at this step."""
    return bool(trainer.loggers and trainer._logger_connector.should_update_logs)


def lightning_logged_step(trainer: Any) -> int:
    """The step number under which Lightning logs what `self.log` got in this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


# --- DistributedDataParallel --------------------------------------------------------------------


@dataclass(frozen=True)
class EngineConflict:
    """Why an engine, as it is set up, does not go together with what is asked of it.

    Attributes:
        message: What the engine does, and what the user sees.
        remedy: What to do about it.
    """

    message: str
    remedy: str


DDP_MARKS_TWICE = EngineConflict(
    "DDP with find_unused_parameters=True marks the parameters of inactive modalities as ready "
    "after forward. The dummy term is added outside of DDP's forward and marks them again, so that "
    "DDP stops with 'Expected to mark a variable ready only once'.",
    "Pass find_unused_parameters=False, which the dummy term makes unnecessary; or "
    "static_graph=True, with a scale that is not None; or compute the loss inside of the module "
    "that DDP wraps, with the wrapper as an attribute of it; or make the wrapper with the module "
    "inside, `ddp.module`, and call `attach_to_outputs(wrapper, ddp)`.",
)
DDP_NEVER_REDUCES = EngineConflict(
    "With scale=None, DDP with static_graph=True never reduces the gradients of a modality that "
    "was inactive on every rank at the first step, so that ranks silently train different weights.",
    "Use scale=0.0.",
)


def ddps_around(
    modules: Iterable[nn.Module], parameter_ids: Iterable[int]
) -> list[DistributedDataParallel]:
    """Those of `modules` that are DDP around a parameter whose `id` is in `parameter_ids`."""
    wanted = set(parameter_ids)
    ddps = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return [ddp for ddp in ddps if not wanted.isdisjoint(map(id, ddp.parameters()))]


def ddp_conflict(
    ddp: DistributedDataParallel, scale: float | None, *, dummy_inside: bool
) -> EngineConflict | None:
    """Why DDP does not support the dummy term, or None.

    Args:
        ddp: DDP around a parameter of the map.
        scale: The scale of the wrapper.
        dummy_inside: Whether the graph of DDP's output contains the parameters of all modalities.
    """
    if ddp.static_graph:
        return DDP_NEVER_REDUCES if scale is None else None
    return DDP_MARKS_TWICE if ddp.find_unused_parameters and not dummy_inside else None


def check_ddps(
    ddps: list[DistributedDataParallel], scale: float | None, *, dummy_inside: bool = False
) -> None:
    """Refuse DDP that does not support the dummy term; the arguments are as for `ddp_conflict`.

    Raises:
        UnsupportedEngineError: One of `ddps` does not.
    """
    for ddp in ddps:
        if (conflict := ddp_conflict(ddp, scale, dummy_inside=dummy_inside)) is not None:
            raise UnsupportedEngineError(f"{conflict.message} {conflict.remedy}")
