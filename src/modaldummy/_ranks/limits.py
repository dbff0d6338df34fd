"""What ranks with different modalities do to engines that split parameters, in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What ranks with different modalities do to an engine, and what to do about it."""

    message: str
    remedy: str


_SAME = "all ranks the same modalities at each step, as `ModalityBatchSampler` does"
_WHOLE = "call `fully_shard` on the whole model alone, with its default of `reshard_after_forward`"
_ONCE = (
    "call `check_ranks`, forward and backward inside of `with engine.coalesce_grad_reduction():`"
)
_ZEROS = "call `set_reduce_scatter_unused_params(True)`, which torch 2.13 has"
_MIXED = "ranks with different modalities mix gradients of different parameters"

GATHERED = Limit(
    "FSDP2 gathers these modality parameters apart from those of other modalities, so that ranks "
    "with different modalities pair up gathers of different ones and get wrong numbers without a "
    "word, or stop.",
    f"Give {_SAME}; or {_WHOLE}; or run all towers on every rank, absent ones on an empty batch, "
    "and pass `wrapper.modalities` to `check_ranks`.",
)
RESHARDED = Limit(
    "FSDP2 has these modality parameters back in shards when the dummy term is computed, and "
    f"leaves what forward did not use out of its reduction, so that {_MIXED}, or stop.",
    f"Give {_SAME}; or {_WHOLE}; or {_ZEROS}.",
)
SKIPPED = Limit(
    "With scale=None, FSDP2 leaves inactive modality parameters out of its reduction, so that "
    f"{_MIXED}, or stop.",
    f"Use scale=0.0; or {_ZEROS}; or give {_SAME}.",
)
BY_ARRIVAL = Limit(
    "ZeRO-2, like ZeRO-1 with `overlap_comm`, fills its buckets in the order in which gradients "
    f"arrive, so that {_MIXED} without a word.",
    f"Give {_SAME}; or use ZeRO-1 without `overlap_comm`; or {_ONCE}.",
)
STOPPING = Limit(
    "With scale=None, backward under ZeRO-2, as under ZeRO-1 with `overlap_comm`, stops at the "
    "first inactive modality parameter, whatever other ranks hold.",
    f"Use scale=0.0, and give {_SAME}; or use ZeRO-1 without `overlap_comm`.",
)
LEFT_OUT = Limit(
    "With scale=None, ZeRO-1 leaves inactive modality parameters out of its buckets, so that "
    f"{_MIXED}, or stop.",
    f"Use scale=0.0; or give {_SAME}.",
)
UNTOLD = Limit(
    "DeepSpeed has partitioned these modality parameters, and only its engine tells whether by "
    f"ZeRO-2, under which {_MIXED} without a word.",
    "Pass `model=engine`.",
)
ZERO_3 = Limit(
    "ZeRO-3 gathers parameters as forward comes to them, which pairs up different ones where ranks "
    "have different modalities, and leaves them empty outside of forward, where backward stops at "
    "a dummy term.",
    f"Use ZeRO-1; or give {_SAME}, and compute the total and backward inside of "
    "`with deepspeed.zero.GatheredParameters(parameters):`, given the parameters of all "
    "modalities; or run all towers on every rank, absent ones on an empty batch, and pass "
    "`wrapper.modalities` as the batch.",
)
SPLIT = Limit(
    "These modality parameters are DTensors, on whose parts the ranks of a mesh work together, so "
    "that different modalities on them give wrong numbers without a word, or stop.",
    "Give the ranks of one mesh the same batch, and if only these have to agree, pass `group=`; if "
    "FSDP2 shards a module around the model of the wrapper, pass that as `model=`.",
)
