"""Checks of the values of parameters, and of the keys that own them."""

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modaldummy._core.parameter_map import text_of
from modaldummy._engines import local_shard
from modaldummy._findings import Finding
from modaldummy._ownership import shared_with_trunk
from modaldummy._preflight.setup import Setup, has_values


def check_parameters(setup: Setup) -> Iterator[Finding]:
    """MD113 to MD119."""
    yield from _check_frozen_modalities(setup)
    yield from _check_values_finite(setup)
    yield from _check_values_loaded(setup)
    yield from _check_devices(setup)
    yield from _check_shared_by_keys(setup)
    yield from _check_shared_with_trunk(setup)
    yield from _check_sparse_tables(setup)


def _check_frozen_modalities(setup: Setup) -> Iterator[Finding]:
    trainable_keys = setup.keys_of(setup.modality_parameters)
    keys = [text_of(key) for key in setup.owned_by_key if key not in trainable_keys]
    if keys:
        yield Finding(
            "MD113",
            "info",
            f"All parameters of {', '.join(keys)} are frozen, so they get no dummy gradient.",
            {"modalities": keys},
            "Nothing to do if this is intended; once unfrozen, they get dummy gradients.",
        )


def _check_values_finite(setup: Setup) -> Iterator[Finding]:
    shards_by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in setup.named_parameters.values():
        if not has_values(parameter):
            continue
        shard = local_shard(parameter)
        if _can_be_nan(shard) and shard.numel():
            shards_by_device.setdefault(shard.device, {})[name] = shard
    not_finite: list[str] = []
    for shards in shards_by_device.values():
        # Stacked, because each `tolist` synchronizes with the device.
        finite = [_largest_absolute_value(shard).isfinite() for shard in shards.values()]
        checked = zip(shards, torch.stack(finite).tolist(), strict=True)
        not_finite += [name for name, is_finite in checked if not is_finite]
    if not_finite:
        yield Finding(
            "MD114",
            "error",
            "Values of these parameters are NaN or infinite, and so is each loss that uses them.",
            {"parameters": not_finite},
            "Load or initialize them again.",
        )


def _can_be_nan(tensor: Tensor) -> bool:
    """Whether it is a plain dense tensor of torch, with a dtype that has NaN."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return type(tensor) in (Tensor, nn.Parameter) and inexact and tensor.layout is torch.strided


def _largest_absolute_value(tensor: Tensor) -> Tensor:
    wide = tensor.float() if tensor.dtype.itemsize < 2 else tensor  # float8 has no norm
    largest: Tensor = torch.linalg.vector_norm(wide, math.inf)
    return largest


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


def _check_devices(setup: Setup) -> Iterator[Finding]:
    counts = Counter(str(owned.parameter.device) for owned in setup.modality_parameters.values())
    loss_device = None if setup.loss is None else str(setup.loss.device)
    if len({*counts, loss_device} - {None}) > 1:
        yield Finding(
            "MD116",
            "info",
            "Each step copies a number between devices, because modality parameters and the loss "
            "are not all on one device.",
            {"parameters": dict(counts), "loss": loss_device},
            "Nothing to do. Each device sums its own parameters and makes its own gradients.",
        )


def _check_shared_by_keys(setup: Setup) -> Iterator[Finding]:
    owners = setup.owners
    shared_ids = [i for i in owners if i in setup.modality_parameters and len(owners[i]) > 1]
    if not shared_ids:
        return
    sharing_all = [
        text_of(key)
        for key in setup.keys_of(shared_ids)
        if setup.owned_by_key[key].keys() & setup.modality_parameters.keys() <= set(shared_ids)
    ]
    key_texts = {
        setup.owned_by_key[owners[i][0]][i].name: list(map(text_of, owners[i])) for i in shared_ids
    }
    keys = ", ".join(sharing_all)
    no_others = f", and nothing else that is trainable belongs to {keys}" if keys else ""
    yield Finding(
        "MD117",
        "warning" if sharing_all else "info",
        "Several keys of the map own these parameters, which get no dummy gradient while any of "
        f"the keys is active{no_others}.",
        {"parameters": key_texts, "without_own": sharing_all},
        "Nothing to do if they are shared on purpose. Give a module that several modalities use "
        "together to a tuple of them.",
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


def _check_sparse_tables(setup: Setup) -> Iterator[Finding]:
    if setup.sparse_tables:
        yield Finding(
            "MD119",
            "info",
            "These sparse embeddings get a sparse and empty dummy gradient, which adds nothing to "
            "the loss and has the norm 0.",
            {"parameters": [owned.name for owned in setup.sparse_tables]},
            "Nothing to do.",
        )
