"""Inlines regions that only switch a mode which is already so: `with torch.autocast(enabled=False)`, `torch.no_grad()`.

before:  r = wrap_with_autocast('cpu', bfloat16, False, False, body, x); y = r[0]
after:   y = <the nodes of body, on x>
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.program import Program
from runtime.errors import CaptureError


@dataclass(frozen=True)
class InlineRegions:
    """Requires: autocast is off around the program and it runs without grad. Ensures: no `get_attr`, no such regions.

    Raises:
        CaptureError: a region switches autocast on, or is another higher-order operator.
    """

    name: str = "inline_regions"

    def apply(self, program: Program) -> Program:
        if not any(n.op == "get_attr" for n in program.graph.nodes):
            return program
        owner = program.graph.owning_module
        graph = fx.Graph()
        memo: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                memo[node] = _submodule(owner, str(node.target))
            else:
                memo[node] = _copy(graph, node, memo)
        return program.with_graph(graph)


def _submodule(owner: fx.GraphModule | None, path: str) -> Any:
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _copy(graph: fx.Graph, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
    name = getattr(node.target, "__name__", str(node.target))
    if name in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
        return _inline(graph, node, name, memo)
    first = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(first, fx.Node) and isinstance(memo[first], tuple):
        return memo[first][node.args[1]]  # a member of an inlined region
    if any(isinstance(memo[n], fx.GraphModule) for n in node.all_input_nodes):
        raise CaptureError(f"the program contains {name} ({node.name}), which cannot be planned; avoid it in this method")
    if node.op == "output":
        return graph.output(fx.map_arg(node.args[0], lambda n: memo[n]))
    return graph.node_copy(node, lambda n: memo[n])


def _inline(graph: fx.Graph, node: fx.Node, name: str, memo: dict[fx.Node, Any]) -> tuple[Any, ...]:
    if name == "wrap_with_autocast":
        _, _, enabled, _, body, *operands = node.args
        if enabled:
            raise CaptureError(
                f"the program switches autocast on inside ({node.name}); a plan keeps dtypes as captured: "
                "cast the module itself, for example with .to(torch.bfloat16)"
            )
    else:
        _, body, *operands = node.args
    region: fx.GraphModule = memo[body]  # type: ignore[index]
    inner: dict[fx.Node, Any] = {}
    operand = iter(operands)
    result: Any = ()
    for sub in region.graph.nodes:
        if sub.op == "placeholder":
            inner[sub] = fx.map_arg(next(operand), lambda n: memo[n])
        elif sub.op == "get_attr":
            inner[sub] = _submodule(region, str(sub.target))
        elif sub.op == "output":
            result = fx.map_arg(sub.args[0], lambda n: inner[n])
        else:
            inner[sub] = _copy(graph, sub, inner)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
