"""Marks the parameters that require grad, because operators look at that without autograd too.

`matmul` of a batch by a matrix folds the batch into the rows where the matrix requires grad, and may run a batched product
where it does not (ATen/native/LinearAlgebra.cpp, should_fold): other bits, other bytes. What runs planned must choose as
eager does.

before:  %w_layer_weight : placeholder
after:   %w_layer_weight : placeholder, meta: requires_grad
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from passes.program import Program


def mark_gradients(program: Program, names: Set[str]) -> Program:
    """Ensures: weights of these names, and the meta of their placeholders, say `requires_grad`."""
    graph = program.copy_graph()
    weights = {node: replace(weight, requires_grad=weight.name in names) for node, weight in program.weights.items()}
    for node in graph.nodes:
        if node.name in weights and weights[node.name].requires_grad:
            node.meta["requires_grad"] = True
    return program.with_graph(graph, weights=weights)
