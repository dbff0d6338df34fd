"""Walks an autograd graph without running backward."""

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor

from modaldummy._engines import function_of, is_reentrant_checkpoint


def reached_leaves(*tensors: Tensor, follow_dummies: bool = True) -> set[int] | None:
    """`id` of each leaf to which backward from `tensors` would hand a gradient.

    Nothing is computed, and the graphs stay as they are.

    Args:
        tensors: Any tensors, with graphs or without.
        follow_dummies: Whether to follow edges that exist only for dummy gradients. A
            `torch.autograd.Function` of this package with the class attribute `only_connects` has
            such edges from the second on.

    Returns:
        None where the graph does not say: a reentrant checkpoint builds its part during backward.
    """
    leaves = leaves_of(reached_nodes([tensor.grad_fn for tensor in tensors], follow_dummies))
    themselves = {id(tensor) for tensor in tensors if tensor.requires_grad and tensor.is_leaf}
    return None if leaves is None else leaves | themselves


def reached_nodes(
    roots: Iterable[Any], follow_dummies: bool = True, without: Set[Any] = frozenset()
) -> set[Any]:
    """Each node that backward from `roots` would visit, the roots included.

    Args:
        roots: Nodes of autograd graphs, such as `tensor.grad_fn`; None is skipped.
        follow_dummies: As for `reached_leaves`.
        without: Nodes that the walk leaves out, with all that is reached only through them.
    """
    visited: set[Any] = {node for node in roots if node is not None}
    waiting = list(visited)
    while waiting:
        node = waiting.pop()
        edges = node.next_functions
        if not follow_dummies and getattr(function_of(node), "only_connects", False):
            edges = edges[:1]
        for after, _ in edges:
            if after is not None and after not in visited and after not in without:
                visited.add(after)
                waiting.append(after)
    return visited


def most_leaves(nodes: Iterable[Any]) -> int:
    """The largest number of leaves that one of the `nodes` hands a gradient itself."""
    return max(
        (sum(hasattr(after, "variable") for after, _ in node.next_functions) for node in nodes),
        default=0,
    )


def leaves_of(nodes: Iterable[Any]) -> set[int] | None:
    """`id` of each leaf that one of the `nodes` hands a gradient; None as for `reached_leaves`."""
    leaves = set()
    for node in nodes:
        if is_reentrant_checkpoint(node):
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return leaves
