"""Removes what computes nothing: dropout in eval, metadata asserts, casts to the same thing, dead code.

before:  a = dropout(x, 0.1, False); b = to.dtype(a, float32); _assert_tensor_metadata(b); y = gelu(b)
after:   y = gelu(x)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from passes.program import Program, geometry, storage_id
from runtime import ops

aten = torch.ops.aten
_ASSERTS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default,
}  # fmt: skip
_DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_MAYBE_SAME = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.contiguous.default, aten.type_as.default,
    aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default, aten.expand_as.default,
    aten.expand.default, aten.view.default, aten.reshape.default,
}  # fmt: skip
# Give their argument back where it is what they would make of it.
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.contiguous.default, aten.type_as.default,
}  # fmt: skip


def is_effectful(node: fx.Node) -> bool:
    """Writes memory, draws random numbers, or is unknown: must stay even when nobody uses its value."""
    if node.target is operator.getitem or node.target in ops.NUMBERS:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def same_by_rule(node: fx.Node) -> fx.Node | None:
    """The argument that an operator gives back unchanged at all sizes, by its rule and not by what was traced."""
    if node.target in _DROPOUTS and (node.args[2] is False or node.args[1] == 0):
        return node.args[0]  # type: ignore[return-value]
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node) or _copies(node):
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return None
    return node.args[0] if geometry(before) == geometry(after) else None


def _copies(node: fx.Node) -> bool:
    """Whether a cast was asked to copy whatever it is given."""
    arguments = {a.name: value for a, value in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    return bool({**arguments, **node.kwargs}.get("copy", False))


def _same(node: fx.Node) -> fx.Node | None:
    """The argument that the node gives back unchanged, if it does."""
    if node.target in _DROPOUTS and node.args[2] is False:
        return node.args[0]  # type: ignore[return-value]
    if node.target not in _MAYBE_SAME or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    same = storage_id(before) == storage_id(after) and before.dtype == after.dtype and geometry(before) == geometry(after)
    return node.args[0] if same else None


@dataclass(frozen=True)
class DropNoops:
    """Ensures: the same values bit for bit (I5); every node left is used or has an effect."""

    name: str = "drop_noops"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTS:
                graph.erase_node(node)
                continue
            same = _same(node)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users and not is_effectful(node):
                graph.erase_node(node)
        unused = [n for n in graph.nodes if n.name in program.weights and not n.users]
        for node in unused:
            graph.erase_node(node)
        gone = {n.name for n in unused}
        weights = {k: w for k, w in program.weights.items() if k not in gone}
        return program.with_graph(graph, weights=weights)
