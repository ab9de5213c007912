"""Copies outputs that are weights or views of them: arena bytes are refilled, results must last.

before:  return (y, w_embedding)
after:   c = clone(w_embedding); return (y, c)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.program import Program, storage_id


@dataclass(frozen=True)
class FreshOutputs:
    """Ensures: no output shares storage with a weight (their values are equal; the aliasing is given up)."""

    name: str = "fresh_outputs"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        owned = {storage_id(n.meta["val"]) for n in graph.nodes if n.name in program.weights}
        fresh: dict[fx.Node, fx.Node] = {}

        def copy(node: fx.Node) -> fx.Node:
            val = node.meta.get("val")
            if not isinstance(val, torch.Tensor) or storage_id(val) not in owned:
                return node
            if node not in fresh:
                with graph.inserting_before(output):
                    fresh[node] = graph.call_function(torch.ops.aten.clone.default, (node,))
                with val.fake_mode:  # type: ignore[attr-defined]
                    fresh[node].meta["val"] = torch.ops.aten.clone.default(val)
            return fresh[node]

        output.args = (fx.map_arg(output.args[0], copy),)
        return program.with_graph(graph)
