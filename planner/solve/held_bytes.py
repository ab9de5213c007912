"""Bytes that a tiling holds beyond what the values take that are live: the rest of a memory of which results have a part.

A search looks at a program whose values have each their own memory. Where it writes results over larger values, their memory is
held as long as any of them is there. What is free of it takes further results, in the place of memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from passes.program import storage_id, tensors_of
from passes.regions import Tile, find_region
from passes.tile_regions import stretch_of
from planner.solve.tile_cost import TileCosts


@dataclass
class _Memory:
    """The memory of a value, with what has been written over it: by node, from which operator on, until which, and bytes."""

    nbytes: int
    members: dict[fx.Node, tuple[int, int, int]] = field(default_factory=dict)

    def free_bytes(self, place: int) -> int:
        """What of it nothing needs from some operator on, while something else does; 0 where nothing does."""
        used = sum(nbytes for _, last, nbytes in self.members.values() if last >= place)
        return self.nbytes - used if used else 0


def held_beyond(costs: TileCosts, tiles: Sequence[Tile]) -> np.ndarray:
    """How much more is live than values take, in front of each operator and behind the last; int64[n + 1]."""
    nodes = {node.name: node for node in costs.problem.program.graph.nodes}
    memories: dict[fx.Node, _Memory] = {}
    shared: list[_Memory] = []
    for tile in tiles:
        stretch, seed = stretch_of(nodes, tile)
        region = find_region(stretch, seed, tile.dim, costs.calls, costs.hosted)
        places, start, stop = costs.written_over(region), costs.position[stretch[0]], costs.position[stretch[-1]] + 1
        for node in region.results:
            member = costs.position[node], _last(costs, node), sum(costs.born(node))
            if node in places.over:
                value = places.over[node].value
                if value not in memories:
                    memories[value] = _Memory(sum(costs.born(value)))
                    memories[value].members[value] = costs.position[value], _last(costs, value), sum(costs.born(value))
                    shared.append(memories[value])
                memories[node] = memories[value]
            else:
                fitting = (m for m in shared if m.free_bytes(start) >= member[2] and _goes_on(m, stop))
                memories[node] = next(fitting, _Memory(member[2]))
            memories[node].members[node] = member
    beyond = np.zeros(len(costs.nodes) + 1, dtype=np.int64)
    for memory in shared:
        first = min(first for first, _, _ in memory.members.values())
        last = max(last for _, last, _ in memory.members.values())
        taken = np.zeros_like(beyond)
        for begin, end, nbytes in memory.members.values():
            taken[begin + 1 : end + 1] += nbytes
        beyond[first + 1 : last + 1] += np.maximum(memory.nbytes - taken[first + 1 : last + 1], 0)
    return beyond


def _last(costs: TileCosts, node: fx.Node) -> int:
    """The last operator at which a value's memory is read."""
    storages = {storage_id(tensor) for tensor in tensors_of(node)}
    dies = costs.problem.liveness.dies
    start = costs.position[node]
    return next((i for i in range(start, len(dies)) if storages & set(dies[i])), len(dies))


def _goes_on(memory: _Memory, stop: int) -> bool:
    return any(last >= stop for _, last, _ in memory.members.values())
