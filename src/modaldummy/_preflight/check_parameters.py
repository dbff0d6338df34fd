"""Checks of who owns which parameters, and of what is in them."""

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modaldummy._core.parameter_map import text_of
from modaldummy._engines import local_shard
from modaldummy._findings import Finding
from modaldummy._preflight.setup import Setup, has_values


def check_parameters(setup: Setup) -> Iterator[Finding]:
    """MD113 to MD119."""
    yield from _frozen(setup)
    yield from _not_finite(setup)
    yield from _without_values(setup)
    yield from _several_devices(setup)
    yield from _several_owners(setup)
    yield from _shared_with_trunk(setup)
    yield from _sparse_tables(setup)


def _frozen(setup: Setup) -> Iterator[Finding]:
    keys = [text_of(key) for key, own in setup.owned.items() if setup.towers.keys().isdisjoint(own)]
    if keys:
        yield Finding(
            "MD113",
            "info",
            f"All parameters of {', '.join(keys)} are frozen, and frozen ones get no dummy.",
            {"modalities": keys},
            "Nothing to do if that is meant; what is unfrozen later gets one from then on.",
        )


def _not_finite(setup: Setup) -> Iterator[Finding]:
    shards = {name: local_shard(p) for name, p in setup.named.values() if has_values(p)}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, shard in shards.items():
        if _is_plain(shard) and shard.numel():
            by_device.setdefault(shard.device, {})[name] = shard
    broken: list[str] = []
    for own in by_device.values():
        # Stacked, so that the host waits for each device once.
        finite = torch.stack([_largest(shard).isfinite() for shard in own.values()]).tolist()
        broken += [name for name, fine in zip(own, finite, strict=True) if not fine]
    if broken:
        yield Finding(
            "MD114",
            "error",
            "Parameters hold NaN or infinite values.",
            {"parameters": broken},
            "Load or initialise them again. While they are inactive the loss stays finite, since "
            "the value of the dummy is then left out; its gradient is handed out all the same.",
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether torch itself knows what its values are, and they can be NaN."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return type(tensor) in (Tensor, nn.Parameter) and inexact and tensor.layout is torch.strided


def _largest(tensor: Tensor) -> Tensor:
    wide = tensor.float() if tensor.dtype.itemsize < 2 else tensor  # float8 has no norm
    largest: Tensor = torch.linalg.vector_norm(wide, math.inf)
    return largest


def _without_values(setup: Setup) -> Iterator[Finding]:
    anywhere = setup.loss is not None and setup.loss.is_meta
    names = [name for name, parameter, _ in setup.towers.values() if parameter.is_meta]
    if names and setup.reads and not anywhere:
        yield Finding(
            "MD115",
            "error",
            "These modality parameters are on the meta device and have no values that could be "
            "added to a loss.",
            {"parameters": names},
            "Load the model before training, or pass `gradient_only=True`, which reads none.",
        )


def _several_devices(setup: Setup) -> Iterator[Finding]:
    counts = Counter(str(parameter.device) for _, parameter, _ in setup.towers.values())
    devices = set(counts) | ({str(setup.loss.device)} if setup.loss is not None else set())
    if len(devices) > 1:
        loss = None if setup.loss is None else str(setup.loss.device)
        yield Finding(
            "MD116",
            "info",
            "Modality parameters are not all where the loss is, so that at each step a number is "
            "copied from and to each of the other devices.",
            {"parameters": dict(counts), "loss": loss},
            "Nothing to do: each device sums its own parameters and makes its own gradients.",
        )


def _several_owners(setup: Setup) -> Iterator[Finding]:
    owners = {i: keys for i, keys in setup.owners.items() if i in setup.towers and len(keys) > 1}
    if not owners:
        return
    ownerless = [
        text_of(key)
        for key, own in setup.owned.items()
        if (trainable := own.keys() & setup.towers.keys()) and trainable <= owners.keys()
    ]
    names = {setup.owned[keys[0]][i][0]: list(map(text_of, keys)) for i, keys in owners.items()}
    rest = f", and there are no others of {', '.join(ownerless)}" if ownerless else ""
    yield Finding(
        "MD117",
        "warning" if ownerless else "info",
        "Parameters belong to several keys of the map, so that they get no dummy while any of "
        f"these is active{rest}.",
        {"parameters": names, "without_own": ownerless},
        "Nothing to do if they are shared on purpose; a module for several modalities together "
        "belongs to a tuple of them.",
    )


def _shared_with_trunk(setup: Setup) -> Iterator[Finding]:
    shared = setup.wrapper.parameters.shared_with_trunk()
    names = [name for identity, (name, _, _) in setup.towers.items() if identity in shared]
    if names:
        yield Finding(
            "MD118",
            "warning",
            "These parameters of the map are tied to something outside of it: while their modality "
            "is inactive they get a dummy on top of the gradient of the real loss.",
            {"parameters": names},
            "Leave them out of the map; the real loss reaches them at each step.",
        )


def _sparse_tables(setup: Setup) -> Iterator[Finding]:
    if setup.tables:
        yield Finding(
            "MD119",
            "info",
            "The dummy gradient of a sparse embedding is sparse and empty, so that it adds nothing "
            "to the loss and its gradient norm is 0.",
            {"parameters": [name for name, _, _ in setup.tables]},
            "Nothing to do.",
        )
