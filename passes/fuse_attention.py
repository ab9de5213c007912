"""Attention that is written out becomes one operator, which needs not keep the scores of all queries at once.

before:  s = matmul(q, transpose(k)); t = mul(s, 0.125); u = add(t, mask); p = softmax(u, -1); y = matmul(p, v)
after:   y = scaled_dot_product_attention(q, k, v, mask, scale=0.125)

Requires: a canonical program. Ensures: the same mathematics (I5): 1e-12 in fp64, and what was rounded to half precision on the
way is not any more (in a float16 row that -65504 hides all over, it no longer swallows the scores). Whatever masks do becomes
one additive mask. A query that may look at no key at all (-inf everywhere) gives NaN in a softmax and zeros in that operator.
So where a mask is not known to be finite, rows of which all is -inf are made NaN:

         y = add(scaled_dot_product_attention(q, k, v, mask, ...), mul(amax(mask, [-1], True), 0.0))
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from passes.attention_patterns import SOFTMAXES, Add, Attention, Factor, Fill, Finder, Scale, fits
from passes.attention_products import Operand
from passes.drop_noops import is_effectful
from passes.known_calls import run_on_fakes
from passes.program import Program, storage_id, tensors_of
from passes.refresh_values import carry_on
from passes.value_bounds import bounds
from runtime.errors import CaptureError, PlanFileError

aten = torch.ops.aten

# CUDA kernels raise 2 to scores times log2(e), which makes -inf of the least float (ATen/transformers/cuda/mem_eff_attention/
# kernel_forward.h; not confirmed on a device). What is less than this weighs nothing either way.
_LEAST = -(2.0**126)
_SHORT = (torch.float32, torch.bfloat16)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def fusable_attentions(program: Program) -> tuple[str, ...]:
    """The softmaxes, by name, whose products `FuseAttention` can make one operator of; in order."""
    finder = Finder(program.graph, program.constants)
    return tuple(node.name for node in program.ops() if node.target in SOFTMAXES and finder.find(node) is not None)


@dataclass(frozen=True)
class FuseAttention:
    """`softmaxes`: those to fuse, by name. What takes the place of the last product has its name; new nodes begin with it.

    Raises:
        PlanFileError: a name is no softmax of an attention that can be fused.
    """

    softmaxes: tuple[str, ...]
    name: str = "fuse_attention"

    def apply(self, program: Program) -> Program:
        if not self.softmaxes:
            return program
        try:
            return self._fused(program, keep_strides=False)
        except CaptureError:  # something behind an attention does not take its strides, such as a view of a sum
            return self._fused(program, keep_strides=True)

    def _fused(self, program: Program, keep_strides: bool) -> Program:
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        finder = Finder(graph, program.constants)
        changed: dict[fx.Node, Any] = {}
        for name in self.softmaxes:
            found = finder.find(nodes[name]) if name in nodes and nodes[name].op == "call_function" else None
            if found is None:
                raise PlanFileError(
                    f"the plan fuses the attention around {name!r}, which is no softmax of this program whose products can be "
                    "one operator; plan the model again"
                )
            old = found.last.meta["val"]
            changed[_Builder(graph, finder, found, program.weights).build(keep_strides)] = old
        carry_on(changed)
        left = {node.name for node in graph.nodes if node.op == "placeholder"}
        return program.with_graph(graph, weights={k: w for k, w in program.weights.items() if k in left})


class _Builder:
    """Writes one attention into a graph."""

    def __init__(self, graph: fx.Graph, finder: Finder, found: Attention, weights: Collection[str]) -> None:
        self._graph, self._written, self._found, self._weights = graph, finder.written, found, weights
        self._name = found.last.name

    def build(self, keep_strides: bool) -> fx.Node:
        """The node that takes the place of the last product, which is gone afterwards with all that only it needed."""
        found, last = self._found, self._found.last
        with self._graph.inserting_before(last):
            result = self._result()
            if keep_strides:
                result = self._with_strides(result, last.meta["val"].stride())
        old = last.meta["val"]
        last.replace_all_uses_with(result)
        _loosen(result, old)
        self._erase(found.chain)
        result.name = self._name
        return result

    def _result(self) -> fx.Node:
        found = self._found
        query, scale, mask = self._steps()
        value = self._brought(found.weighted.value, found.value_batch, "value")
        key = self._brought(found.key, found.score_batch, "key")
        where = None if mask is None else self._four_dimensions(mask)
        ready = where if where is None else self._bounded(where)
        attention = aten.scaled_dot_product_attention.default
        result = self._call(attention, (query, key, value, ready), "attention", scale=scale)
        if where is not None and self._may_be_empty(where):
            most = self._call(aten.amax.default, (where, [-1], True), "most")
            result = self._call(aten.add.Tensor, (result, self._call(aten.mul.Tensor, (most, 0.0), "seen")), "checked")
        rows = tuple(result.meta["val"].shape[-2:])
        result = self._reshaped(result, (*found.value_batch, *rows), "unfolded")
        order = found.weighted.order
        return self._permuted(result, order, "turned")

    def _steps(self) -> tuple[fx.Node, float, fx.Node | None]:
        """The query with what is the same for all keys, the scale, and the sum of all masks."""
        found = self._found
        query, scale, mask = self._expanded(found.query, found.score_batch, "query"), 1.0, None
        for step in found.steps:
            if isinstance(step, Scale):
                scale *= step.by
                if mask is not None and step.by != 1:
                    mask = self._call(aten.mul.Tensor, (mask, step.by), "mask")
            elif isinstance(step, Factor):
                target = aten.div.Tensor if step.divides else aten.mul.Tensor
                query = self._call(target, (query, step.tensor), "query")
            elif isinstance(step, Add):
                mask = self._added(mask, step)
            else:
                mask = self._filled(mask, step)
        return self._folded(query, "query"), scale, mask

    def _added(self, mask: fx.Node | None, step: Add) -> fx.Node:
        term = self._fitted(step.tensor, step.batch)
        if step.times != 1:
            term = self._call(aten.mul.Tensor, (term, step.times), "mask")
        return term if mask is None else self._call(aten.add.Tensor, (mask, term), "mask")

    def _filled(self, mask: fx.Node | None, step: Fill) -> fx.Node:
        condition = self._fitted(step.condition, step.batch)
        value = step.value
        if self._found.dtype in _SHORT and math.isfinite(value):
            value = max(value, _LEAST)
        if mask is None:
            mask = self._call(aten.new_zeros.default, (self._found.query.node, []), "zero")
        if step.holds:
            return self._call(aten.where.ScalarSelf, (condition, value, mask), "mask")
        return self._call(aten.where.ScalarOther, (condition, mask, value), "mask")

    def _fitted(self, tensor: fx.Node, at: tuple[int, ...]) -> fx.Node:
        """A mask in the four dimensions of the operator."""
        found = fits(tensor, at, self._found.batch)
        assert found is not None
        wide, shape = found
        if prod(wide) != tensor.meta["val"].numel():
            tensor = self._call(aten.expand.default, (tensor, list(wide)), "mask")
        return self._reshaped(tensor, shape, "mask")

    def _four_dimensions(self, mask: fx.Node) -> fx.Node:
        """With rows that lie dense, as kernels want them."""
        shape = mask.meta["val"].shape
        mask = self._reshaped(mask, ((1,) * (4 - len(shape)) + tuple(shape)), "mask")
        dense = mask.meta["val"].stride(-1) == 1 or mask.meta["val"].shape[-1] == 1
        return mask if dense else self._call(aten.contiguous.default, (mask,), "mask")

    def _bounded(self, mask: fx.Node) -> fx.Node:
        """Without numbers so low that kernels make -inf of them."""
        found = bounds(mask, self._written)
        if self._found.dtype not in _SHORT or (found is not None and found[0] >= _LEAST):
            return mask
        return self._call(aten.clamp_min.default, (mask, _LEAST), "mask")

    def _may_be_empty(self, mask: fx.Node) -> bool:
        """Whether some row of the mask may be -inf, +inf or NaN all over."""
        found = bounds(mask, self._written)
        return found is None or not all(abs(each) < float("inf") for each in found)

    def _brought(self, operand: Operand, batch: tuple[int, ...], name: str) -> fx.Node:
        return self._folded(self._expanded(operand, batch, name), name)

    def _expanded(self, operand: Operand, batch: tuple[int, ...], name: str) -> fx.Node:
        """An operand with its dimensions in order, and all of the batch."""
        node, dims = _untwisted(operand)
        node = self._permuted(node, [dim for dim in dims if dim is not None], name)
        for index, dim in enumerate(dims):
            if dim is None:
                node = self._call(aten.unsqueeze.default, (node, index), name)
        wanted = (*batch, *node.meta["val"].shape[-2:])
        if tuple(node.meta["val"].shape) != wanted:
            node = self._call(aten.expand.default, (node, list(wanted)), name)
        return node

    def _folded(self, node: fx.Node, name: str) -> fx.Node:
        """With two batch dimensions, and rows that lie dense, as kernels want them."""
        node = self._reshaped(node, (*self._found.batch, *node.meta["val"].shape[-2:]), name)
        dense = node.meta["val"].stride(-1) == 1 or node.meta["val"].shape[-1] == 1
        return node if dense else self._call(aten.contiguous.default, (node,), name)

    def _reshaped(self, node: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
        if tuple(node.meta["val"].shape) == tuple(shape):
            return node
        return self._call(aten.reshape.default, (node, list(shape)), name)

    def _permuted(self, node: fx.Node, order: Sequence[int], name: str) -> fx.Node:
        if list(order) == list(range(len(order))):
            return node
        return self._call(aten.permute.default, (node, list(order)), name)

    def _with_strides(self, node: fx.Node, strides: tuple[int, ...]) -> fx.Node:
        """The same value in memory as it was before."""
        if node.meta["val"].stride() == strides:
            return node
        order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
        node = self._call(aten.contiguous.default, (self._permuted(node, order, "laid"),), "laid")
        return self._permuted(node, [order.index(dim) for dim in range(len(order))], "laid")

    def _call(self, target: Any, args: tuple[Any, ...], name: str, **kwargs: Any) -> fx.Node:
        last = self._found.last
        node = self._graph.create_node("call_function", target, args, kwargs, name=f"{self._name}_{name}")
        node.meta = {key: last.meta[key] for key in ("nn_module_stack", "stack_trace") if key in last.meta}
        fakes, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = run_on_fakes(target, fakes, named, last.meta["val"].fake_mode)
        return node

    def _erase(self, chain: tuple[fx.Node, ...]) -> None:
        """Removes the nodes of a chain, and what nobody reads without it."""
        gone: set[fx.Node] = set(chain)
        left: list[fx.Node] = []
        for node in reversed(chain):
            left += node.all_input_nodes
            self._graph.erase_node(node)
        while left:
            node = left.pop()
            if node not in gone and not node.users and self._is_removable(node):
                gone.add(node)
                left += node.all_input_nodes
                self._graph.erase_node(node)

    def _is_removable(self, node: fx.Node) -> bool:
        weight = node.op == "placeholder" and node.name in self._weights
        return weight or (node.op == "call_function" and not is_effectful(node))


def _untwisted(operand: Operand) -> tuple[fx.Node, tuple[int | None, ...]]:
    """The operand before its dimensions were exchanged, where they are in order there."""
    node, dims = operand.node, list(operand.dims)
    while True:
        args: Any = node.args
        rank = node.meta["val"].dim()
        if node.target is aten.transpose.int:
            order = list(range(rank))
            one, other = args[1] % rank, args[2] % rank
            order[one], order[other] = other, one
        elif node.target is aten.permute.default:
            order = [dim % rank for dim in args[1]]
        else:
            return operand.node, operand.dims
        node, dims = args[0], [None if dim is None else order[dim] for dim in dims]
        if dims == list(range(rank)):
            return node, tuple(dims)


def _loosen(result: fx.Node, old: torch.Tensor) -> None:
    """Makes views of the result reshapes, which take any strides: kernels differ in those that they give."""
    storage = storage_id(old)
    queue = [result]
    while queue:
        for user in queue.pop().users:
            if any(storage_id(tensor) == storage for tensor in tensors_of(user)):
                if user.target in _VIEWS:
                    user.target = aten.reshape.default
                queue.append(user)
