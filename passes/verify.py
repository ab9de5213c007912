"""Well-formedness of a program's graph: checked before and after every pass."""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.program import Program
from runtime import ops


class MalformedProgram(AssertionError):
    """A pass made a graph that breaks the rules of `Program`: our bug, never the user's."""


def verify(program: Program, stage: str) -> None:
    """Definitions come before uses, names are unique, targets are known, placeholders are weights then inputs.

    Raises:
        MalformedProgram: names the pass and prints the neighbouring nodes.
    """
    seen: set[fx.Node] = set()
    names: set[str] = set()
    placeholders: list[str] = []
    nodes = list(program.graph.nodes)
    for index, node in enumerate(nodes):
        problem = _problem(node, seen, names)
        if problem:
            around = "\n".join(f"  {'>' if n is node else ' '} {n.format_node()}" for n in nodes[max(0, index - 5) : index + 6])
            raise MalformedProgram(f"after {stage}: {problem}\n{around}")
        seen.add(node)
        names.add(node.name)
        if node.op == "placeholder":
            placeholders.append(node.name)
    expected = [n for n in placeholders if n in program.weights] + list(program.inputs)
    if placeholders != expected:
        raise MalformedProgram(f"after {stage}: placeholders are {placeholders}, expected weights, then {program.inputs}")


def _problem(node: fx.Node, seen: set[fx.Node], names: set[str]) -> str | None:
    if node.name in names:
        return f"two nodes are called {node.name}"
    missing = [n.name for n in node.all_input_nodes if n not in seen]
    if missing:
        return f"{node.name} uses {', '.join(missing)} before definition"
    if node.op not in ("placeholder", "call_function", "output"):
        return f"{node.name} is a {node.op} node"
    known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem or node.target in ops.ALL
    if node.op == "call_function" and not known:
        return f"{node.name} calls {node.target}, which is no operator overload"
    return None
