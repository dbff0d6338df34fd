"""Which leaves an autograd graph reaches, without walking it backward."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def reached_by(*tensors: Tensor, dummies: bool = True) -> set[int] | None:
    """`id` of each leaf that backward from `tensors` would visit; None where a graph cannot tell.

    It cannot where a reentrant checkpoint computes a part of it again during backward. Nothing is
    computed, and the graphs stay as they are.

    Args:
        tensors: Any, with graphs or without.
        dummies: Whether to follow the edges that do nothing but hand out dummy gradients.
    """
    leaves = leaves_of(nodes_from([tensor.grad_fn for tensor in tensors], dummies))
    themselves = {id(tensor) for tensor in tensors if tensor.requires_grad and tensor.is_leaf}
    return None if leaves is None else leaves | themselves


def nodes_from(roots: Iterable[Any], dummies: bool = True) -> set[Any]:
    """Each node that backward from `roots` would visit, themselves included; None is none.

    Args:
        roots: Nodes of autograd graphs, such as `tensor.grad_fn`.
        dummies: As for `reached_by`.
    """
    seen: set[Any] = {node for node in roots if node is not None}
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        edges = node.next_functions
        if not dummies and _only_connects(node):
            edges = edges[:1]
        following = {after for after, _ in edges if after is not None} - seen
        waiting += following
        seen |= following
    return seen


def leaves_of(nodes: Iterable[Any]) -> set[int] | None:
    """`id` of each leaf that gets a gradient from one of the `nodes`; None where none can tell."""
    leaves = set()
    for node in nodes:
        if "CheckpointFunction" in type(node).__name__:
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return leaves


def _only_connects(node: Any) -> bool:
    """Whether the edges of a node, but for the first, are there for dummy gradients alone."""
    return getattr(getattr(node, "_forward_cls", None), "only_connects", False)
