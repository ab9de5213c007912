"""Makes regions run tile by tile.

before:  a = conv2d(x, w); y = silu(a)
after:   y = empty_strided(...); loop([x, w, y])     y[.., lo:hi, ..] = silu(conv2d(x[.., lo - 1 : hi + 1, ..], w))

Requires: a canonical program; regions do not overlap.
Ensures: the same mathematics (I5); results of a region are complete after the loop, in buffers of their own, or over a value
that nothing reads any more: then they are an `alias` of it, or of a part, which canonical programs do not have.
Raises: Untileable, where a decision cannot be applied; PlanFileError, where it names what is not there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.buffers import empty_strided
from passes.find_region import find_region
from passes.known_calls import run_on_fakes
from passes.loop import Loop
from passes.program import Program, tensors_of
from passes.refresh_values import carry_on, value_of
from passes.regions import Calls, Region, Tile, TileNeeds
from passes.tile_body import Buffers, bands_of, make_runs, note_tile
from passes.tile_rules import Reduced, Untileable, reduce_parts
from passes.tile_rules.base import Part
from passes.write_over import Over, Places, Window, places_over
from runtime import ops
from runtime.errors import PlanFileError

aten = torch.ops.aten


@dataclass(frozen=True)
class TileRegions:
    """`tiles`: the regions, in program order.

    Of their results, `hosted` live on the host, band by band, and `over` may be written over values that are larger, or of
    which tiles read more than the rows that they write.
    """

    tiles: tuple[Tile, ...]
    hosted: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    name: str = "tile_regions"

    def apply(self, program: Program) -> Program:
        program = program.with_graph(program.copy_graph())
        tiler = _Tiler(program.graph, frozenset(self.hosted), frozenset(self.over))
        for decision in self.tiles:
            tiler.tile(decision)
        for node in program.ops():
            reader = next((user for user in node.users if user.target is not ops.loop), None)
            if node.target is ops.host and reader is not None:
                raise Untileable(f"{reader.name} reads {node.name}, which lives on the host, as a whole")
        return program


def stretch_of(nodes: Mapping[str, fx.Node], tile: Tile) -> tuple[list[fx.Node], fx.Node]:
    """The operators from first to last, and the seed; `nodes` by name.

    Raises:
        PlanFileError: the program has no such nodes, or not in this order.
    """
    for name in (tile.first, tile.last, tile.seed):
        if name not in nodes:
            raise PlanFileError(f"the plan tiles at {name!r}, which this program does not have; plan the model again")
    for name in (tile.first, tile.last):
        if nodes[name].op != "call_function":
            raise PlanFileError(f"the plan tiles at {name!r}, which is no operator of this program; plan the model again")
    stretch = [nodes[tile.first]]
    while stretch[-1] is not nodes[tile.last]:
        if stretch[-1].op == "output":
            raise PlanFileError(
                f"the plan tiles from {tile.first!r} to {tile.last!r}, which comes before it; plan the model again"
            )
        stretch.append(stretch[-1].next)
    return stretch, nodes[tile.seed]


class _Tiler:
    """Changes one graph, region by region. By name, results that live on the host, and that may be over larger values."""

    def __init__(self, graph: fx.Graph, hosted: Collection[str], over: Collection[str]) -> None:
        self._graph, self._hosted, self._over = graph, hosted, over
        self._nodes = {node.name: node for node in graph.nodes}
        self._on_host: set[fx.Node] = set()

    def tile(self, decision: Tile) -> None:
        """Puts a loop in place of a region's operators."""
        stretch, seed = stretch_of(self._nodes, decision)
        region = find_region(stretch, seed, decision.dim, Calls(), self._on_host)
        tiles = region.tiles(decision.count, decision.grain)
        if len(tiles) < 2:
            return
        graph, taken = self._graph, set(self._nodes)
        with graph.inserting_after(stretch[-1]):
            end = graph.call_function(ops.free, ())  # a place to insert at, taken out below
        with graph.inserting_before(end):
            unhosted = [node for node in region.results if node.name not in self._hosted]
            places = places_over(region, tiles, unhosted, self._is_over, self._is_over)
            results = self._results(region, places)
            stacks = {node: _stack(graph, region, node, dim, len(tiles)) for node, dim in region.merged.items()}
            loop = self._loop(region, tiles, results, stacks, places, taken)
            merged = {node: _merge(graph, region, node, dim, stacks[node]) for node, dim in region.merged.items()}
        graph.erase_node(end)
        _replace(graph, region, results, merged)
        loop.name = f"{region.ordered[-1].name}_tiles"
        for run in loop.meta["loop"].runs:
            for inner, operand in zip(run.placeholders, loop.all_input_nodes, strict=False):
                inner.name = operand.name
        for node in region.ordered:
            del self._nodes[node.name]
        made = (*results.values(), *stacks.values(), *merged.values(), *loop.all_input_nodes, loop)
        self._nodes |= {node.name: node for node in made}

    def _is_over(self, node: fx.Node) -> bool:
        return node.name in self._over

    def _results(self, region: Region, places: Places) -> dict[fx.Node, fx.Node]:
        """Where results are written: over a value that nothing reads any more, where there is one."""
        results: dict[fx.Node, fx.Node] = {}
        for node in region.results:
            if node not in places.over:
                results[node] = self._result(node, region.dims[node])
                continue
            results[node] = made = self._alias(places.over[node], node)
            made.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        return results

    def _alias(self, over: Over, node: fx.Node) -> fx.Node:
        """Another name for a value, or for as much of it as a result takes."""
        value = over.value
        if over.dim is not None:
            bounds = over.start, over.start + int(node.meta["val"].shape[over.dim])
            value = _call(self._graph, aten.slice.Tensor, value, over.dim, *bounds, name=f"{node.name}_over")
        return _call(self._graph, aten.alias.default, value, name=node.name)

    def _result(self, node: fx.Node, dim: int) -> fx.Node:
        """Where a result is written."""
        if node.name not in self._hosted:
            made = _buffer(self._graph, node, tensors_of(node)[0])
        else:
            made = _host(self._graph, len(self._on_host), node, dim)
            self._on_host.add(made)
        made.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        return made

    def _loop(
        self,
        region: Region,
        tiles: Sequence[TileNeeds],
        results: Mapping[fx.Node, fx.Node],
        stacks: Mapping[fx.Node, fx.Node],
        places: Places,
        taken: set[str],
    ) -> fx.Node:
        graph = self._graph
        bands = [bands_of(region, tile) for tile in tiles]
        coming = [_following(bands[i + 1 :]) for i in range(len(bands))]
        sizes = {node: max(band[node].size for band in bands if node in band) for node in _following(bands)}
        slots = {node: _slot(graph, node, node.name, size) for node, size in sizes.items()}
        for node, buffer in results.items():
            if buffer in self._on_host:
                slots[buffer] = _slot(graph, buffer, node.name, max(tile.written[node].size for tile in tiles))
        kept = {node: _kept(graph, node, window) for node, window in places.windows.items() if window.kept}
        buffers = Buffers(results, stacks, slots, kept, places.windows)
        operands = [*region.operands, *results.values(), *stacks.values(), *slots.values(), *kept.values()]
        index = {node: i for i, node in enumerate(operands)}
        sheets = [note_tile(region, tile, i, index, buffers, bands[i], coming[i]) for i, tile in enumerate(tiles)]
        loop = graph.call_function(ops.loop, (tuple(operands),))
        loop.meta["loop"] = Loop(make_runs(sheets, operands, taken), _label(region, len(tiles)))
        loop.meta |= {k: v for k, v in region.ordered[-1].meta.items() if k in ("nn_module_stack", "stack_trace")}
        return loop


