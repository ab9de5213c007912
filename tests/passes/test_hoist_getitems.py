"""`HoistGetitems` on a hand-built graph."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from passes.hoist_getitems import HoistGetitems
from tests.passes.programs import nodes_calling, text, traced


def test_members_follow_their_operator_in_order() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = x.split(2)
        return torch.sin(first) + second

    program = traced(function, torch.ones(4))
    graph = program.copy_graph()
    _, late = nodes_calling(graph, operator.getitem)
    next(n for n in graph.nodes if n.name == "sin").append(late)
    assert [n.name for n in program.with_graph(graph).ops()] == ["split", "getitem", "sin", "getitem_1", "add"]
    assert text(HoistGetitems().apply(program.with_graph(graph))).splitlines()[1:] == [
        "split = split.Tensor(arg_0, 2)",
        "getitem = split[0]",
        "getitem_1 = split[1]",
        "sin = sin(getitem)",
        "add = add.Tensor(sin, getitem_1)",
        "return add",
    ]
