"""Brings a large weight in parts of rows: each part computes its output features, and is a weight like any other.

before:  y = linear(x, w, b)
after:   y = new_empty(x, [.., n]); into = slice(y, -1, 0, n/2); p = linear(x, w__rows_0, slice(b, 0, 0, n/2)); copy_(into, p);
         into_1 = slice(y, -1, n/2, n); ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from passes.big_weights import Reader, readers_of, sliceable, why_not_sliced
from passes.known_calls import run_on_fakes
from passes.program import Program, Weight, is_symbolic
from passes.refresh_values import carry_on
from runtime.errors import PlanFileError
from runtime.executable import Rows

aten = torch.ops.aten
# Kernels like their sizes and addresses in multiples of it.
_ROUND_ROWS = 64


@dataclass(frozen=True)
class WeightSlices:
    """Weight `weight` (a placeholder's name) comes in `count` parts of about as many rows, from the first to the last."""

    weight: str
    count: int


@dataclass(frozen=True)
class SliceWeights:
    """Requires: a canonical program. `passes.big_weights.sliceable` names the weights that can be cut.

    Ensures: part k of weight `w` is the weight `w__rows_k` (`Weight.rows`), and `w` is gone; every reader of it is one operator
    a part, each behind the one before. The same mathematics (I5): each feature is the same sum, but a kernel for another shape
    may add it up in another order, so results are equal within 1e-12 in fp64 and not always bit for bit. The result of a
    reader has the strides that it had.

    Raises:
        PlanFileError: a weight is unknown or cannot be cut so.
    """

    slices: tuple[WeightSlices, ...]
    name: str = "slice_weights"

    def apply(self, program: Program) -> Program:
        if not self.slices:
            return program
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        for cut in self.slices:
            _refuse_impossible(program, cut, nodes)
        parts = {cut.weight: _parts(program.weights[cut.weight], cut.count) for cut in self.slices}
        if len(parts) != len(self.slices):
            names = ", ".join(cut.weight for cut in self.slices)
            raise PlanFileError(f"the plan cuts a weight twice: {names}; plan the model again")
        for key, own in parts.items():
            _rewrite(graph, nodes[key], own)
        weights: dict[str, Weight] = {}
        for key, known in program.weights.items():
            weights |= {part.node: part for part in parts[key]} if key in parts else {key: known}
        return program.with_graph(graph, weights=weights)


def row_ranges(rows: int, count: int) -> tuple[tuple[int, int], ...]:
    """`count` ranges that follow each other from 0 to `rows`; they begin at multiples of 64 where there are enough rows."""
    step = _ROUND_ROWS if rows >= count * _ROUND_ROWS else 1
    starts = [rows * k // (count * step) * step for k in range(count)]
    return tuple(zip(starts, [*starts[1:], rows], strict=True))


def slices_of(program: Program, most_bytes: int) -> tuple[WeightSlices, ...]:
    """Every weight of more than `most_bytes` that can be cut, in the fewest even parts of at most about so many bytes."""
    found = []
    for key, rows in sliceable(program).items():
        count = min(rows, -(-program.weights[key].nbytes // most_bytes))
        if count > 1:
            found.append(WeightSlices(key, count))
    return tuple(found)


def _refuse_impossible(program: Program, cut: WeightSlices, nodes: Mapping[str, fx.Node]) -> None:
    if cut.weight not in program.weights:
        raise PlanFileError(f"the plan has slices of {cut.weight}, which {program.name} has not; plan the model again")
    reason, rows = why_not_sliced(program, nodes[cut.weight]), program.weights[cut.weight].spec.shape[:1]
    if reason is None and not 2 <= cut.count <= rows[0]:
        reason = f"it has {rows[0]} rows, and comes in 2 parts or more"
    if reason is not None:
        raise PlanFileError(f"{cut.weight} cannot be cut into {cut.count} parts: {reason}; plan the model again")


def _parts(weight: Weight, count: int) -> list[Weight]:
    rows = weight.spec.shape[0]
    parts = []
    for index, (start, stop) in enumerate(row_ranges(rows, count)):
        spec = replace(weight.spec, shape=(stop - start, *weight.spec.shape[1:]), offset=0)
        parts.append(replace(weight, node=f"{weight.node}__rows_{index}", spec=spec, rows=Rows(start, stop, rows)))
    return parts


def _rewrite(graph: fx.Graph, whole: fx.Node, parts: list[Weight]) -> None:
    readers = readers_of(whole)
    arrivals = [(part, _placeholder(graph, whole, part)) for part in parts]
    for reader in readers:
        _Unrolled(graph, reader).rewrite(arrivals)
    for view in list(whole.users):
        graph.erase_node(view)  # its transpose, which nobody reads any more
    graph.erase_node(whole)


def _placeholder(graph: fx.Graph, whole: fx.Node, part: Weight) -> fx.Node:
    with graph.inserting_before(whole):
        node = graph.create_node("placeholder", part.node, name=part.node)
    assert node.name == part.node
    with whole.meta["val"].fake_mode:
        own = torch.empty_strided(part.spec.shape, part.spec.stride, dtype=part.spec.dtype)
    node.meta = {**whole.meta, "val": own.requires_grad_(part.spec.grad)}
    return node


class _Unrolled:
    """One reader as one operator a part, in its place."""

    def __init__(self, graph: fx.Graph, reader: Reader) -> None:
        self.graph, self.reader, self.node = graph, reader, reader.node
        self._symbolic = is_symbolic(reader.node)

    def rewrite(self, parts: list[tuple[Weight, fx.Node]]) -> None:
        with self.graph.inserting_before(self.node):
            whole = self._result()
            for index, (part, arrival) in enumerate(parts):
                assert part.rows is not None
                self._one(whole, index, part.rows, arrival)
        self.node.replace_all_uses_with(whole)
        carry_on({whole: self.node.meta["val"]})  # what looks at it is in its memory now
        self.graph.erase_node(self.node)

    def _one(self, whole: fx.Node, index: int, rows: Rows, arrival: fx.Node) -> None:
        into = self._call(f"into_{index}", aten.slice.Tensor, whole, self.reader.dim, rows.start, rows.stop)
        arguments = list(self.node.args)
        view = self.reader.view
        if view is not None:
            arrival = self._call(f"t_{index}", _overload(view), arrival, *view.args[1:])
        arguments[self.reader.weight] = arrival
        bias = None if self.reader.bias is None else arguments[self.reader.bias]
        if isinstance(bias, fx.Node):
            assert self.reader.bias is not None
            last = bias.meta["val"].dim() - 1
            arguments[self.reader.bias] = self._call(f"bias_{index}", aten.slice.Tensor, bias, last, rows.start, rows.stop)
        made = self._call(f"rows_{index}", _overload(self.node), *arguments, **self.node.kwargs)
        made.meta["untileable"] = "computes a part of the features already"
        self._call(f"copied_{index}", aten.copy_.default, into, made)

    def _result(self) -> fx.Node:
        val = self.node.meta["val"]
        source: Any = self.node.args[0] if self.node.target is not aten.addmm.default else self.node.args[1]
        if self._symbolic:  # without numbers: the source has all sizes but the last
            narrow = self._call("shape", aten.slice.Tensor, source, -1, 0, 1)
            sizes = [-1] * (val.dim() - 1) + [int(val.shape[-1])]
            wide = self._call("wide", aten.expand.default, narrow, sizes)
            return self._call("whole", aten.empty_like.default, wide, memory_format=torch.contiguous_format)
        shape, stride = [int(n) for n in val.shape], [int(n) for n in val.stride()]
        if val.is_contiguous():
            return self._call("whole", aten.new_empty.default, source, shape)
        return self._call("whole", aten.new_empty_strided.default, source, shape, stride)

    def _call(self, suffix: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """An operator before the reader, called after it, with what it gives on fakes."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=f"{self.node.name}__{suffix}")
        node.meta = {key: value for key, value in self.node.meta.items() if key != "val"}
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = next(v.fake_mode for v in self._fakes())
        if self._symbolic:
            with mode, torch.no_grad(), enable_python_dispatcher():
                node.meta["val"] = target(*values, **named)
        else:
            node.meta["val"] = run_on_fakes(target, values, named, mode)
        return node

    def _fakes(self) -> Iterator[Any]:
        values = (n.meta.get("val") for n in self.node.all_input_nodes)
        return (v for v in values if hasattr(v, "fake_mode"))


def _overload(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target
