"""A parameter that a modality owns, and whether a dummy gradient can reach it."""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from torch import nn

from modaldummy._engines import Uninitialized, direct_parameters
from modaldummy._errors import ParameterMapError

# The fields of an `OwnedParameter` as a plain tuple. A step makes one for each parameter of the
# map; plain tuples are faster to make and no work for Python's garbage collector.
ParameterEntry: TypeAlias = tuple[str, nn.Parameter, nn.Module]
# A module and the name of a direct parameter of it. An engine may put other tensors there.
ParameterSlot: TypeAlias = tuple[nn.Module, str]


class OwnedParameter(NamedTuple):
    """A parameter that the map gives to a modality, as the model is now.

    Attributes:
        name: Its present full name, with the segments of wrappers such as DDP.
        parameter: The parameter itself.
        module: The module that it is a direct parameter of.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module


def slot_of(entry: ParameterEntry) -> ParameterSlot:
    """Where a parameter is."""
    name, _, module = entry
    return module, name.rpartition(".")[2]


def is_sparse_table(entry: ParameterEntry) -> bool:
    """Whether a parameter is the weight of an embedding that makes sparse gradients."""
    _, parameter, module = entry
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or not module.sparse:
        return False
    # A subclass may have further parameters.
    return parameter is direct_parameters(module).get("weight")


def check_connectable(entries: Iterable[ParameterEntry], where: str) -> None:
    """Refuse trainable parameters that can get no gradient.

    Raises:
        ParameterMapError: A parameter belongs to a lazy module that has not run yet, or autograd
            cannot add gradients in its dtype. The text begins with `where`.
    """
    for name, parameter, _ in entries:
        if isinstance(parameter, Uninitialized):
            raise ParameterMapError(
                f"{where}: the parameter {name!r} of a lazy module is not initialized, so that no "
                "gradient can fit it. Run one forward pass with each modality before training."
            )
        if parameter.dtype.itemsize < 2:
            raise ParameterMapError(
                f"{where}: the parameter {name!r} is trainable and has dtype {parameter.dtype}, in "
                "which autograd cannot add gradients. Keep trainable weights in torch.bfloat16 or "
                "wider and cast them in forward, or freeze this one with `requires_grad_(False)`."
            )
