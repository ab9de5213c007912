"""Computes every size that a program needs at its top, from the sizes of its inputs.

A size that is read off an intermediate keeps that intermediate alive until then, and says nothing to a reader. Afterwards no
number depends on a tensor but an input, so numbers have no part in liveness.

before:  s = sym_size.int(x, 0); ...; n = sym_size.int(y, 2); m = mul(s, n); v = view(z, [m, 8])
after:   batch = size(x, 0); height = size(x, 2); v = view(z, [integer("{0} * {1}", batch, height), 8])
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from passes.dims import Dims, dim_symbol, python_text
from passes.program import Program
from runtime import ops
from runtime.errors import UnknownSize

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)


@dataclass(frozen=True)
class SizesFirst:
    """Requires: `Program.dims`. Ensures: numbers come only from `ops.size` of inputs and `ops.integer`, all at the top.

    Raises:
        UnknownSize: a size depends on data.
    """

    name: str = "sizes_first"

    def apply(self, program: Program) -> Program:
        dims = program.dims
        assert dims is not None
        graph = program.copy_graph()
        numbers = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), _NUMBERS)]
        top = _Top(graph, program, dims)
        for node in numbers:
            expr = dims.expr(node.meta["val"])
            value = top.constant(expr) if expr.is_number else top.node(expr, node)
            _replace(node, value)
        for node in reversed(numbers):
            graph.erase_node(node)
        return program.with_graph(graph)


def _replace(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)


class _Top:
    """Nodes for dims and formulas, each made once, in front of the first operator."""

    def __init__(self, graph: fx.Graph, program: Program, dims: Dims) -> None:
        self._graph, self._dims = graph, dims
        nodes = {node.name: node for node in graph.nodes}
        self._inputs = [nodes[name] for name in program.inputs]
        self._first = next(n for n in graph.nodes if n.op != "placeholder")
        self._made: dict[sympy.Expr, fx.Node] = {}

    def constant(self, expr: sympy.Expr) -> int | float | bool:
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        return int(expr) if expr.is_Integer else float(expr)

    def node(self, expr: sympy.Expr, like: fx.Node) -> fx.Node:
        """The node for an expression; `like` has its value in the capture's symbols."""
        if expr not in self._made:
            unknown = {str(s) for s in expr.free_symbols} - set(self._dims.names)
            if unknown:
                raise UnknownSize(f"{like.name}: the size {expr} depends on data ({', '.join(sorted(unknown))})")
            operands = [self._dim(name) for name in self._dims.names if dim_symbol(name) in expr.free_symbols]
            if expr.is_Symbol:
                return operands[0]
            self._made[expr] = self._insert(ops.integer, (_template(expr, self._dims), *operands), "size")
            self._made[expr].meta["val"] = like.meta["val"]
        return self._made[expr]

    def _dim(self, name: str) -> fx.Node:
        symbol = dim_symbol(name)
        if symbol in self._made:
            return self._made[symbol]
        leaf, axis, how = min(
            ((leaf, axis, how) for leaf, axes in enumerate(self._dims.axes) for axis, how in axes.items() if how.dim == name),
            key=lambda found: (found[2].scale, abs(found[2].shift), found[0]),
        )
        tensor = self._inputs[leaf]
        size = tensor.meta["val"].shape[axis]
        if (how.scale, how.shift) == (1, 0):
            self._made[symbol] = self._insert(ops.size, (tensor, axis), name)
            self._made[symbol].meta["val"] = size
            return self._made[symbol]
        whole = self._insert(ops.size, (tensor, axis), f"{name}_axis")
        whole.meta["val"] = size
        shifted = f"({{0}} - {how.shift})" if how.shift else "{0}"
        self._made[symbol] = self._insert(ops.integer, (f"{shifted} // {how.scale}", whole), name)
        self._made[symbol].meta["val"] = (size - how.shift) // how.scale
        return self._made[symbol]

    def _insert(self, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        with self._graph.inserting_before(self._first):
            return self._graph.create_node("call_function", target, args, name=name)


def _template(expr: sympy.Expr, dims: Dims) -> str:
    """The formula with `{0}`, `{1}`, ... for its dims, in their order."""
    used = [name for name in dims.names if dim_symbol(name) in expr.free_symbols]
    names = {dim_symbol(name): sympy.Symbol(f"SIZE{string.ascii_letters[i]}", integer=True, positive=True)
             for i, name in enumerate(used)}  # fmt: skip
    text = python_text(expr.xreplace(names))
    for i, placeholder in enumerate(names.values()):
        text = text.replace(str(placeholder), f"{{{i}}}")
    return text
