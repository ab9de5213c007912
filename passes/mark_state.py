"""Marks the weights that the program writes as state (I6): they stay on the device and are never streamed.

before:  add_(w_count, 1)                Weight(name='count', state=False)
after:   the same graph                  Weight(name='count', state=True)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from passes.program import Program, storage_id, tensors_of


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that an operator's schema says it writes."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    written: list[fx.Node] = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node):
                written.append(item)
    return written


def written_inputs(program: Program) -> tuple[str, ...]:
    """The inputs whose storage some operator writes, in their order."""
    written = {storage_id(t) for node in program.ops() for target in written_nodes(node) for t in tensors_of(target)}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(name for name in program.inputs if any(storage_id(t) in written for t in tensors_of(nodes[name])))


@dataclass(frozen=True)
class MarkState:
    """Ensures: `Weight.state` holds for exactly those weights whose storage some operator writes."""

    name: str = "mark_state"

    def apply(self, program: Program) -> Program:
        owner = {storage_id(n.meta["val"]): n.name for n in program.graph.nodes if n.name in program.weights}
        state = {
            owner[storage]
            for node in program.ops()
            for target in written_nodes(node)
            for storage in map(storage_id, tensors_of(target))
            if storage in owner
        }
        weights = {key: replace(weight, state=key in state) for key, weight in program.weights.items()}
        return replace(program, weights=weights)
