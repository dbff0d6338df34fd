"""Changes one item of a container that others may hold."""

import copy
from collections.abc import Mapping
from typing import Any


def with_item(container: Any, place: Any, item: Any) -> Any:
    """A shallow copy of `container` with `item` at `place`.

    Args:
        container: A tuple, list, mapping or any other object.
        place: An index, a key of a mapping, or the name of an attribute.
        item: What to put there.
    """
    if isinstance(container, tuple) and isinstance(place, int):
        items = [*container[:place], item, *container[place + 1 :]]
        # A named tuple takes its items one by one.
        return container._make(items) if hasattr(container, "_make") else tuple(items)
    changed = copy.copy(container)
    if isinstance(place, int) or (isinstance(container, Mapping) and place in container):
        changed[place] = item
    else:
        # Frozen dataclasses refuse setattr, also on a copy that nobody else has seen.
        object.__setattr__(changed, place, item)
    return changed
