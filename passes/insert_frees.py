"""Makes the end of every value explicit: the program frees it right after its last use, before anything else happens.

before:  a = linear(x, w); b = gelu(a); y = add(b, x)
after:   a = linear(x, w); b = gelu(a); free(a); y = add(b, x); free(b)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.loop import loop_of
from passes.program import Program, copy_graph
from runtime import ops

_VALUELESS = {ops.prefetch, ops.evict, ops.free, ops.loop, ops.ahead, ops.save, *ops.NUMBERS}


@dataclass(frozen=True)
class InsertFrees:
    """Requires: everything is in its final place. Ensures: every value but inputs, resident weights and outputs is freed once.

    A value nobody uses is freed at once.
    """

    name: str = "insert_frees"

    def apply(self, program: Program) -> Program:
        return program.with_graph(_with_frees(program.copy_graph()))


def _with_frees(graph: fx.Graph) -> fx.Graph:
    """Changes the graph and the bodies of its loops, which are copied."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        loop = loop_of(node)
        if loop is not None:
            node.meta["loop"] = loop.map_bodies(lambda body: _with_frees(copy_graph(body)))
        if node.op == "call_function" and node.target not in _VALUELESS and not is_write(node):
            last = max(node.users, key=order.__getitem__, default=node)
            if last.op != "output":
                ending.setdefault(last, []).append(node)
    for last, values in ending.items():
        with graph.inserting_after(last):
            graph.call_function(ops.free, tuple(values))
    return graph


def is_write(node: fx.Node) -> bool:
    """Whether the node is there for what it writes, as in `copy_(target, value)` with nobody to read the result."""
    return node.target is torch.ops.aten.copy_.default and not node.users
