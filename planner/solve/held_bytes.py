"""Bytes that a tiling holds beyond what the values take that are live: the rest of a memory of which results have a part.

A search looks at a program whose values have each their own memory. Where it writes results over larger values, their memory is
held as long as any of them is there. What is free of it takes further results, in the place of memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from passes.find_region import find_region
from passes.program import storage_id, tensors_of
from passes.regions import Tile
from passes.tile_regions import stretch_of
from passes.write_in_place import in_place_overload
from planner.solve.tile_cost import TileCosts

# A value is written to what is free of a memory where it takes more than this share of that.
_MUCH = 0.5


@dataclass(eq=False)
class _Memory:
    """The memory of a value, with what has been written over it: by node, from which operator on, until which, and bytes."""

    nbytes: int
    members: dict[fx.Node, tuple[int, int, int]] = field(default_factory=dict)

    def free_bytes(self, place: int) -> int:
        """What of it nothing needs from some operator on, while something else does; 0 where nothing does."""
        used = sum(nbytes for _, last, nbytes in self.members.values() if last >= place)
        return self.nbytes - used if used else 0

    def goes_on(self, stop: int) -> bool:
        """Whether something needs it from some operator on."""
        return any(last >= stop for _, last, _ in self.members.values())


def held_beyond(costs: TileCosts, tiles: Sequence[Tile]) -> np.ndarray:
    """How much more is live than values take, in front of each operator and behind the last; int64[n + 1].

    Whatever is not in tiles is taken to be there, too, where it fits: for what it needs elsewhere it can be in tiles.
    """
    found = _Found(costs)
    inside = -1
    regions = {costs.position[stretch[0]]: (stretch, seed, tile) for tile in tiles for stretch, seed in [_stretch(costs, tile)]}
    for i, node in enumerate(costs.nodes):
        if i in regions:
            stretch, seed, tile = regions[i]
            region = find_region(stretch, seed, tile.dim, costs.calls, costs.hosted)
            places, inside = costs.written_over(region), costs.position[stretch[-1]]
            for result in region.results:
                found.add(result, i, inside + 1, places.over[result].value if result in places.over else None)
        elif i > inside and costs.born(node):
            in_place = in_place_overload(node.target) is not None
            ending = [n for n in node.all_input_nodes if in_place and n in found.memories and found.last(n) == i]
            found.add(node, i, i + 1, next(iter(ending), None))
    shared = found.shared
    beyond = np.zeros(len(costs.nodes) + 1, dtype=np.int64)
    for memory in shared:
        first = min(first for first, _, _ in memory.members.values())
        last = max(last for _, last, _ in memory.members.values())
        taken = np.zeros_like(beyond)
        for begin, end, nbytes in memory.members.values():
            taken[begin + 1 : end + 1] += nbytes
        beyond[first + 1 : last + 1] += np.maximum(memory.nbytes - taken[first + 1 : last + 1], 0)
    return beyond


def _stretch(costs: TileCosts, tile: Tile) -> tuple[list[fx.Node], fx.Node]:
    return stretch_of({node.name: node for node in costs.problem.program.graph.nodes}, tile)


class _Found:
    """Memories by value; `shared` are those over which something is written."""

    def __init__(self, costs: TileCosts) -> None:
        self.memories: dict[fx.Node, _Memory] = {}
        self.shared: list[_Memory] = []
        self._costs = costs
        dies = costs.problem.liveness.dies
        self._dies = {storage: i for i, storages in enumerate(dies) for storage in storages}

    def last(self, node: fx.Node) -> int:
        """The last operator at which a value's memory is read."""
        return max((self._dies.get(storage_id(t), len(self._costs.nodes)) for t in tensors_of(node)), default=-1)

    def add(self, node: fx.Node, start: int, stop: int, over: fx.Node | None) -> None:
        """A value that operators [start, stop) make: over another one, where it fits, or in memory of its own."""
        nbytes = sum(self._costs.born(node))
        if over is not None:
            if over not in self.memories:
                self.add(over, self._costs.position[over], self._costs.position[over] + 1, None)
            memory = self.memories[over]
            if memory not in self.shared:
                self.shared.append(memory)
        else:
            fitting = (
                m for m in self.shared if m.free_bytes(start) >= nbytes > _MUCH * m.free_bytes(start) and m.goes_on(stop)
            )
            memory = next(fitting, _Memory(nbytes))
        self.memories[node] = memory
        memory.members[node] = self._costs.position[node], self.last(node), nbytes
