"""The operators that emitted programs contain besides PyTorch's own.

They mark positions in an fx graph; `runtime.emit` prints each as a call on the running executor. All of them act in program
order on the caller's stream, except that the copy a `prefetch` starts runs on the copy engine.
"""

from __future__ import annotations

from typing import Any


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


def lookup(weight: str, indices: Any) -> Any:
    """The rows of a weight that lives on the host: `embedding(weight, indices)`, of which only the rows are copied.

    `weight` is the module's name, `indices` an integer tensor on the device; the result, a new tensor, has the shape
    `[*indices.shape, row]`. The host has to know the indices: it waits until the stream has computed them.
    """
    raise AssertionError("a marker, executed by the runtime only")


ALL = frozenset({prefetch, onload, evict, free, size, integer, lookup})
NUMBERS = frozenset({size, integer})
