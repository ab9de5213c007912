"""Gives every reader of a view of a weight its own view, right before it: a weight is then needed only where it is read.

before:  t = t(w); ... far away ...; y = mm(x, t); z = mm(y, t)
after:   ... far away ...; t = t(w); y = mm(x, t); t_1 = t(w); z = mm(y, t_1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.drop_noops import is_effectful
from passes.program import Program, storage_id


@dataclass(frozen=True)
class SinkWeightViews:
    """Ensures: a pure single-tensor view of a read-only weight has one reader, the node behind it. Values are unchanged."""

    name: str = "sink_weight_views"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        readonly = {
            storage_id(n.meta["val"]) for n in graph.nodes if n.name in program.weights and not program.weights[n.name].state
        }

        def is_view(node: fx.Node) -> bool:
            val = node.meta.get("val")
            return (
                node.op == "call_function"
                and isinstance(node.target, torch._ops.OpOverload)
                and isinstance(val, torch.Tensor)
                and storage_id(val) in readonly
                and len(node.all_input_nodes) == 1
                and not is_effectful(node)
            )

        # From the last view to the first: a chain of views sinks behind its tail.
        for node in reversed([n for n in graph.nodes if is_view(n)]):
            users = sorted(node.users)
            for user in users[1:]:
                with graph.inserting_before(user):
                    own = graph.node_copy(node)
                user.replace_input_with(node, own)
            if users and node.next is not users[0]:
                users[0].prepend(node)
        return program.with_graph(graph)
