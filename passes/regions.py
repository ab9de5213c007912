"""Regions: which operators of a stretch of the program can run tile by tile, over which dimensions, and what each tile needs.

Starting from one dimension of one value that comes into the stretch, dimensions spread forwards over the tile rules. What has
no rule, or is read as a whole by something in the stretch, runs whole before the loop, with all that it depends on. What
remains is computed for every tile from exactly the parts that the rules ask for, backwards from what is read after the region.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from passes.mark_state import written_nodes
from passes.probe import call_of
from passes.program import storage_id, tensors_of
from passes.tile_rules import Part, Reduced, TileCall, Tiled, Untileable, reduce_parts, tile


@dataclass(frozen=True)
class Tile:
    """The operators from `first` to `last` run tile by tile, as far as they can.

    Attributes:
        seed: a value that comes into the region; `dim` of it is cut, and of everything else what follows from that.
        count: how many tiles, at the most (fewer where the dimension is smaller).
        grain: where tiles begin, in elements of the smallest result: at multiples of it.
    """

    first: str
    last: str
    seed: str
    dim: int
    count: int
    grain: int = 1


class Calls:
    """Tile calls of nodes, and what the rules say to them, each asked once."""

    def __init__(self) -> None:
        self._calls: dict[fx.Node, TileCall] = {}
        self._numbers: dict[fx.Node, int] = {}
        self._keys: dict[object, int] = {}
        self._arguments: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._maps: dict[tuple[fx.Node, int], tuple[int | None, ...] | Untileable] = {}
        self._tiled: dict[tuple[int, tuple[Part | None, ...]], Tiled | Untileable] = {}

    def call(self, node: fx.Node) -> TileCall:
        if node not in self._calls:
            call = call_of(node)
            self._calls[node] = TileCall(node.target, call.args, call.kwargs, call.outputs)
        return self._calls[node]

    def number(self, node: fx.Node) -> int:
        """The same for nodes that are one call on one geometry."""
        if node not in self._numbers:
            key = call_of(node).key if isinstance(node.target, torch._ops.OpOverload) else (node.target, node.args[1:])
            self._numbers[node] = self._keys.setdefault(key, len(self._keys))
        return self._numbers[node]

    def arguments(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes of `TileCall.tensors`, in their order."""
        if node not in self._arguments:
            found: list[fx.Node] = []
            fx.map_arg((node.args, node.kwargs), found.append)
            self._arguments[node] = tuple(n for n in found if isinstance(n.meta.get("val"), torch.Tensor))
        return self._arguments[node]

    def dims(self, node: fx.Node, dim: int) -> tuple[int | None, ...]:
        """For a cut along `dim` of the result: the dimension along which each argument is cut, None where it is read whole.

        Raises:
            Untileable: the rule declines.
        """
        key = node, dim
        if key not in self._maps:
            try:
                self._maps[key] = self._ask(node, dim)
            except Untileable as error:
                self._maps[key] = error
        found = self._maps[key]
        if isinstance(found, Untileable):
            raise found
        return found

    def _ask(self, node: fx.Node, dim: int) -> tuple[int | None, ...]:
        if node.target is operator.getitem:
            return (dim,)
        if "untileable" in node.meta:
            raise Untileable(node.meta["untileable"])
        call = self.call(node)
        parts = []
        for output in call.outputs:
            if dim >= len(output.shape) or output.shape[dim] < 2:
                raise Untileable("has nothing to cut along this dimension")
            middle = output.shape[dim] // 2
            parts.append(Part(dim, middle, middle + 1))
        return tuple(None if need is None else need.dim for need in tile(call, *parts).needs)

    def tile(self, node: fx.Node, parts: tuple[Part | None, ...]) -> Tiled:
        """How these parts of the result come from parts of the arguments; equal calls are asked once.

        Raises:
            Untileable: the rule declines.
        """
        key = self.number(node), parts
        if key not in self._tiled:
            try:
                self._tiled[key] = tile(self.call(node), *parts)
            except Untileable as error:
                self._tiled[key] = error
        found = self._tiled[key]
        if isinstance(found, Untileable):
            raise found
        return found

    def merges(self, node: fx.Node, dim: int) -> tuple[int | None, ...]:
        """As `dims`, for a result that is merged from parts along `dim` of the first argument."""
        if "untileable" in node.meta:
            raise Untileable(node.meta["untileable"])
        call = self.call(node)
        size = call.tensors[0].shape[dim]
        if size < 2:
            raise Untileable("has nothing to cut along this dimension")
        reduced = reduce_parts(call, Part(dim, 0, size // 2))
        return tuple(None if need is None else need.dim for need in reduced.needs)


def sharing(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values are in the memory of a tensor, itself first: views of it, and what it is a view of."""
    storage = storage_id(node.meta["val"])
    found, queue = {node: None}, [node]
    while queue:
        near = queue.pop()
        inputs = near.graph.find_nodes(op="placeholder") if near.op == "placeholder" else ()  # two may be one tensor
        for other in (*near.all_input_nodes, *near.users, *inputs):
            if other not in found and any(storage_id(t) == storage for t in tensors_of(other)):
                found[other] = None
                queue.append(other)
    return list(found)


def writer_of(node: fx.Node) -> fx.Node | None:
    """The last operator that writes to the memory of a tensor; None where none does."""
    return max((user for n in sharing(node) for user in n.users if n in written_nodes(user)), default=None)


@dataclass(frozen=True, eq=False)
class Region:
    """What is computed in tiles, and along which dimension.

    Attributes:
        nodes: the operators that run in tiles, in program order. dims: along which dimension each result is cut.
        merged: operators whose whole result is merged from parts; the dimension along which their first argument is cut.
        whole: operators of the stretch that run before the loop.
        results: of `nodes` those that are read after the region. ordered: all that runs in tiles, in program order.
    """

    calls: Calls
    nodes: tuple[fx.Node, ...]
    dims: Mapping[fx.Node, int]
    merged: Mapping[fx.Node, int]
    whole: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    ordered: tuple[fx.Node, ...]

    @cached_property
    def operands(self) -> tuple[fx.Node, ...]:
        """What is read in tiles and not computed in them: weights, values from before."""
        inside = {*self.nodes, *self.merged}
        found = dict.fromkeys(n for node in (*self.nodes, *self.merged) for n in node.all_input_nodes if n not in inside)
        return tuple(found)

    @cached_property
    def extent(self) -> int:
        """Elements of the smallest dimension that is cut: the largest number of tiles."""
        return min(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        sizes = [int(node.meta["val"].shape[self.dims[node]]) for node in self.results]
        return sizes + [self.calls.call(node).tensors[0].shape[dim] for node, dim in self.merged.items()]

    def step(self, count: int, grain: int) -> int:
        """Elements of the smallest dimension in each of at most `count` tiles, which begin at multiples of `grain`."""
        units = -(-self.extent // grain)
        return -(-units // min(count, units)) * grain

    def cuts(self, size: int, count: int, grain: int) -> list[int]:
        """Where a dimension of `size` elements is cut: of one size but for the last, in step with the smallest one."""
        step = self.step(count, grain)
        ends = [*range(0, self.extent, step), self.extent]
        if size % self.extent == 0:
            return [end * (size // self.extent) for end in ends]
        return [size * end // self.extent for end in ends]

    def tiles(self, count: int, grain: int = 1) -> list[TileNeeds]:
        """What every tile computes, in order."""
        cuts = self._cuts(count, grain)
        number = len(next(iter(cuts.values()))) - 1
        return [self._tile({node: (ends[i], ends[i + 1]) for node, ends in cuts.items()}) for i in range(number)]

    def usual_tile(self, count: int, grain: int = 1) -> tuple[TileNeeds, int]:
        """A tile from the middle, which has a halo on both sides, and how many there are."""
        cuts = self._cuts(count, grain)
        number = len(next(iter(cuts.values()))) - 1
        i = (number - 1) // 2
        return self._tile({node: (ends[i], ends[i + 1]) for node, ends in cuts.items()}), number

    def _cuts(self, count: int, grain: int) -> dict[fx.Node, list[int]]:
        cuts: dict[fx.Node, list[int]] = {}
        for node in self.results:
            cuts[node] = self.cuts(int(node.meta["val"].shape[self.dims[node]]), count, grain)
        for node, dim in self.merged.items():
            cuts[node] = self.cuts(self.calls.call(node).tensors[0].shape[dim], count, grain)
        return cuts

    def _tile(self, wanted: Mapping[fx.Node, tuple[int, int]]) -> TileNeeds:
        parts: dict[fx.Node, list[Part | None]] = {}
        steps: dict[fx.Node, Tiled | Reduced | None] = {}
        written: dict[fx.Node, Part] = {}
        unread: dict[fx.Node, Part] = {}

        def want(node: fx.Node, part: Part | None, index: int = 0) -> None:
            if node not in self.dims:
                return
            if part is None:  # this tile reads all of it
                part = Part(self.dims[node], 0, int(node.meta["val"].shape[self.dims[node]]))
            if part.size == 0:  # an argument of which this tile reads nothing: some element has to be there
                at = min(part.start, int(node.meta["val"].shape[self.dims[node]]) - 1)
                unread.setdefault(node, Part(self.dims[node], at, at + 1))
                return
            held = parts.setdefault(node, [None] * _members(node))
            before = held[index]
            held[index] = part if before is None else before.hull(part)

        for node in self.results:
            written[node] = Part(self.dims[node], *wanted[node])
            want(node, written[node])
        for node in reversed(self.ordered):
            if node in unread and node not in parts:
                parts[node] = [unread[node]]
            if node in self.merged:
                steps[node] = step = reduce_parts(self.calls.call(node), Part(self.merged[node], *wanted[node]))
                for argument, need in zip(self.calls.arguments(node), step.needs, strict=True):
                    want(argument, need)
            elif node not in parts:
                steps[node] = None  # nobody reads this part
            elif node.target is operator.getitem:
                steps[node] = None  # it computes nothing
                want(node.args[0], parts[node][0], node.args[1])  # type: ignore[arg-type]
            else:
                steps[node] = tiled = self.calls.tile(node, tuple(parts[node]))
                for argument, need in zip(self.calls.arguments(node), tiled.needs, strict=True):
                    want(argument, need)
        return TileNeeds(parts, steps, written)


@dataclass(frozen=True, eq=False)
class TileNeeds:
    """One tile: of every value in the region the part that is computed (by member, where it is a tuple), and how.

    `written`: of the region's results the tile's own part, which the computed one contains.
    """

    parts: Mapping[fx.Node, list[Part | None]]
    steps: Mapping[fx.Node, Tiled | Reduced | None]
    written: Mapping[fx.Node, Part]


def is_view(node: fx.Node) -> bool:
    """Whether the result is in storage that was there before."""
    before = {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
    return all(storage_id(t) in before for t in tensors_of(node))


def _members(node: fx.Node) -> int:
    val: Any = node.meta["val"]
    return 1 if isinstance(val, torch.Tensor) else len(val)
