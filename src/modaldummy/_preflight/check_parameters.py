"""Checks of the values of parameters, and of the keys that own them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from modaldummy._core.parameter_map import text_of
from modaldummy._engines import PLAIN_TENSORS, local_shard
from modaldummy._findings import Finding
from modaldummy._ownership import shared_with_trunk
from modaldummy._preflight.setup import Setup


def check_parameters(setup: Setup) -> Iterator[Finding]:
    """MD114, MD115, MD117 and MD118."""
    yield from _check_values_finite(setup)
    yield from _check_values_loaded(setup)
    yield from _check_keys_own_something_alone(setup)
    yield from _check_shared_with_trunk(setup)


def _check_values_finite(setup: Setup) -> Iterator[Finding]:
    names = [name for p, name in setup.names.items() if not _is_finite(local_shard(p))]
    if names:
        yield Finding(
            "MD114",
            "error",
            "Values of these parameters are NaN or infinite, and so is each loss that uses them.",
            {"parameters": names},
            "Load or initialize them again.",
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; True if there are none, or only another library reads them."""
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided:
        return True
    inexact = tensor.is_floating_point() or tensor.is_complex()
    if not inexact or tensor.is_meta or not tensor.numel():
        return True
    wide = tensor.float() if tensor.dtype.itemsize < 2 else tensor  # float8 has no norm
    # `isfinite` of all elements would take twice the memory of the parameter.
    return bool(torch.linalg.vector_norm(wide, math.inf).isfinite())


def _check_values_loaded(setup: Setup) -> Iterator[Finding]:
    loss_on_meta = setup.loss is not None and setup.loss.is_meta
    names = [owned.name for owned in setup.modality_parameters.values() if owned.parameter.is_meta]
    if names and setup.wrapper.reads_parameters and not loss_on_meta:
        yield Finding(
            "MD115",
            "error",
            "The wrapper raises an error when it adds the dummy term, because these modality "
            "parameters are on the meta device and have no values.",
            {"parameters": names},
            "Load the model before training, or pass `gradient_only=True`, which reads no values.",
        )


def _check_keys_own_something_alone(setup: Setup) -> Iterator[Finding]:
    paths = setup.wrapper.parameters.paths
    trainable = {i: keys for i, keys in setup.owners.items() if i in setup.modality_parameters}
    # Keys with the same paths are several modalities of one tower, such as images and videos.
    shared = {i: ks for i, ks in trainable.items() if len({frozenset(paths[k]) for k in ks}) > 1}
    with_own = {key for i, keys in trainable.items() if i not in shared for key in keys}
    without_own = [text_of(key) for key in setup.keys_of(shared) if key not in with_own]
    if without_own:
        owned_by_id = setup.wrapper.parameters.all()
        yield Finding(
            "MD117",
            "warning",
            "Several keys of the map own these parameters, which get no dummy gradient while any "
            "of the keys is active, and nothing else that is trainable belongs to "
            f"{', '.join(without_own)}.",
            {
                "parameters": {
                    owned_by_id[i].name: list(map(text_of, keys)) for i, keys in shared.items()
                },
                "without_own": without_own,
            },
            "Nothing to do if they are shared on purpose. Give a module that several modalities "
            "use together to a tuple of them.",
        )


def _check_shared_with_trunk(setup: Setup) -> Iterator[Finding]:
    if names := setup.names_of(shared_with_trunk(setup.wrapper.parameters)):
        yield Finding(
            "MD118",
            "warning",
            "These modality parameters are also used outside of the map, so they get a dummy "
            "gradient on top of the real one while their modality is inactive.",
            {"parameters": names},
            "Leave them out of the map, because the real loss reaches them at each step.",
        )
