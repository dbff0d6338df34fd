"""Tensors inside the arguments and outputs of modules."""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from modaldummy._core.loss_function import with_item

Path = tuple[Any, ...]


def leaves_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in lists, tuples, mappings and dataclasses, at any level, with its path."""
    items = _items_of(tree)
    if items is None:
        yield path, tree
    else:
        for key, item in items:
            yield from leaves_of(item, (*path, key))


def replaced(tree: Any, new: Mapping[int, Any]) -> Any:
    """The tree with what `new` has for leaves, by the `id` of the old ones.

    Lists and mappings are changed in place, because the caller may read them after the call.
    """
    if id(tree) in new:
        return new[id(tree)]
    for key, item in list(_items_of(tree) or ()):
        changed = replaced(item, new)
        if changed is item:
            continue
        if isinstance(tree, (list, MutableMapping)):
            tree[key] = changed
        else:
            tree = with_item(tree, key, changed)
    return tree


def _items_of(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (list, tuple)):
        return enumerate(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None
