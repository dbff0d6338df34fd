"""Checks of the parameters that backward from a loss would reach."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from modaldummy._core.graph import leaves_of, reached_leaves, reached_nodes
from modaldummy._core.parameter_map import text_of
from modaldummy._engines import function_of, is_fsdp1_parameter, is_sharded
from modaldummy._findings import Finding, Severity
from modaldummy._group import num_ranks
from modaldummy._ownership import shared_with_trunk
from modaldummy._preflight.setup import Setup

_DIFFER = (
    "get a dummy gradient on ranks without the modality and none on others, so that ZeRO adds up "
    "gradients of different parameters"
)


def check_graph(setup: Setup) -> Iterator[Finding]:
    """MD111, MD120, MD121 and MD122; nothing without a loss, or if its graph is incomplete."""
    if setup.loss is None:
        return
    reached_ids = reached_leaves(setup.loss)
    if reached_ids is None:
        return
    of_modalities = {owned.parameter: owned.name for owned in setup.modality_parameters.values()}
    trainable = setup.trunk_parameters | of_modalities
    unreached = {
        id(parameter): name
        for parameter, name in trainable.items()
        # The graph ends at what FSDP gathers from a sharded parameter, which is another tensor.
        if id(parameter) not in reached_ids
        and parameter.is_leaf
        and not (is_sharded(parameter) or is_fsdp1_parameter(parameter))
    }
    if len(unreached) < len(trainable):
        yield from _check_trunk_reached(setup, unreached)
        yield from _check_modalities_reached(setup, unreached)
        yield from _check_inactive_not_reached(setup, setup.loss)
    else:
        yield Finding(
            "MD120",
            "error",
            "The graph of the loss reaches no trainable parameter, so backward trains nothing."
            if setup.loss.requires_grad
            else "The loss has no graph, so backward fails.",
            {"requires_grad": setup.loss.requires_grad, "trainable": len(trainable)},
            "Look for `.item()`, `.detach()`, `torch.no_grad()` or a tensor made from numbers "
            "between the model and the loss.",
        )


def _check_trunk_reached(setup: Setup, unreached: Mapping[int, str]) -> Iterator[Finding]:
    if names := {i: name for i, name in unreached.items() if i not in setup.modality_parameters}:
        severity, consequence = _consequence(setup, names)
        yield Finding(
            "MD111",
            severity,
            f"These trainable parameters {consequence}, because they belong to no modality and the "
            "graph of this loss does not reach them.",
            {"parameters": list(names.values())},
            "Give them to a modality, or to a tuple of modalities that use them together. Freeze "
            "them if they should not be trained.",
        )


def _check_modalities_reached(setup: Setup, unreached: Mapping[int, str]) -> Iterator[Finding]:
    if names := {i: name for i, name in unreached.items() if i in setup.modality_parameters}:
        severity, consequence = _consequence(setup, names)
        last = setup.wrapper.last
        inactive_ids = set() if last is None else setup.inactive_ids(last.active)
        # A shadow runs inactive towers: what they do not use gets no dummy gradient either.
        lacks_dummy = any(i in inactive_ids and not setup.is_shadowed(i) for i in names)
        modalities = "inactive modalities" if lacks_dummy else "modalities"
        may_differ = setup.zero_engines and num_ranks(None) > 1
        if may_differ and not lacks_dummy and not all(map(setup.is_shadowed, names)):
            severity, consequence = "error", _DIFFER
        yield Finding(
            "MD121",
            severity,
            f"These parameters of {modalities} {consequence}, because the graph of this loss "
            "does not reach them.",
            {"parameters": list(names.values())},
            "Pass the total that `wrapper.total(loss, batch)` or the wrapped loss function "
            "returned, and call `backward()` on it."
            if lacks_dummy
            else "Freeze parameters that forward does not use, or look for `.detach()` after them. "
            "Give parameters that only some batches use to a modality, or a tuple of modalities, "
            "of their own.",
        )


def _check_inactive_not_reached(setup: Setup, loss: Tensor) -> Iterator[Finding]:
    """MD122; nothing if the loss is not exactly one total, or if compiled code made it."""
    nodes = reached_nodes([loss.grad_fn])
    dummy_nodes = [node for node in nodes if getattr(function_of(node), "is_dummy_term", False)]
    if len(dummy_nodes) != 1:
        return
    inactive_ids = leaves_of(reached_nodes(dummy_nodes)) or set()
    reached_ids = reached_leaves(loss, follow_dummies=False) or set()
    both = (inactive_ids & reached_ids) - shared_with_trunk(setup.wrapper.parameters)
    if both:
        keys = ", ".join(map(text_of, setup.keys_of(both)))
        yield Finding(
            "MD122",
            "warning",
            f"The batch leaves {keys} inactive, but the real loss uses these parameters "
            "and gives them a gradient.",
            {"parameters": setup.names_of(both)},
            "Compare the names in the batch with the keys of the map, because a misspelt name is "
            "ignored. Nothing to do if the model runs inactive towers on filler data, or if the "
            "loss has a penalty on weights; `hold_inactive` then keeps them unchanged.",
        )


def _consequence(setup: Setup, unreached: Collection[int]) -> tuple[Severity, str]:
    """Severity and words for parameters without a gradient: DDP may wait for them and stop."""
    waiting = [ddp for ddp in setup.ddps if not (ddp.find_unused_parameters or ddp.static_graph)]
    if any(id(parameter) in unreached for ddp in waiting for parameter in ddp.parameters()):
        return "error", "get no gradient and DDP stops with 'Expected to have finished reduction'"
    return "warning", "get no gradient"
