"""`Loop`: what a loop node of a program does. The node is `ops.loop(operands)`; the loop itself is its `meta["loop"]`.

A loop runs one body after the other, each for a table of intervals: tiles whose operators are the same share a body, so that
there are few (the first tile, those inside, the last). It reads and writes its operands and gives nothing: what it computes
is in buffers that were made before it.

before:  y = conv2d(x, w, None, [1, 1], [1, 1])
after:   y = empty_strided(...)
         loop([x, w, y])                                 for every (lo, hi, lo_1, hi_1) of a run's table
             x_part = slice(x, 2, lo, hi)
             y_part = conv2d(x_part, w, None, [1, 1], [0, 1])
             copy_(slice(y, 2, lo_1, hi_1), y_part)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from runtime import ops


@dataclass(frozen=True)
class Run:
    """One body for several tiles.

    Attributes:
        body: placeholders for the operands (in their order), then for the columns of `table`; operators; no output.
        table: a row for each tile: bounds of intervals, positions.
    """

    body: fx.Graph
    table: tuple[tuple[int, ...], ...]

    @property
    def operators(self) -> Iterator[fx.Node]:
        return (node for node in self.body.nodes if node.op == "call_function")

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.body.nodes if node.op == "placeholder"]


@dataclass(frozen=True)
class Loop:
    """`runs` follow each other. `label` says what goes round: `7 tiles of dimension 2`."""

    runs: tuple[Run, ...]
    label: str = ""

    @property
    def banded(self) -> bool:
        """Whether bands come from the host or go there."""
        return any(node.target in ops.BANDS for run in self.runs for node in run.operators)

    @property
    def count(self) -> int:
        return sum(len(run.table) for run in self.runs)

    def map_bodies(self, change: Callable[[fx.Graph], fx.Graph]) -> Loop:
        """The same loop with every body changed."""
        return replace(self, runs=tuple(replace(run, body=change(run.body)) for run in self.runs))


def loop_of(node: fx.Node) -> Loop | None:
    """The loop of a node; None for every other."""
    return node.meta["loop"] if node.target is ops.loop else None
