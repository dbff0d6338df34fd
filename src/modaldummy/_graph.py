"""Which leaves an autograd graph reaches, without walking it backward."""

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
    leaves = {id(tensor) for tensor in tensors if tensor.requires_grad and tensor.is_leaf}
    for node in nodes_of(*tensors, dummies=dummies):
        if "CheckpointFunction" in type(node).__name__:
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return leaves


def nodes_of(*tensors: Tensor, dummies: bool = True) -> set[Any]:
    """Each node of the graphs of `tensors`; `dummies` as for `reached_by`."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        edges = node.next_functions
        if not dummies and _only_connects(node):
            edges = edges[:1]
        following = {after for after, _ in edges if after is not None} - seen
        waiting += following
        seen |= following
    return seen


def _only_connects(node: Any) -> bool:
    """Whether the edges of a node, but for the first, are there for dummy gradients alone."""
    return getattr(getattr(node, "_forward_cls", None), "only_connects", False)
