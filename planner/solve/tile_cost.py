"""What a region would cost in tiles: bytes and seconds, estimated from those of its operators and the parts that a tile needs.

Only a choice is made by these numbers; what is chosen is rewritten, analysed and proved like everything else.
"""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import fx

from passes.find_region import find_region
from passes.program import storage_id, tensors_of
from passes.regions import Calls, Region, TileNeeds
from passes.tile_rules import Part, Untileable
from passes.tile_rules.base import Tiled
from passes.write_over import Places, fits_over, places_over
from planner.solve.attention_tiles import attention_tile_bytes
from planner.solve.problem import Problem
from planner.solve.stretches import Stretches
from planner.solve.tile_bytes import dense_bytes, last_readers, part_bytes, partial_bytes, share_of

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CONVOLUTIONS = {
    getattr(getattr(torch.ops.aten, f"conv{rank}d"), overload) for rank in (1, 2, 3) for overload in ("default", "padding")
}

# A result takes the place of what is held for nothing where it needs no less than this share of that.
_NEARLY = 0.99


@dataclass(frozen=True)
class Inner:
    """A loop of some number of tiles: bytes of a tile's own values, of the results, seconds more than the whole takes."""

    count: int
    grain: int
    tile_bytes: int
    result_bytes: int
    added_seconds: float


@dataclass(frozen=True)
class Estimate:
    """A loop in its place: the most bytes that are live, weights of the stretch included."""

    inner: Inner
    peak_bytes: int


@dataclass(frozen=True)
class Hosting:
    """Values of more than `above_bytes` live on the host, in bands along dimension `axis` (counted from the last, -1)."""

    above_bytes: int
    axis: int


