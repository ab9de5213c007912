"""The operators that emitted programs contain besides PyTorch's own; importing this makes those of `runtime.statistics` and
`runtime.stored` too.

They mark positions in an fx graph; `runtime.emit` prints each as a call on the running executor. All of them act in program
order on the caller's stream, except that the copy a `prefetch` starts runs on the copy engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from runtime import statistics, stored  # noqa: F401  # they make the operators `vramplan::...`


class Shaped(Protocol):
    """What has a shape."""

    @property
    def shape(self) -> torch.Size: ...


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


def loop(operands: tuple[Any, ...]) -> None:
    """Runs bodies over tables of intervals (`passes.loop`), which read the operands and write some of them."""
    raise AssertionError("a marker, printed as Python loops")


def host(index: int, shape: Sequence[int], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A value in page-locked host memory, at the layout's place `index`; bands along `dim` lie in one piece there."""
    order = [dim, *(d for d in range(len(shape)) if d != dim)]
    return torch.empty([shape[d] for d in order], dtype=dtype).permute([order.index(d) for d in range(len(shape))])


def band_of(slot: torch.Tensor, whole: Shaped, dim: int, start: int, stop: int) -> torch.Tensor:
    """The view of a flat slot that holds the band [start, stop) of `whole`, laid out as bands are on the host."""
    others = [n for d, n in enumerate(whole.shape) if d != dim]
    return slot[: (stop - start) * math.prod(others)].view([stop - start, *others]).movedim(0, dim)


def fetch(value: torch.Tensor, slot: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """A band of a host value on the device, in the slot: waits until it is there."""
    return band_of(slot, value, dim, start, stop)


def ahead(value: torch.Tensor, slot: torch.Tensor, dim: int, start: int, stop: int) -> None:
    """Starts copying the next band to the slot, whose last band is read no more; nothing where `start` is `stop`."""


def room(value: torch.Tensor, slot: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """Where a band of a host value is written to on the device: the slot, once what it held before has left."""
    return band_of(slot, value, dim, start, stop)


def save(value: torch.Tensor, slot: torch.Tensor, dim: int, start: int, stop: int) -> None:
    """Starts copying the band in the slot to its place on the host."""


BANDS = frozenset({fetch, ahead, room, save})


def lookup(weight: str, indices: Any) -> Any:
    """The rows of a weight that lives on the host: `embedding(weight, indices)`, of which only the rows are copied.

    `weight` is the module's name, `indices` an integer tensor on the device; the result, a new tensor, has the shape
    `[*indices.shape, row]`. The host has to know the indices: it waits until the stream has computed them.
    """
    raise AssertionError("a marker, executed by the runtime only")


ALL = frozenset({prefetch, onload, evict, free, size, integer, lookup, loop, host}) | BANDS
NUMBERS = frozenset({size, integer})
