"""Turns a fresh buffer that is written slice by slice into one value that is made of the slices.

before:  y = empty_like(x); copy_(slice(y, 3, 0, end, 2), a); copy_(slice(y, 3, 1, end, 2), b); z = permute(y, ..)
after:   y = reshape(stack([a, b], 4), y's shape); z = permute(y, ..)

A region that is tiled stops at what writes in place; rotary positions are often written so. All slices have the same step,
which is the number of them (interleaved). The price is that all parts exist at the same time, so this is for programs that
are tiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program import Program, is_symbolic
from passes.refresh_values import carry_on, value_of

aten = torch.ops.aten
_FRESH = {aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format, aten.zeros_like.default}


@dataclass(frozen=True)
class GatherWrites:
    """Requires: recorded values are refreshed. Ensures: the same values bit for bit (I5); the buffer's name stays.

    A buffer stays as it is where it is read before all of it is written, where slices overlap or leave something out, where a
    part has another shape than its slice, or where it is not contiguous.
    """

    name: str = "gather_writes"

    def apply(self, program: Program) -> Program:
        if all(node.target not in _FRESH for node in program.ops()) or any(is_symbolic(node) for node in program.graph.nodes):
            return program
        graph = program.copy_graph()
        position = {node: i for i, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            writes = _writes(node, position) if node.target in _FRESH else None
            if writes is not None:
                _gather(graph, node, writes)
        return program.with_graph(graph)


def _writes(buffer: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node] | None:
    """The copies that fill a buffer, by where their slices begin; None where that is not all that happens to it."""
    whole = buffer.meta["val"]
    found: dict[int, fx.Node] = {}
    dims, steps, others = set(), set(), []
    user: Any
    copy: Any
    for user in buffer.users:
        copy = next(iter(user.users), None)
        if user.target is not aten.slice.Tensor or copy is None or copy.target is not aten.copy_.default:
            others.append(user)
            continue
        view, value = user.meta["val"], copy.args[1]
        if len(user.users) != 1 or copy.args[0] is not user or copy.users or len(user.args) != 5 or len(copy.args) != 2:
            return None
        if not isinstance(value, fx.Node) or tuple(value.meta["val"].shape) != tuple(view.shape):
            return None
        found[int(user.args[2])] = copy
        dims.add(int(user.args[1]) % whole.dim())
        steps.add(int(user.args[4]))
    if len(dims) != 1 or steps != {len(found)} or sorted(found) != list(range(len(found))) or not whole.is_contiguous():
        return None
    size = whole.shape[next(iter(dims))]
    if size % len(found) or sum(_elements(copy.args[0]) for copy in found.values()) != whole.numel():
        return None
    if any(position[user] < position[copy] for user in others for copy in found.values()):
        return None
    return [found[start] for start in sorted(found)]


def _elements(node: Any) -> int:
    return int(node.meta["val"].numel())


def _gather(graph: fx.Graph, buffer: fx.Node, copies: list[fx.Node]) -> None:
    whole = buffer.meta["val"]
    views: list[Any] = [copy.args[0] for copy in copies]
    dim = int(views[0].args[1]) % whole.dim()

    def call(target: Any, *args: Any, name: str) -> fx.Node:
        made = graph.create_node("call_function", target, args, name=name)
        made.meta = {key: value for key, value in copies[-1].meta.items() if key != "val"}
        made.meta["val"] = value_of(made)
        return made

    with graph.inserting_before(max(copies).next):
        parts = []
        for copy in copies:
            value: Any = copy.args[1]
            if value.meta["val"].dtype != whole.dtype:
                value = call(aten.to.dtype, value, whole.dtype, name=f"{value.name}_cast")
            parts.append(value)
        stacked = call(aten.stack.default, parts, dim + 1, name=f"{buffer.name}_parts")
        made = call(aten.reshape.default, stacked, [int(n) for n in whole.shape], name=f"{buffer.name}_whole")
    for user in list(buffer.users):
        if user not in views:
            user.replace_input_with(buffer, made)
    for copy, view in zip(copies, views, strict=True):
        graph.erase_node(copy)
        graph.erase_node(view)
    name = buffer.name
    graph.erase_node(buffer)
    made.name = name
    carry_on({made: whole})
