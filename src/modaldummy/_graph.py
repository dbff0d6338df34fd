"""Which leaves an autograd graph reaches, without walking it backward."""

from torch import Tensor


def reached_by(*tensors: Tensor) -> set[int] | None:
    """`id` of each leaf that backward from `tensors` would visit; None where a graph cannot tell.

    It cannot where a reentrant checkpoint computes a part of it again during backward. Nothing is
    computed, and the graphs stay as they are.
    """
    leaves = {id(tensor) for tensor in tensors if tensor.requires_grad and tensor.is_leaf}
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
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
