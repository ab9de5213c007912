"""Makes the end of every value explicit: the program frees it right after its last use, before anything else happens.

before:  a = linear(x, w); b = gelu(a); y = add(b, x)
after:   a = linear(x, w); b = gelu(a); free(a); y = add(b, x); free(b)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.program import Program
from runtime import ops

_VALUELESS = {ops.prefetch, ops.evict, ops.free, *ops.NUMBERS}


@dataclass(frozen=True)
class InsertFrees:
    """Requires: everything is in its final place. Ensures: every value but inputs, resident weights and outputs is freed once.

    A value nobody uses is freed at once.
    """

    name: str = "insert_frees"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        order = {node: i for i, node in enumerate(graph.nodes)}
        ending: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function" and node.target not in _VALUELESS:
                last = max(node.users, key=order.__getitem__, default=node)
                if last.op != "output":
                    ending.setdefault(last, []).append(node)
        for last, values in ending.items():
            with graph.inserting_after(last):
                graph.call_function(ops.free, tuple(values))
        return program.with_graph(graph)
