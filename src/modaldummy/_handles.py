"""The handle of something that can be undone."""

from collections.abc import Callable
from typing import Self


class Handle:
    """Base class of handles: `remove()` ends an effect; also a context manager.

    Args:
        undo: Ends the effect; called once.
        target: What the effect is on, for ``repr``.
    """

    def __init__(self, undo: Callable[[], None], target: str) -> None:
        self._undo = undo
        self._target = target
        self._removed = False

    @property
    def removed(self) -> bool:
        """Whether ``remove`` was called."""
        return self._removed

    def remove(self) -> None:
        """End the effect; a second call does nothing."""
        if not self._removed:
            self._removed = True
            self._undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "in effect"
        return f"<{type(self).__name__} of {self._target}, {state}>"
