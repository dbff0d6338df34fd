"""What goes wrong under an engine that shards parameters if ranks have different modalities."""

from dataclasses import dataclass

from modaldummy._engines import ZERO3_REMEDY


@dataclass(frozen=True)
class EngineConflict:
    """Why ranks with different modalities and a sharding engine do not go together.

    Attributes:
        message: What the engine does, and what the user sees.
        remedy: What to do about it.
    """

    message: str
    remedy: str


def _one_of(*remedies: str) -> str:
    """Join clauses to sentences such as `Do this. Or do that.`."""
    text = ". Or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."


# What the user sees.
_GATHERS_MISMATCH = (
    "If ranks have different modalities, their all-gathers do not match: the result is silently "
    "wrong or the job hangs."
)
_GRADIENTS_MIX = (
    "If ranks have different modalities, the engine adds up gradients of different parameters: "
    "the result is silently wrong"
)

# What the user can do, as clauses for `_one_of`.
_SAME_MODALITIES = (
    "give all ranks the same modalities at each step, for instance with `ModalityBatchSampler`"
)
_SHARD_ALL = "call `fully_shard` only on the whole model, with its default `reshard_after_forward`"
_REDUCE_ZEROS = "call `set_reduce_scatter_unused_params(True)`, which needs torch 2.13"
_REDUCE_ONCE = "run `check_ranks`, forward and backward in `with engine.coalesce_grad_reduction():`"
_RUN_ALL_TOWERS = (
    "run all towers on every rank, inactive ones on an empty batch, and pass `wrapper.modalities`"
)

FSDP2_TOWER_UNIT = EngineConflict(
    f"These parameters are in their own FSDP2 unit. {_GATHERS_MISMATCH}",
    _one_of(_SAME_MODALITIES, _SHARD_ALL, f"{_RUN_ALL_TOWERS} to `check_ranks`"),
)
FSDP2_RESHARDED = EngineConflict(
    "FSDP2 has resharded these parameters before the dummy term is computed. Its reduce-scatter "
    f"leaves out parameters that forward did not use. {_GRADIENTS_MIX} or the job hangs.",
    _one_of(_SAME_MODALITIES, _SHARD_ALL, _REDUCE_ZEROS),
)
FSDP2_SCALE_NONE = EngineConflict(
    "With scale=None, FSDP2 leaves inactive parameters out of its reduce-scatter. "
    f"{_GRADIENTS_MIX} or the job hangs.",
    _one_of("use scale=0.0", _REDUCE_ZEROS, _SAME_MODALITIES),
)
ZERO1_SCALE_NONE = EngineConflict(
    "With scale=None, ZeRO-1 leaves inactive parameters out of its buckets. "
    f"{_GRADIENTS_MIX} or the job hangs.",
    _one_of("use scale=0.0", _SAME_MODALITIES),
)
ZERO2_BUCKET_ORDER = EngineConflict(
    "ZeRO-2, like ZeRO-1 with `overlap_comm`, fills its buckets in the order in which gradients "
    f"arrive. {_GRADIENTS_MIX}.",
    _one_of(_SAME_MODALITIES, "use ZeRO-1 without `overlap_comm`", _REDUCE_ONCE),
)
ZERO2_SCALE_NONE = EngineConflict(
    "With scale=None, backward under ZeRO-2, as under ZeRO-1 with `overlap_comm`, stops at the "
    "first inactive parameter, even if all ranks have the same modalities.",
    _one_of(f"use scale=0.0, and {_SAME_MODALITIES}", "use ZeRO-1 without `overlap_comm`"),
)
ZERO_STAGE_UNKNOWN = EngineConflict(
    "DeepSpeed has partitioned these parameters, and only its engine knows the ZeRO stage. Under "
    "ZeRO-2, ranks with different modalities silently add up gradients of different parameters.",
    "Pass `model=engine`.",
)
ZERO3 = EngineConflict(
    f"ZeRO-3 gathers each parameter when forward needs it. {_GATHERS_MISMATCH} Outside of forward "
    "the parameters are empty, and backward stops at a dummy term.",
    ZERO3_REMEDY,
)
DTENSOR = EngineConflict(
    "These parameters are DTensors, which the ranks of a mesh share. If these ranks have different "
    "modalities, the result is silently wrong or the job hangs.",
    "Give all ranks of a mesh the same batch. If only these ranks have to agree, pass `group=`. If "
    "FSDP2 shards a module around the model of the wrapper, pass that module as `model=`.",
)
