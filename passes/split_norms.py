"""Splits norms with statistics over a whole image or volume in two, so that each half can be tiled.

before:  y = group_norm(x, 32, w, b, 1e-5)
after:   s = group_statistics(x, 32)                     (n, mean, M2) by group: merged from parts of x
         y = group_normalise(x, s, w, b, 1e-5)           element by element

Requires: a canonical program. Ensures: the same mathematics (I5), statistics in fp32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.known_calls import run_on_fakes
from passes.program import Program
from passes.refresh_values import carry_on
from runtime.errors import PlanFileError

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitNorms:
    """`norms`: the nodes to split, by name; the statistics are called `<name>_statistics`."""

    norms: tuple[str, ...]
    name: str = "split_norms"

    def apply(self, program: Program) -> Program:
        if not self.norms:
            return program
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        changed: dict[fx.Node, Any] = {}
        for name in self.norms:
            if name not in nodes or not can_split(nodes[name]):
                raise PlanFileError(f"the plan splits {name!r}, which is no norm of this program; plan the model again")
            old = nodes[name].meta["val"]
            changed[_split(graph, nodes[name])] = old
        carry_on(changed)
        return program.with_graph(graph)


def splittable_norms(program: Program) -> tuple[str, ...]:
    """The norms that have two halves."""
    return tuple(node.name for node in program.ops() if can_split(node))


def can_split(node: fx.Node) -> bool:
    """Whether it is a group or instance norm that takes its statistics from its input."""
    if node.target not in (aten.group_norm.default, aten.instance_norm.default):
        return False
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point or node.meta["val"].dim() < 3:
        return False
    return node.target is aten.group_norm.default or bool(_argument(node, "use_input_stats"))


def _split(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.target is aten.group_norm.default:
        x, groups = node.args[0], node.args[1]
    else:
        x = node.args[0]
        groups = int(node.meta["val"].shape[1])
    weight, bias, eps = (_argument(node, name) for name in ("weight", "bias", "eps"))
    library = torch.ops.vramplan
    with graph.inserting_before(node):
        statistics = _call(graph, library.group_statistics.default, (x, groups), f"{node.name}_statistics", node)
        normalised = _call(graph, library.group_normalise.default, (x, statistics, weight, bias, eps), node.name, node)
    node.replace_all_uses_with(normalised)
    graph.erase_node(node)
    normalised.name = node.name
    return normalised


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], name: str, like: fx.Node) -> fx.Node:
    node = graph.create_node("call_function", target, args, name=name)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    fakes = fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = run_on_fakes(target, fakes, {}, like.meta["val"].fake_mode)
    return node


def _argument(node: fx.Node, name: str) -> Any:
    """An argument by its name in the schema."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise AssertionError(f"{node.target} has no argument {name!r}")
