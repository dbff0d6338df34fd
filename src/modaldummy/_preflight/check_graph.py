"""Checks of what backward from a loss would reach."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from modaldummy._core.graph import leaves_of, reached_leaves, reached_nodes
from modaldummy._core.parameter_map import text_of
from modaldummy._core.term import is_dummy_term
from modaldummy._engines import is_sharded
from modaldummy._findings import Finding
from modaldummy._preflight.setup import Setup


def check_graph(setup: Setup) -> Iterator[Finding]:
    """MD111, MD120, MD121 and MD122; silent without a loss, and where its graph cannot tell."""
    if setup.loss is None:
        return
    reached = reached_leaves(setup.loss)
    if reached is None:
        return
    trainable = [parameter for _, parameter in setup.named.values() if parameter.requires_grad]
    # The leaf that stands for a sharded parameter is another tensor, gathered for a while.
    if any(id(parameter) in reached or is_sharded(parameter) for parameter in trainable):
        yield from _out_of_reach(setup, reached)
        yield from _reached_though_inactive(setup, setup.loss)
    else:
        yield Finding(
            "MD120",
            "error",
            "The graph of the loss reaches no trainable parameter of the model."
            if setup.loss.requires_grad
            else "The loss has no graph, so that backward fails.",
            {"requires_grad": setup.loss.requires_grad, "trainable": len(trainable)},
            "Look for `.item()`, `.detach()`, `torch.no_grad()` or a new tensor made of numbers "
            "between the model and the loss.",
        )


def _out_of_reach(setup: Setup, reached: set[int]) -> Iterator[Finding]:
    if missed := _missed(setup.trunk, reached):
        yield Finding(
            "MD111",
            "error" if (stops := _stops(setup, missed)) else "warning",
            "The graph of this loss does not reach these trainable parameters, which belong to no "
            "modality, so that they get no gradient"
            + (", and DDP stops with 'Expected to have finished reduction'." if stops else "."),
            {"parameters": list(missed.values())},
            "Give them to a modality, or to a tuple of modalities that use them together; freeze "
            "them if they are not to be trained.",
        )
    names = {identity: (name, parameter) for identity, (name, parameter, _) in setup.towers.items()}
    if missed := _missed(names, reached):
        last = setup.wrapper.last
        idle = set() if last is None else setup.inactive(last.active)
        real = not idle.isdisjoint(missed)
        yield Finding(
            "MD121",
            "error" if (stops := _stops(setup, missed)) else "warning",
            "The graph of this loss does not reach these parameters of "
            + ("inactive modalities, as if it were not the total" if real else "modalities")
            + (", and DDP stops with 'Expected to have finished reduction'." if stops else "."),
            {"parameters": list(missed.values())},
            "Pass, and backward, what `wrapper.total(loss, batch)` or the wrapped loss function "
            "returned."
            if real
            else "Freeze what forward does not use, or look for `.detach()` on its way; what only "
            "some batches use belongs to a modality, or tuple of modalities, of its own.",
        )


def _reached_though_inactive(setup: Setup, loss: Tensor) -> Iterator[Finding]:
    """MD122; silent where the loss is not one total, and behind compiled code."""
    dummies = [node for node in reached_nodes([loss.grad_fn]) if is_dummy_term(node)]
    if len(dummies) != 1:
        return
    inactive = leaves_of(reached_nodes(dummies)) or set()
    reached = reached_leaves(loss, follow_dummies=False) or set()
    if odd := (inactive & reached) - setup.wrapper.parameters.shared_with_trunk():
        keys = [text_of(key) for key, own in setup.owned.items() if not odd.isdisjoint(own)]
        yield Finding(
            "MD122",
            "warning",
            f"The batch leaves {', '.join(keys)} inactive, and yet the loss itself, without the "
            "dummy, reaches parameters of it.",
            {"parameters": [name for i, (name, _, _) in setup.towers.items() if i in odd]},
            "Compare the batch with the map, key by key: one that is misspelt in either is ignored "
            "like any other. If the model runs absent modalities on filler, or the loss has a "
            "penalty on weights, there is nothing to do; `hold_inactive` keeps them still.",
        )


def _missed(
    parameters: Mapping[int, tuple[str, nn.Parameter]], reached: set[int]
) -> dict[int, str]:
    """Names of those that are out of reach, of which shards cannot tell."""
    return {
        identity: name
        for identity, (name, parameter) in parameters.items()
        if identity not in reached and not is_sharded(parameter)
    }


def _stops(setup: Setup, missed: Collection[int]) -> bool:
    """Whether a DDP waits for their gradients."""
    waiting = [ddp for ddp in setup.ddps if not (ddp.find_unused_parameters or ddp.static_graph)]
    return any(id(parameter) in missed for ddp in waiting for parameter in ddp.parameters())
