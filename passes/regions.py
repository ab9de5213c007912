"""Regions: which operators of a stretch of the program can run tile by tile, over which dimensions, and what each tile needs.

Starting from one dimension of one value that comes into the stretch, dimensions spread forwards over the tile rules. What has
no rule, or is read as a whole by something in the stretch, runs whole before the loop, with all that it depends on. What
remains is computed for every tile from exactly the parts that the rules ask for, backwards from what is read after the region.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
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

    def cuts(self, size: int, count: int, grain: int) -> list[int]:
        """Where a dimension of `size` elements is cut: of one size but for the last, in step with the smallest one."""
        units = -(-self.extent // grain)
        step = -(-units // min(count, units)) * grain
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
                steps[node] = tiled = tile(self.calls.call(node), *parts[node])
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


def find_region(stretch: Sequence[fx.Node], seed: fx.Node, dim: int, calls: Calls, hosted: Collection[fx.Node] = ()) -> Region:
    """The region of a stretch of operators in program order, cut along dimension `dim` of `seed`, which comes from before it.

    `hosted` values live on the host and are never read whole.

    Raises:
        Untileable: nothing in the stretch can be cut so.
    """
    for node in stretch:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Untileable(f"{node.name} writes to its argument")
    inside = set(stretch)
    if seed in inside:
        raise Untileable(f"{seed.name} does not come from before the region")
    forced: set[fx.Node] = set()
    outer, pulled = {seed: dim}, dict[fx.Node, int]()
    while True:
        spread = _Spread(stretch, outer, calls, forced, hosted, pulled)
        more = spread.demanded - forced
        wanted = {n: d for n, d in spread.outer.items() if n in inside and n not in spread.dims and n not in forced | more}
        if not more and wanted.keys() <= pulled.keys():
            break
        pulled |= wanted
        forced |= _with_ancestors(more, inside)
        outer |= {node: spread.dims[node] for node in forced if node in spread.dims}  # where others of their readers cut them
    tiled = {n for n in stretch if n in spread.dims}
    merged = {n: d for n, d in spread.merged.items() if any(a in tiled for a in calls.arguments(n))}
    nodes = tuple(n for n in stretch if n in tiled)
    results = tuple(n for n in nodes if isinstance(n.meta["val"], torch.Tensor) and any(u not in inside for u in n.users))
    if any(not isinstance(n.meta["val"], torch.Tensor) and any(u not in inside for u in n.users) for n in nodes):
        raise Untileable("the region ends between an operator and the members of its result")
    if not results and not merged:
        raise Untileable("nothing can be cut along this dimension")
    _refuse_two_names(results)
    whole = tuple(n for n in stretch if n not in tiled and n not in merged)
    if any(n in hosted for node in whole for n in node.all_input_nodes):
        raise Untileable("something reads a value that lives on the host as a whole")
    ordered = tuple(n for n in stretch if n in tiled or n in merged)
    return Region(calls, nodes, spread.dims, merged, whole, results, ordered)


class _Spread:
    """One pass over the stretch: dimensions by value, and the values that something reads whole."""

    def __init__(
        self,
        stretch: Sequence[fx.Node],
        outer: Mapping[fx.Node, int],
        calls: Calls,
        forced: set[fx.Node],
        hosted: Collection[fx.Node],
        pulled: Mapping[fx.Node, int],
    ) -> None:
        self.dims: dict[fx.Node, int] = {}
        self.merged: dict[fx.Node, int] = {}
        self.demanded: set[fx.Node] = set()
        self._calls, self._hosted, self._pulled, self._inside = calls, hosted, pulled, set(stretch)
        # Dimensions of values from before the loop: where a reader of only such values is cut, follows from them.
        self.outer = dict(outer)
        for node in stretch:
            if node in forced or not self._cut(node):
                self.demanded |= {n for n in node.all_input_nodes if n in self.dims or n in self.merged}

    def _cut(self, node: fx.Node) -> bool:
        """Gives the node a dimension; False where it has to run whole."""
        if node.target is operator.getitem:
            source = node.args[0]
            for known in (self.dims, self.outer):
                if source in known:
                    known[node] = known[source]  # type: ignore[index]
            return source in self.dims
        if not isinstance(node.target, torch._ops.OpOverload) or any(n in self.merged for n in node.all_input_nodes):
            return False
        arguments = self._calls.arguments(node)
        inner = [n for n in arguments if n in self.dims]
        if not inner and not any(n in self.outer for n in arguments):
            return self._pull(node, arguments)
        best: tuple[int, int] | None = None
        for dim in range(max((t.dim() for t in tensors_of(node)), default=0)):
            whole = self._whole(node, arguments, dim)
            if whole is not None and (best is None or whole < best[0]):
                best = whole, dim
        if not inner and is_view(node) and not any(n in self._hosted for n in arguments):
            if best is not None:  # it costs nothing, and is cut where it is read
                self.outer[node] = best[1]
            return False
        if best is None:
            return self._merge(node, arguments)
        self.dims[node] = best[1]
        for argument, cut in zip(arguments, self._calls.dims(node, best[1]), strict=True):
            if cut is None and argument in self.dims:
                self.demanded.add(argument)
            elif cut is not None and argument not in self.dims:
                self.outer.setdefault(argument, cut)
        return True

    def _pull(self, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """Whether what reads the result in parts has it computed so, from parts of what nothing else has cut."""
        if node not in self._pulled or (is_view(node) and not any(n in self._inside for n in arguments)):
            return False
        try:
            cuts = self._calls.dims(node, self._pulled[node])
        except Untileable:
            return False
        if all(cut is None for cut in cuts):
            return False
        self.dims[node] = self._pulled[node]
        self.outer |= {n: cut for n, cut in zip(arguments, cuts, strict=True) if cut is not None}
        return True

    def _whole(self, node: fx.Node, arguments: Sequence[fx.Node], dim: int) -> int | None:
        """How many inner values a cut along `dim` reads whole; None where it does not fit how they are cut."""
        try:
            cuts = self._calls.dims(node, dim)
        except Untileable:
            return None
        known = [(self.dims.get(a, self.outer.get(a)), cut, a in self.dims) for a, cut in zip(arguments, cuts, strict=True)]
        if any(inner and cut is not None and cut != had for had, cut, inner in known):
            return None
        if not any(cut is not None and cut == had for had, cut, _ in known):
            return None
        return sum(1 for had, cut, inner in known if inner and cut is None)

    def _merge(self, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """Whether the result can be merged from parts of its first argument."""
        if not arguments or arguments[0] not in self.dims:
            return False
        dim = self.dims[arguments[0]]
        try:
            cuts = self._calls.merges(node, dim)
        except Untileable:
            return False
        if any(a in self.dims and cut != self.dims[a] for a, cut in zip(arguments, cuts, strict=True)):
            return False
        self.merged[node] = dim
        return True


def _with_ancestors(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node in found or node not in inside:
            continue
        found.add(node)
        queue.extend(node.all_input_nodes)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether the result is in storage that was there before."""
    before = {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
    return all(storage_id(t) in before for t in tensors_of(node))


def _refuse_two_names(results: Sequence[fx.Node]) -> None:
    """Results have each a memory of their own, so what is written to one of them later would not be in the others."""
    names: dict[int, fx.Node] = {}
    for node in results:
        other = names.setdefault(storage_id(node.meta["val"]), node)
        if other is not node and (writer := writer_of(node)) is not None:
            raise Untileable(f"{writer.name} writes to {other.name}, of which {node.name} is another name")


def _members(node: fx.Node) -> int:
    val: Any = node.meta["val"]
    return 1 if isinstance(val, torch.Tensor) else len(val)
