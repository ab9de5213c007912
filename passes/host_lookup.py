"""Looks rows of a table up where it lives, on the host: only the rows that are read are copied to the device.

before:  y = embedding(w_table, ids)
after:   y = lookup("table.weight", ids)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.big_weights import embeddings_of, why_not_looked_up
from passes.program import Program
from passes.spec import TensorSpec
from runtime import ops
from runtime.errors import PlanFileError


@dataclass(frozen=True)
class HostLookup:
    """Requires: a canonical program. `weights` are placeholders' names; `host_lookups` gives those for which it can be.

    Ensures: no `embedding` reads them, and they are in `Program.tables`. A table that something else reads too (a tied
    `lm_head`) stays a weight for that reader; others are weights of the device no more. Bit for bit the same (I5), but that an
    index outside of the table raises `RowError`. The host waits for the indices: on CUDA that synchronises it with the
    current stream, since they may be computed there.

    Raises:
        PlanFileError: a weight is unknown, or no row of it can be looked up.
    """

    weights: tuple[str, ...]
    name: str = "host_lookup"

    def apply(self, program: Program) -> Program:
        if not self.weights:
            return program
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        weights, tables = dict(program.weights), dict(program.tables)
        for key in self.weights:
            if key not in weights:
                raise PlanFileError(f"the plan looks rows up in {key}, which {program.name} has not; plan the model again")
            reason = why_not_looked_up(program, program.node(key))
            if reason is not None:
                raise PlanFileError(f"{key} cannot be looked up on the host: {reason}; plan the model again")
            weight = weights[key]
            tables[weight.name] = weight
            for reader in embeddings_of(nodes[key]):
                _look_up(graph, reader, weight.name)
            if not nodes[key].users:
                graph.erase_node(nodes[key])
                del weights[key]
        return program.with_graph(graph, weights=weights, tables=tables)


def looked_up(table: TensorSpec, indices: torch.Tensor) -> torch.Tensor:
    """What a look-up gives for (fake) indices, as a new tensor like them."""
    sizes: list[Any] = [*indices.shape, *table.shape[1:]]
    return torch.empty(sizes, dtype=table.dtype, device=indices.device)


def _look_up(graph: fx.Graph, reader: fx.Node, name: str) -> None:
    with graph.inserting_before(reader):
        found = graph.call_function(ops.lookup, (name, reader.args[1]))
    found.meta = dict(reader.meta)
    reader.replace_all_uses_with(found)
    graph.erase_node(reader)
    found.name = reader.name
