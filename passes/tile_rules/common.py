"""What rules of several families share: arguments by name, results of operators that have several, dimensions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable

aten = torch.ops.aten


def needs_of(call: TileCall, **parts: Part | None) -> tuple[Part | None, ...]:
    """The needs of a call: these parts of the arguments with these names, all of every other."""
    by_index = {call.index_of(name): part for name, part in parts.items()}
    return tuple(by_index.get(index) for index in range(len(call.tensors)))


def dims_of(dims: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Dimensions counted from 0, in the order given. A tensor without dimensions has one as far as arguments go."""
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(dim % max(rank, 1) for dim in given)


def refuse_along(part: Part, dims: Iterable[int], what: str) -> None:
    """Raises Untileable where the part is of one of the dimensions; `what` says why, as in "normalises"."""
    if part.dim in dims:
        raise Untileable(f"{what} over dimension {part.dim}")


def sliced(run: Run, value: Any, part: Part, outer: Part | None = None) -> Any:
    """A part of a value, which itself is the part `outer`; the value where it is all of that."""
    inner = part if outer is None else part.within(outer)
    if outer is not None and inner.size == outer.size:
        return value
    return run(aten.slice.Tensor, value, inner.dim, inner.start, inner.stop)


def hull_of(parts: Sequence[Part | None]) -> Part:
    """The smallest part that contains all that are wanted, each in its own result.

    Raises:
        Untileable: they are of different dimensions.
    """
    wanted = [part for part in parts if part is not None]
    assert wanted, "nothing is wanted"
    if len({part.dim for part in wanted}) > 1:
        raise Untileable("has results of which parts of different dimensions are wanted")
    return Part(wanted[0].dim, min(part.start for part in wanted), max(part.stop for part in wanted))


def together(
    parts: Sequence[Part | None], hull: Part, needs: tuple[Part | None, ...], compute: Callable[[Run, Sequence[Any]], Any]
) -> Tiled:
    """A rule's answer where `compute` gives all results over `hull` at once: the wanted part of each, in a list if several."""

    def results(run: Run, values: Sequence[Any]) -> Any:
        result = compute(run, values)
        if len(parts) == 1:
            return result if parts[0] is None else sliced(run, result, parts[0], hull)
        return [
            None if part is None else sliced(run, run(operator.getitem, result, index), part, hull)
            for index, part in enumerate(parts)
        ]

    return Tiled(needs, results)
