"""Equal stretches of a program: the same calls on each other's results, with the same ones (but for weights) read afterwards.

Models repeat their blocks; what is found for a stretch in one of them holds in all, once its nodes are put in their places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from passes.regions import Calls


@dataclass(frozen=True, eq=False)
class Stretches:
    """Stretches [start, stop) of the operators of one program. `marked`: values that differ from others of their geometry.

    `weights`: the names of the placeholders that are weights.
    """

    nodes: tuple[fx.Node, ...]
    position: Mapping[fx.Node, int]
    calls: Calls
    weights: Collection[str]
    marked: Collection[fx.Node] = ()

    def number(self, start: int, stop: int) -> int:
        """The same for equal stretches."""
        return self._of(start, stop)[0]

    def place(self, node: fx.Node, start: int, stop: int) -> tuple[bool, int]:
        """Where a node is that a stretch makes or reads: inside, and which one there, or among what comes from before."""
        at = self.position.get(node, -1)
        return (True, at - start) if start <= at < stop else (False, self._of(start, stop)[1].get(node, -1))

    def node(self, place: tuple[bool, int], start: int, stop: int) -> fx.Node:
        """The node at a place of a stretch."""
        inside, index = place
        return self.nodes[start + index] if inside else list(self._of(start, stop)[1])[index]

    def _of(self, start: int, stop: int) -> tuple[int, dict[fx.Node, int]]:
        """Its number, and what comes into it, numbered in the order of its readers."""
        if (start, stop) not in self._known:
            outside: dict[fx.Node, int] = {}
            rows: list[object] = []
            for i in range(start, stop):
                node = self.nodes[i]
                links: list[int] = []
                for n in node.all_input_nodes:
                    at = self.position.get(n, -1)
                    if start <= at:
                        links.append(i - at)
                        continue
                    weight = n.name in self.weights
                    lasts = not weight and any(self.position.get(user, stop) >= stop for user in n.users)
                    links += (-1 - outside.setdefault(n, len(outside)), lasts, weight)
                leaves = any(self.position.get(user, stop) >= stop for user in node.users)
                flags = node in self.marked, tuple(n in self.marked for n in node.all_input_nodes)
                rows.append((self.calls.number(node), tuple(links), leaves, flags))
            self._known[start, stop] = self._numbers.setdefault(tuple(rows), len(self._numbers)), outside
        return self._known[start, stop]

    @cached_property
    def _known(self) -> dict[tuple[int, int], tuple[int, dict[fx.Node, int]]]:
        return {}

    @cached_property
    def _numbers(self) -> dict[object, int]:
        return {}
