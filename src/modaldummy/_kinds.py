"""Which kinds of parameter a dummy gradient can reach, and through what it reaches them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from modaldummy._errors import ParameterMapError, UnsupportedEngineError
from modaldummy._paths import Located

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def check_dtype(located: Located, key: object) -> None:
    """Refuse a trainable parameter whose gradients autograd cannot add up.

    Raises:
        ParameterMapError: The dtype is narrower than 16 bits.
    """
    name, parameter, _ = located
    if parameter.dtype.itemsize < 2 and parameter.requires_grad:
        raise ParameterMapError(
            f"`modality_param_map[{key!r}]`: the parameter {name!r} is trainable and of dtype "
            f"{parameter.dtype}, in which autograd cannot add up gradients; keep trainable weights "
            "in torch.bfloat16 or wider and cast them in forward, or freeze this one with "
            "`requires_grad_(False)`."
        )


def check_reachable(located: Located, key: object) -> None:
    """Refuse what `check_dtype` refuses, and what no forward pass has given a shape yet.

    Raises:
        ParameterMapError: The dtype is too narrow, or the parameter of a lazy module uninitialised.
    """
    name, parameter, _ = located
    # `is_lazy` asks the same, but Dynamo does not trace it; the subclasses are slow to ask.
    if isinstance(parameter, UninitializedTensorMixin):
        raise ParameterMapError(
            f"`modality_param_map[{key!r}]`: the parameter {name!r} of a lazy module is not "
            "initialised, so that no gradient can fit it; run one forward pass with each modality "
            "before training."
        )
    check_dtype(located, key)


def check_readable(parameters: Iterable[Located], device: torch.device) -> None:
    """Refuse parameters without values, unless the loss on `device` has none either.

    Raises:
        ParameterMapError: A parameter is on the meta device and the loss is not.
    """
    for name, parameter, _ in parameters:
        if parameter.is_meta and device.type != "meta":
            raise ParameterMapError(
                f"The parameter {name!r} of an inactive modality is on the meta device and has no "
                f"values to add to a loss on {device}; load the model before training, or pass "
                "`gradient_only=True`, which reads none."
            )


def check_gathered(parameters: Iterable[Located]) -> None:
    """Refuse parameters that ZeRO-3 has emptied, so that no gradient can have their shape.

    Raises:
        UnsupportedEngineError: A parameter has no elements now, and DeepSpeed knows of some.
    """
    for name, parameter, _ in parameters:
        if not parameter.numel() and getattr(parameter, "ds_numel", False):
            raise UnsupportedEngineError(
                f"ZeRO-3 keeps the parameter {name!r} of an inactive modality in parts, so that no "
                "dummy gradient can have its shape. Where all ranks hold the same modalities, "
                "compute the total and backward inside of "
                "`with deepspeed.zero.GatheredParameters(parameters):`, given the parameters of "
                "all modalities. Or run every tower on every rank, absent ones on an empty batch, "
                "and pass `wrapper.modalities` as the batch. Or use ZeRO-1."
            )


def is_sparse_table(located: Located) -> bool:
    """Whether the parameter is the table of an embedding that makes sparse gradients."""
    _, parameter, owner = located
    if not isinstance(owner, _EMBEDDINGS) or not owner.sparse:
        return False
    return parameter is owner._parameters.get("weight")  # not what a subclass adds to it


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    # By name: the DTensor class is slow to import, and a model without one has no use for it.
    return hasattr(parameter, "to_local")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO steps a copy of it, and keeps its gradient to itself."""
    # What stage 3, and stages 1 and 2, leave on parameters.
    return not vars(parameter).keys().isdisjoint(("ds_id", "_hp_mapping"))


def local_shard(tensor: Any) -> Tensor:
    """What this rank has of a DTensor; any other tensor as it is."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


def reached(located: Located) -> Tensor:
    """The part of a parameter that the dummy term sums up and hands a gradient.

    A DTensor is reached through its local shard, which takes no communication. The table of a
    sparse embedding is reached through a selection of none of its rows: it contributes nothing,
    and its gradient is sparse and empty, as an optimizer such as `torch.optim.SparseAdam` wants
    it. Anything else is reached as it is.
    """
    _, parameter, _ = located
    shard = local_shard(parameter)
    if is_sparse_table(located):
        nothing = torch.empty(0, dtype=torch.long, device=shard.device)
        return nn.functional.embedding(nothing, shard, sparse=True)
    return shard