@dataclass
class TileCosts:
    """Estimates for stretches of one problem; equal stretches are estimated once.

    `over`: results may be written over values that are larger; with `windows` also over those of which tiles read more than
    they write. `held`: bytes that are then live between operators beyond those of their values, as `live_before`.
    """

    problem: Problem
    hosting: Hosting | None = None
    over: bool = False
    windows: bool = False
    calls: Calls = field(default_factory=Calls)
    held: np.ndarray | None = None
    _regions: dict[object, Region | None] = field(default_factory=dict)
    _inner: dict[object, Inner | None] = field(default_factory=dict)

    def with_larger(self, windows: bool) -> TileCosts:
        """The same with results over larger values, also through windows; what is known of regions and tiles is shared."""
        made = copy(self)
        made.over, made.windows, made._inner = True, windows, {}
        for name in ("_places", "_result_bytes", "_holding"):
            made.__dict__.pop(name, None)
        return made

    def with_held(self, held: np.ndarray) -> TileCosts:
        """The same with other bytes held; what is known of regions is shared."""
        made = copy(self)
        made.held = held
        for name in ("live_before", "total"):
            made.__dict__.pop(name, None)
        return made

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.problem.liveness.nodes

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def hosted(self) -> frozenset[fx.Node]:
        """The values that live on the host: they are made by operators, are too large, and are not what the program gives."""
        if self.hosting is None:
            return frozenset()
        given = {storage_id(t) for n in self.problem.program.output.all_input_nodes for t in tensors_of(n)}
        sizes = {storage: nbytes for born in self.problem.liveness.born for storage, nbytes in born}
        large = {storage for storage, nbytes in sizes.items() if nbytes > self.hosting.above_bytes} - given
        return frozenset(node for node in self.nodes if any(storage_id(t) in large for t in tensors_of(node)))

    @cached_property
    def _hosted_storages(self) -> set[int]:
        return {storage_id(t) for node in self.hosted for t in tensors_of(node)}

    @cached_property
    def touching(self) -> np.ndarray:
        """Whether operator i makes or reads a value that lives on the host, and so has to run in tiles; bool[n]."""
        return np.array([node in self.hosted or any(n in self.hosted for n in node.all_input_nodes) for node in self.nodes])

    @cached_property
    def live_before(self) -> np.ndarray:
        """Activation bytes on the device between operators: before operator i, and behind the last; int64[n + 1]."""
        live, sizes = self.problem.liveness, dict[int, int]()
        levels = [int(live.input_bytes)]
        for born, dies in zip(live.born, live.dies, strict=True):
            sizes.update((s, 0 if s in self._hosted_storages else n) for s, n in born)
            levels.append(levels[-1] + sum(sizes[s] for s, _ in born) - sum(sizes.pop(storage) for storage in dies))
        return np.array(levels, dtype=np.int64) + (0 if self.held is None else self.held)

    @cached_property
    def weights_at(self) -> np.ndarray:
        """Bytes of the weights that have to be there at operator i at least; int64[n]."""
        delta = np.zeros(len(self.nodes) + 1, dtype=np.int64)
        for visit in self.problem.visits:
            if visit.weight not in self.problem.pinned:
                delta[visit.first] += self.problem.weight_bytes[visit.weight]
                delta[visit.last + 1] -= self.problem.weight_bytes[visit.weight]
        return np.cumsum(delta[:-1]) + self.problem.arena_bytes(self.problem.pinned)

    @property
    def floor_bytes(self) -> int:
        """What no tiling gets below: inputs, and the weights of one operator."""
        return int(self.problem.liveness.input_bytes) + int(self.weights_at.max())

    @cached_property
    def total(self) -> np.ndarray:
        """The least that is live at operator i untiled; int64[n]."""
        live = self.problem.liveness
        own = [c.workspace_bytes + sum(n for s, n in b if s not in self._hosted_storages)
               for c, b in zip(live.costs, live.born, strict=True)]  # fmt: skip
        return self.live_before[:-1] + np.array(own, dtype=np.int64) + self.weights_at

    def seeds(self, start: int, stop: int) -> list[tuple[fx.Node, int]]:
        """The two largest values that come into [start, stop), and the dimensions along which they may be cut."""
        inside = set(self.nodes[start:stop])
        coming = dict.fromkeys(n for node in self.nodes[start:stop] for n in node.all_input_nodes if n not in inside)
        values = [
            n for n in coming if isinstance(n.meta.get("val"), torch.Tensor) and n.name not in self.problem.program.weights
        ]
        values.sort(key=lambda n: -n.meta["val"].numel())
        if self.hosting is not None and any(self.touching[start:stop]):
            at = self.hosting.axis
            return [
                (n, n.meta["val"].dim() + at) for n in values[:2] if n.meta["val"].dim() >= -at and n.meta["val"].shape[at] > 1
            ]
        return [(n, d) for n in values[:2] for d in range(n.meta["val"].dim()) if n.meta["val"].shape[d] > 1]

    def region(self, start: int, stop: int, seed: fx.Node, dim: int) -> Region | None:
        """The region of the operators [start, stop), None where there is none. Of equal stretches that of the first one."""
        key = self._key(start, stop, seed, dim)
        if key not in self._regions:
            try:
                region = find_region(self.nodes[start:stop], seed, dim, self.calls, self.hosted)
                self._regions[key] = region if self._hostable(region) else None
            except Untileable:
                self._regions[key] = None
        return self._regions[key]

    def _hostable(self, region: Region) -> bool:
        """Whether what should live on the host can: it is made and read in bands."""
        if self.hosting is None:
            return True
        if any(node in self.hosted for node in (*region.whole, *region.merged)):
            return False
        results = [node for node in region.results if node in self.hosted]
        if any(region.dims[node] != node.meta["val"].dim() + self.hosting.axis for node in results):
            return False
        return self._bands(region, region.usual_tile(2)[0]) is not None

    def _bands(self, region: Region, tile: TileNeeds) -> dict[fx.Node, Part] | None:
        """What a tile reads of values on the host; None where it reads one whole or along another dimension."""
        assert self.hosting is not None
        bands: dict[fx.Node, Part] = {}
        for node in region.ordered:
            step = tile.steps[node]
            if step is None:
                continue
            for argument, need in zip(region.calls.arguments(node), step.needs, strict=True):
                if argument not in self.hosted or argument in region.dims or (need is not None and need.size == 0):
                    continue
                if need is None or need.dim != argument.meta["val"].dim() + self.hosting.axis:
                    return None
                bands[argument] = bands[argument].hull(need) if argument in bands else need
        return bands

    def estimate(self, start: int, stop: int, seed: fx.Node, dim: int, count: int, grain: int | None = None) -> Estimate | None:
        """The stretch in at most `count` tiles along a dimension of the seed; None where it has no region."""
        region = self.region(start, stop, seed, dim)
        if region is None:
            return None
        grain = grain or _grain(region.extent, count)
        key = self._key(start, stop, seed, dim), region.step(count, grain), grain  # as it is for all counts that come to it
        if key not in self._inner:
            try:
                self._inner[key] = self._measure(region, count, grain)
            except Untileable:
                self._inner[key] = None
        inner = self._inner[key]
        if inner is None:
            return None
        whole, workspace = self._whole(region)
        results = inner.result_bytes - self._in_held(region, start)
        return Estimate(inner, self.around_bytes(start, stop) + whole + max(results + inner.tile_bytes, workspace))

    def held_before(self, start: int) -> int:
        """Bytes that are held beyond those of values before an operator."""
        return int(self.held[start]) if self.held is not None else 0

    def around_bytes(self, start: int, stop: int) -> int:
        """What is live in however many tiles: what comes from before, and the weights."""
        return int(self.live_before[start]) + self._weights(start, stop)

    def least_bytes(self, start: int, stop: int, seed: fx.Node, dim: int) -> int:
        """What is live at least, in however many tiles; results included."""
        region = self.region(start, stop, seed, dim)
        assert region is not None
        whole, workspace = self._whole(region)
        return self.around_bytes(start, stop) + whole + max(self._results(region) - self._in_held(region, start), workspace)

    def _results(self, region: Region) -> int:
        """Bytes of the memory that results take: none on the host, none where they are written over something else."""
        if region not in self._result_bytes:
            free = {*self.written_over(region).over, *self.hosted}
            self._result_bytes[region] = sum(dense_bytes(node) for node in region.results if node not in free)
        return self._result_bytes[region]

    def _in_held(self, region: Region, start: int) -> int:
        """Bytes of a result that is just as large as what is held beyond values: it is written there."""
        held = self.held_before(start)
        free = {*self.written_over(region).over, *self.hosted}
        fits = (
            nbytes for node in region.results if node not in free and _NEARLY * held < (nbytes := dense_bytes(node)) <= held
        )
        return next(fits, 0)

    def written_over(self, region: Region) -> Places:
        """The results that are written over values, and how these are read."""
        if region not in self._places:
            results = [node for node in region.results if node not in self.hosted]
            try:
                tiles = (region.usual_tile(3)[0],)
                self._places[region] = places_over(
                    region, tiles, results, lambda node: self.over, lambda node: self.windows, self.hosted
                )
            except Untileable:  # no estimate is given then
                self._places[region] = Places()
        return self._places[region]

    def _windows(self, region: Region, tile: TileNeeds) -> tuple[dict[fx.Node, int], int]:
        """Bytes of what a tile copies of values that are written over, and of what is kept of all of them."""
        places, found, kept = self.written_over(region), dict[fx.Node, int](), 0
        for value, window in places.windows.items():
            result = next(node for node, over in places.over.items() if over.value is value)
            size = int(value.meta["val"].shape[window.dim])
            part = Part(window.dim, 0, min(tile.written[result].size + window.halo, size))
            found[value] = part_bytes(value, part)
            kept += part_bytes(value, Part(window.dim, 0, window.kept))
        return found, kept

    @cached_property
    def _places(self) -> dict[Region, Places]:
        return {}

    @cached_property
    def has_larger(self) -> bool:
        """Whether there are values over which smaller ones could be written, by their shapes."""
        values = {(t.shape, t.dtype): n for n in self.nodes if isinstance(t := n.meta.get("val"), torch.Tensor)}
        pairs = itertools.permutations(values.values(), 2)
        return any(fits_over(value, node, larger=True) for value, node in pairs)

    @cached_property
    def _result_bytes(self) -> dict[Region, int]:
        return {}

    def _whole(self, region: Region) -> tuple[int, int]:
        """Bytes of what runs before the loop, and the most workspace of its operators."""
        whole = sum(nbytes for node in region.whole for nbytes in self.born(node))
        return whole, max((self._workspace(node) for node in region.whole), default=0)

    def holds(self, start: int, stop: int, seed: fx.Node, dim: int, count: int, grain: int) -> bool:
        """Whether every tile can be computed, not only the usual one; where not, no estimate is given from now on."""
        region = self.region(start, stop, seed, dim)
        assert region is not None
        key = self._key(start, stop, seed, dim), region.step(count, grain), grain
        inner = self._inner[key]
        assert inner is not None
        if key not in self._holding:
            try:
                region.tiles(count, grain)
                self._holding.add(key)
            except Untileable:
                self._inner[key] = None
        return self._inner[key] is not None

    @cached_property
    def _holding(self) -> set[object]:
        return set()

    def surroundings(self, start: int, stop: int) -> object:
        """All that estimates for what lies in [start, stop) depend on besides the region itself."""
        begun, spanning = self._visited
        live, within = self.live_before[max(0, start - 1) : stop + 2], slice(start, stop + 1)
        rows = (live, self.total[within], self.touching[within], begun[within] - begun[start], spanning[within])
        return (self.stretches.number(start, stop), start == 0, *(row.tobytes() for row in rows))

    def _key(self, start: int, stop: int, seed: fx.Node, dim: int) -> object:
        """What makes two stretches equal, cut along a dimension of what comes into them."""
        return self.stretches.number(start, stop), self.stretches.place(seed, start, stop), dim

    @cached_property
    def stretches(self) -> Stretches:
        """What of the program is equal."""
        return Stretches(self.nodes, self.position, self.calls, self.problem.program.weights, self.hosted)

    def _weights(self, start: int, stop: int) -> int:
        """Bytes of the weights that operators [start, stop) read."""
        begun, spanning = self._visited
        return int(begun[stop] - begun[start] + spanning[start]) + self.problem.arena_bytes(self.problem.pinned)

    @cached_property
    def _visited(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of visits that begin before operator i, and of those that began before it and go on; int64[n + 1] each."""
        begun = np.zeros(len(self.nodes) + 2, dtype=np.int64)
        delta = np.zeros(len(self.nodes) + 2, dtype=np.int64)
        for visit in self.problem.visits:
            if visit.weight not in self.problem.pinned:
                nbytes = self.problem.weight_bytes[visit.weight]
                begun[visit.first + 1] += nbytes
                delta[visit.first + 1] += nbytes
                delta[visit.last + 1] -= nbytes
        return np.cumsum(begun)[:-1], np.cumsum(delta)[:-1]

    def born(self, node: fx.Node) -> list[int]:
        """Bytes of the storages that an operator makes."""
        return [nbytes for _, nbytes in self.problem.liveness.born[self.position[node]]]

    def _workspace(self, node: fx.Node) -> int:
        return int(self.problem.liveness.costs[self.position[node]].workspace_bytes)

    def _tile_workspace(self, region: Region, tile: TileNeeds, node: fx.Node, share: float) -> int:
        """Of an operator in a tile. cuDNN's convolutions take the same for smaller images, and parts are copied for them."""
        workspace, step = self._workspace(node), tile.steps[node]
        parts = tile.parts.get(node)
        if (
            self.problem.memory.device == "cuda"
            and node.target is _ATTENTION
            and isinstance(step, Tiled)
            and parts
            and parts[0]
        ):
            return attention_tile_bytes(region.calls.call(node), step.needs, parts[0], self.problem.machine.capability)
        if self.problem.memory.device != "cuda" or node.target not in _CONVOLUTIONS or step is None:
            return int(workspace * share)
        image, need = region.calls.arguments(node)[0], step.needs[0]
        if need is None or need.dim == 0 or ([need] == tile.parts.get(image) and "upsample" not in str(image.target)):
            return workspace
        return workspace + part_bytes(image, need)

    def _measure(self, region: Region, count: int, grain: int) -> Inner:
        """The tile from the middle, replayed: what it makes, until its last reader has run."""
        tile, number = region.usual_tile(count, grain)
        ratios = {node: share_of(node, tile) for node in region.nodes}
        windows, kept = self._windows(region, tile)
        live = most = sum(windows.values())
        added = 0.0
        launch = self.problem.machine.launch_seconds
        readers, order = last_readers(region), set(region.ordered)
        held: dict[int, int] = {}
        for i, node in enumerate(region.ordered):
            share = ratios.get(node, 1 / number)
            workspace = self._tile_workspace(region, tile, node, share)
            for storage, nbytes in self.problem.liveness.born[self.position[node]]:
                if node in ratios:
                    held[storage] = int(nbytes * share)
                    live += held[storage]
            most = max(most, live + workspace + (partial_bytes(node) if node in region.merged else 0))
            for storage in [s for s in held if readers.get(s, -1) <= i]:
                live -= held.pop(storage)
            live -= sum(nbytes for value, nbytes in windows.items() if max(u for u in value.users if u in order) is node)
            seconds = float(self.problem.seconds[self.position[node]])
            if seconds:
                added += launch * number + max(0.0, seconds - launch) * share * number - seconds
        results = self._results(region) + kept
        results += sum(number * partial_bytes(node) for node in region.merged)  # kept until all tiles have run
        traffic = self.problem.machine.memory_bandwidth
        added += sum(2 * dense_bytes(node) / traffic + number * launch for node in region.results)
        added += sum(2 * number * (nbytes / traffic + launch) for nbytes in windows.values())
        if self.hosting is None:
            return Inner(number, grain, most, results, added)
        coming = [part_bytes(node, part) for node, part in (self._bands(region, tile) or {}).items()]
        leaving = [part_bytes(node, tile.written[node]) for node in region.results if node in self.hosted]
        machine = self.problem.machine
        added += sum(2 * n / traffic + launch for n in coming) * number
        whole = sum(float(self.problem.seconds[self.position[node]]) for node in region.ordered)
        read, write = (sum(machine.copy_seconds(n) for n in each) for each in (coming, leaving))
        added = max(added, number * read - whole, number * write - whole) + read + write
        return Inner(number, grain, most + 2 * sum(coming) + sum(leaving), results, added)


def _grain(extent: int, count: int) -> int:
    """Tiles begin at round places, where that does not make them much larger: fewer bodies, whole rows of what is upsampled."""
    size = -(-extent // count)
    return next(grain for grain in (16, 8, 4, 2, 1) if size >= 4 * grain or grain == 1)
