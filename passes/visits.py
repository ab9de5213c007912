"""Visits: where in the program each weight is needed.

A visit is a maximal interval of operators over which a weight (or a view of it) is held. A tied weight read at both ends of a
model has two visits, so nothing forces it to stay in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.program import Program, storage_id, tensors_of


@dataclass(frozen=True, order=True)
class Visit:
    """Weight `weight` (a placeholder's name) is read by operators in [first, last], both inclusive."""

    first: int
    last: int
    weight: str


def weight_visits(program: Program) -> tuple[Visit, ...]:
    """All visits, ordered by first use. `SinkWeightViews` keeps them short."""
    position = {node: i for i, node in enumerate(program.ops())}
    end = len(position) - 1
    visits: list[Visit] = []
    for weight in (n for n in program.graph.nodes if n.name in program.weights):
        storage = storage_id(weight.meta["val"])
        spans = sorted((position.get(user, end), _reach(user, storage, position, end)) for user in weight.users)
        merged: list[list[int]] = []
        for first, last in spans:
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        visits.extend(Visit(first, last, weight.name) for first, last in merged)
    return tuple(sorted(visits))


def _reach(node: fx.Node, storage: int, position: dict[fx.Node, int], end: int) -> int:
    """The last operator that sees the weight's storage through this reader."""
    if node not in position:
        return end
    last = position[node]
    if any(storage_id(t) == storage for t in tensors_of(node)):
        last = max([last, *(_reach(user, storage, position, end) for user in node.users)])
    return last
