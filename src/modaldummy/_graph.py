"""Which leaves an autograd graph reaches, without walking it backward."""

from torch import Tensor


def reached_by(loss: Tensor) -> set[int] | None:
    """`id` of each leaf that backward from `loss` would visit; None where the graph cannot tell.

    It cannot where a reentrant checkpoint computes a part of it again during backward. Nothing is
    computed, and the graph stays as it is.
    """
    if loss.grad_fn is None:
        return {id(loss)} if loss.requires_grad else set()
    leaves: set[int] = set()
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if "CheckpointFunction" in type(node).__name__:
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        following = [after for after, _ in node.next_functions if after is not None]
        waiting += [after for after in following if after not in seen]
        seen.update(following)
    return leaves
