"""The operators that emitted programs contain besides PyTorch's own; importing this makes those of `runtime.statistics` too.

They mark positions in an fx graph; `runtime.emit` prints each as a call on the running executor. All of them act in program
order on the caller's stream, except that the copy a `prefetch` starts runs on the copy engine.
"""

from __future__ import annotations

from typing import Any

from runtime import statistics  # noqa: F401  # makes the operators `vramplan::...`


def prefetch(bundle: int) -> None:
    """Starts copying a bundle to the device, once everything before this point has run: what it refills is free by then (I4).

    Behind the bundle's eviction it is for the next call.
    """


def onload(bundle: int) -> tuple[Any, ...]:
    """Waits until the bundle has arrived (I3); gives its weights in slot order."""
    raise AssertionError("a marker, executed by the runtime only")


def evict(bundle: int) -> None:
    """Forgets a bundle: its bytes may be refilled once everything before this point has run (I4, I6)."""


def free(*values: Any) -> None:
    """Drops values after their last use; storage goes when its last value does."""


def size(tensor: Any, dim: int) -> int:
    """The size of an input in one dimension: where a dynamic program takes its sizes from."""
    raise AssertionError("a marker, printed as tensor.size(dim)")


def integer(expression: str, *sizes: int) -> int:
    """A number computed from sizes; `{0}`, `{1}`, ... in the Python expression stand for them."""
    raise AssertionError("a marker, printed as the expression")


ALL = frozenset({prefetch, onload, evict, free, size, integer})
NUMBERS = frozenset({size, integer})