def _call(graph: fx.Graph, target: Any, *args: Any, name: str) -> fx.Node:
    """An operator, with what it gives on fakes."""
    made = graph.create_node("call_function", target, args, name=name)
    made.meta["val"] = value_of(made)
    return made


def _label(region: Region, count: int) -> str:
    dims = sorted({region.dims[node] for node in region.results} | set(region.merged.values()))
    return f"{count} tiles of dimension {', '.join(map(str, dims))}"


def _buffer(graph: fx.Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    """An uninitialised tensor for a result, laid out as that was where it was dense, and as such otherwise."""
    return empty_strided(graph, node.name, tuple(like.shape), dense_strides(like), like)


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dense strides in the order of the tensor's own."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]))
    strides, step = [0] * tensor.dim(), 1
    for dim in order:
        strides[dim] = step
        step *= max(int(tensor.shape[dim]), 1)
    return tuple(strides)


def _host(graph: fx.Graph, index: int, node: fx.Node, dim: int) -> fx.Node:
    """Room on the host for a result, in bands along `dim`."""
    like = tensors_of(node)[0]
    args = (index, [int(n) for n in like.shape], dim, like.dtype)
    made = graph.create_node("call_function", ops.host, args, name=node.name)
    with like.fake_mode:  # type: ignore[attr-defined]
        made.meta["val"] = ops.host(*args)
    return made


def _following(bands: Sequence[Mapping[fx.Node, Part]]) -> dict[fx.Node, Part]:
    """Of every value on the host the band that is read first."""
    found: dict[fx.Node, Part] = {}
    for band in bands:
        found = {**band, **found}
    return found


def _slot(graph: fx.Graph, value: fx.Node, name: str, size: int) -> fx.Node:
    """Device memory for one band of `size` of a value that lives on the host."""
    like, dim = value.meta["val"], value.args[2]
    count = like.numel() // like.shape[dim] * size
    return empty_strided(graph, f"{name}_slot", (count,), (1,), like)


def _kept(graph: fx.Graph, value: fx.Node, window: Window) -> fx.Node:
    """Device memory for the rows of a value that a tile keeps for the next one."""
    like = value.meta["val"]
    shape = tuple(window.kept if dim == window.dim else int(n) for dim, n in enumerate(like.shape))
    return empty_strided(graph, f"{value.name}_kept", shape, tuple(torch.empty(shape, device="meta").stride()), like)


def _stack(graph: fx.Graph, region: Region, node: fx.Node, dim: int, count: int) -> fx.Node:
    """Room for the partial results of all tiles."""
    call = region.calls.call(node)
    size = call.tensors[0].shape[dim]
    reduced = reduce_parts(call, Part(dim, 0, max(1, size // count)))
    like = _partial(region, node, reduced)
    shape = (count, *like.shape)
    return empty_strided(graph, f"{node.name}_parts", shape, tuple(torch.empty(shape, device="meta").stride()), like)


def _partial(region: Region, node: fx.Node, reduced: Reduced) -> torch.Tensor:
    """A partial result, on fakes."""
    values = []
    mode = next(t.fake_mode for n in region.calls.arguments(node) for t in tensors_of(n))  # type: ignore[attr-defined]
    with mode, torch.no_grad():
        for argument, need in zip(region.calls.arguments(node), reduced.needs, strict=True):
            whole = argument.meta["val"]
            values.append(whole if need is None else whole.narrow(need.dim, need.start, need.size))
        return reduced.partial(lambda target, *args, **kwargs: target(*args, **kwargs), values)


def _merge(graph: fx.Graph, region: Region, node: fx.Node, dim: int, stack: fx.Node) -> fx.Node:
    size = region.calls.call(node).tensors[0].shape[dim]
    reduced = reduce_parts(region.calls.call(node), Part(dim, 0, size))

    def run(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.create_node("call_function", target, args, kwargs, name=f"{node.name}_merged")
        fakes, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta["val"] = run_on_fakes(target, fakes, named, stack.meta["val"].fake_mode)
        return made

    return reduced.merge(run, stack)


def _replace(graph: fx.Graph, region: Region, results: Mapping[fx.Node, fx.Node], merged: Mapping[fx.Node, fx.Node]) -> None:
    """Readers after the region read buffers and merged results, which take the names of what they replace."""
    inside = {*region.nodes, *region.merged}
    for old, new in {**results, **merged}.items():
        for user in list(old.users):
            if user not in inside:
                user.replace_input_with(old, new)
    for node in reversed(region.ordered):
        graph.erase_node(node)
    for old, new in {**results, **merged}.items():
        new.name = old.name
    # What lives on the host is laid out otherwise there, which none of its readers sees.
    changed = {new: old.meta["val"] for old, new in {**results, **merged}.items() if new.target is not ops.host}
    carry_on(changed)
