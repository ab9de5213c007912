"""Computes samples one after another: a stretch of the program once for every slice, each on its own part of what comes in.

before:  y = conv2d(x, w); z = group_norm(y, 32)
after:   z_slices = empty_strided(...); z = alias(z_slices)
         x_of_0 = slice(x, 0, 0, 1); y_of_0 = conv2d(x_of_0, w); z_of_0 = group_norm(y_of_0, 32)
         z_place_of_0 = slice(z, 0, 0, 1); copy_(z_place_of_0, z_of_0); x_of_1 = slice(x, 0, 1, 2); ...

A loop of tiles ends where a value is needed whole, as the statistics of a norm need it, and there the values of all samples
exist. Here there is no loop: each slice is a program of its own for all that cuts, splits and streams afterwards. The price is
that weights are read once for each slice, and that the program is so many times as long.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.buffers import empty_strided
from passes.find_region import find_region
from passes.known_calls import run_on_fakes
from passes.program import Program, tensors_of
from passes.refresh_values import carry_on, value_of
from passes.regions import Calls, Region, Tile, TileNeeds
from passes.tile_body import Buffers, note_tile
from passes.tile_regions import dense_strides, stretch_of
from passes.tile_rules import Untileable
from runtime import ops

aten = torch.ops.aten
_KEPT = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class UnrollSlices:
    """`slices`: the stretches, in program order; `count` is that of the slices (fewer where the dimension is smaller).

    Requires: a canonical program that writes nothing in place within the stretches.
    Ensures: the same mathematics (I5). Operator `op` of slice 2 is called `op_of_2`. What of a stretch reads weights alone is
    computed for each slice, what else does not depend on the slice once, before all of them. Results keep their names.
    Raises: Untileable, where an operator cannot be cut so; PlanFileError, where a decision names what is not there.
    """

    slices: tuple[Tile, ...]
    name: str = "unroll_slices"

    def apply(self, program: Program) -> Program:
        if not self.slices:
            return program
        program = program.with_graph(program.copy_graph())
        for decision in self.slices:
            stretch, seed = stretch_of({node.name: node for node in program.graph.nodes}, decision)
            region = find_region(stretch, seed, decision.dim, Calls())
            if region.merged:
                raise Untileable(f"{next(iter(region.merged)).name} needs all slices of what it reads")
            tiles = region.tiles(decision.count, decision.grain)
            if len(tiles) > 1:
                _Unroller(program, region, stretch).unroll(tiles)
        return program


class _Unroller:
    """Puts the slices of one region in its place."""

    def __init__(self, program: Program, region: Region, stretch: list[fx.Node]) -> None:
        self._graph, self._region, self._end = program.graph, region, stretch[-1]
        self._names = {node.name: node for node in program.graph.nodes}
        self._of_weights = of_weights(region.whole, program.weights)
        self._copies: dict[fx.Node, fx.Node] = {}  # of this slice
        self._slice = 0

    def unroll(self, tiles: list[TileNeeds]) -> None:
        region, graph = self._region, self._graph
        with graph.inserting_after(self._end):
            end = graph.call_function(ops.free, ())  # a place to insert at, taken out below
        with graph.inserting_before(end):
            results = {node: self._result(node) for node in region.results}
            operands = [*region.operands, *results.values()]
            index = {node: i for i, node in enumerate(operands)}
            for self._slice, tile in enumerate(tiles):
                self._copies = {}
                sheet = note_tile(region, tile, self._slice, index, Buffers(results, {}, {}), {}, {})
                sheet.play(lambda i: self._operand(operands[i]), self._call)
        graph.erase_node(end)
        inside = {*region.nodes}
        for old, new in results.items():
            old.replace_all_uses_with(new, lambda user: user not in inside)
        before = {new: old.meta["val"] for old, new in results.items()}
        for node in reversed(region.ordered):
            graph.erase_node(node)
        for node in reversed(region.whole):
            if node in self._of_weights and not node.users:
                graph.erase_node(node)
        for old, new in results.items():
            new.name = old.name
        carry_on(before)

    def _result(self, node: fx.Node) -> fx.Node:
        """Memory for a result: an `alias` of new memory is a value that is complete once all its parts are written."""
        like = tensors_of(node)[0]
        buffer = empty_strided(self._graph, f"{node.name}_slices", tuple(like.shape), dense_strides(like), like)
        result = self._graph.create_node("call_function", aten.alias.default, (buffer,))
        result.meta["val"] = value_of(result)
        for made in (buffer, result):
            made.meta |= _kept(node)
        return result

    def _operand(self, node: fx.Node) -> fx.Node:
        """What a slice reads from before; of what depends on weights alone a copy of its own."""
        if node not in self._of_weights:
            return node
        if node not in self._copies:
            copied = self._graph.node_copy(node, self._operand)
            copied.name = self._unused(f"{node.name}_of_{self._slice}")
            copied.meta["val"] = value_of(copied)
            self._copies[node] = copied
        return self._copies[node]

    def _call(self, name: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A step of a slice, named after the node that it is for, or after what it does for that."""
        base, _, what = name.rpartition("_")
        source = self._names.get(base)
        made = self._graph.create_node("call_function", target, args, kwargs)
        made.name = self._unused(f"{base if what == 'part' else name}_of_{self._slice}")
        made.meta |= _kept(source) if source is not None else _kept(args[0])  # a member of what comes before
        fakes, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        modes = (t.fake_mode for n in self._region.nodes for t in tensors_of(n) if hasattr(t, "fake_mode"))
        made.meta["val"] = run_on_fakes(target, fakes, named, next(modes))
        return made

    def _unused(self, name: str) -> str:
        found, number = name, 1
        while found in self._names:
            found, number = f"{name}_{number}", number + 1
        self._names[found] = self._end
        return found


def of_weights(nodes: Iterable[fx.Node], weights: Collection[str]) -> set[fx.Node]:
    """Of operators in program order those that depend on weights alone, and give the same each time."""
    found: set[fx.Node] = set()
    for node in nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not random and node.all_input_nodes and all(n in found or n.name in weights for n in node.all_input_nodes):
            found.add(node)
    return found


def _kept(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _KEPT if key in node.meta}
