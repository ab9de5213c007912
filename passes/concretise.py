"""Fixes the sizes of a program whose sizes are symbols: everything that works on concrete programs then works on it.

before:  batch = size(x, 0); v = view(x, [batch, integer("8 * {0}", height)])      f32[s0, 8, s1]
after:   v = view(x, [2, 128])                                                     f32[2, 8, 16]
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.dims import SCOPE, Dims, Evaluator
from passes.host_lookup import looked_up
from passes.known_calls import run_on_fakes
from passes.program import Program, operator_name
from runtime import ops
from runtime.errors import UnknownSize


@dataclass(frozen=True)
class Concretise:
    """Requires: `SizesFirst` has run. Ensures: the same operators under the same names, in the same order, without numbers of
    their own; `meta["val"]` is what every operator gives at these sizes, found by running it on fakes.

    Works on emitted programs too, so that the checker proves what runs. `known` is the same program, canonical, at the same
    sizes, where there is one: its values are taken instead of running everything again.

    Raises:
        UnknownSize: an operator does not run at these sizes.
    """

    sizes: Mapping[str, int]
    known: Program | None = None
    name: str = "concretise"

    def apply(self, program: Program) -> Program:
        assert program.dims is not None
        run = _Run(program, program.dims, dict(self.sizes), self.known)
        with run.mode, torch.no_grad():
            graph = run.graph()
        return replace(program, graph=graph, dims=None, origin=program)


class _Run:
    """One evaluation: numbers are computed, operators run on fakes of the program's own mode."""

    def __init__(self, program: Program, dims: Dims, sizes: dict[str, int], known: Program | None) -> None:
        self._program, self._dims, self._sizes = program, dims, sizes
        values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder")
        self.mode: FakeTensorMode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
        self._known = {n.name: n.meta["val"] for n in known.graph.nodes if "val" in n.meta} if known is not None else {}
        self._numbers: dict[fx.Node, Any] = {}
        self._values: dict[fx.Node, Any] = {}

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        memo: dict[fx.Node, fx.Node] = {}
        for node in self._program.graph.nodes:
            if node.target in ops.NUMBERS:
                self._numbers[node] = self._number(node)
                continue
            new = graph.node_copy(node, lambda n: self._numbers[n] if n in self._numbers else memo[n])
            if new.name != node.name:
                new._rename(node.name)
            memo[node] = new
            if "val" in node.meta:
                new.meta["val"] = self._values[node] = self._value(node)
        return graph

    def _number(self, node: fx.Node) -> Any:
        if node.target is ops.size:
            leaf = self._program.inputs.index(node.args[0].name)  # type: ignore[union-attr]
            axis = self._dims.axes[leaf][node.args[1]]  # type: ignore[index]
            return axis.size(self._sizes[axis.dim])
        text, *operands = node.args
        return eval(str(text).format(*(self._numbers[n] for n in operands)), dict(SCOPE))  # type: ignore[index]

    def _value(self, node: fx.Node) -> Any:
        val = node.meta["val"]
        if node.name in self._known:
            return self._known[node.name]
        if node.op == "placeholder":
            return self._input(val) if isinstance(val, torch.Tensor) and node.name in self._program.inputs else val
        if node.target is ops.lookup:
            name, indices = node.args
            return looked_up(self._program.tables[str(name)].spec, self._values[indices])  # type: ignore[index]
        if node.op != "call_function" or node.target in ops.ALL:
            return val  # weights that arrive are as they were
        if node.target is operator.getitem:
            source, index = node.args
            return self._values[source][index]  # type: ignore[index]
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._numbers[n] if n in self._numbers else self._values[n]
        )
        target: Any = node.target
        try:
            return run_on_fakes(target, args, kwargs, self.mode)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            at = ", ".join(f"{name}={n}" for name, n in self._sizes.items())
            first = next(iter(str(error).splitlines()), "")
            raise UnknownSize(f"{node.name}: {operator_name(target)} does not run at {at} ({first})") from error

    def _input(self, val: torch.Tensor) -> torch.Tensor:
        numbers = [self._size(n) for n in (*val.shape, *val.stride())]
        shape, stride = numbers[: val.dim()], numbers[val.dim() :]
        return torch.empty_strided(shape, stride, dtype=val.dtype)

    def _size(self, value: Any) -> int:
        return int(value) if isinstance(value, int) else int(Evaluator(self._dims.expr(value))(self._sizes))
