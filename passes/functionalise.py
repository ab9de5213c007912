"""Writes new values instead of writing in place, wherever nobody could tell.

A region that is tiled computes parts of values; what is written in place has no parts that could be had one by one. A write
into an intermediate that is only ever read through its result is the functional operator and nothing else. The price is
memory: the argument and the result exist at the same time. So this is for programs that are tiled, not for all.

before:  c = conv2d(x, w); relu_(c); y = add(c, x)
after:   c = conv2d(x, w); relu_ = relu(c); y = add(relu_, x)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.mark_state import written_nodes
from passes.program import Program, is_symbolic, storage_id, tensors_of
from passes.refresh_values import value_of

aten = torch.ops.aten
_BARRED = {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded}


@dataclass(frozen=True)
class Functionalise:
    """Requires: recorded values are refreshed. Ensures: the same values bit for bit (I5); nodes keep their names.

    A write stays where its storage is a weight's, state, a constant's or an input's, where another name of the memory (a view
    made before) is read after it, where it may read what it has written, where the functional operator gives another dtype or
    other strides, and in a program whose sizes are symbols.
    """

    name: str = "functionalise"

    def apply(self, program: Program) -> Program:
        if not any(map(written_nodes, program.ops())) or any(is_symbolic(node) for node in program.graph.nodes):
            return program
        graph = program.copy_graph()
        sweep = _Sweep(graph)
        for node in list(graph.nodes):
            sweep.visit(node)
        return program.with_graph(graph)


class _Sweep:
    """One walk over a graph in order, which it changes: what was visited has right values, what follows has those of before."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        # The old values are kept, so that no new storage has the address, by which storages are told apart, of an old one.
        self._before = {node: node.meta.get("val") for node in graph.nodes}
        self._moved: set[fx.Node] = set()  # in another storage than before
        self._holders: dict[int, list[fx.Node]] = {}  # by storage: the values visited that are in it
        self._owned: set[int] = set()  # storages that are not the program's own to rewrite
        self._strided = any("as_strided" in str(node.target) for node in graph.nodes)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._owned.update(map(storage_id, tensors_of(node)))
        if node.op == "call_function":
            self._refresh(node)
            result = self._functional(node)
            if result is not None:
                target, value = result
                written = node.args[0]
                assert isinstance(written, fx.Node)
                written.replace_all_uses_with(node, lambda user: self._position[user] > self._position[node])
                node.target, node.meta["val"] = target, value
                self._moved.add(node)
        for storage in set(map(storage_id, tensors_of(node))):
            self._holders.setdefault(storage, []).append(node)

    def _refresh(self, node: fx.Node) -> None:
        """Moves a view to where its argument is now."""
        moved = {storage_id(t) for n in node.all_input_nodes if n in self._moved for t in _tensors(self._before[n])}
        if not moved & {storage_id(t) for t in tensors_of(node)}:
            return
        if node.target is operator.getitem:
            source, index = node.args
            node.meta["val"] = source.meta["val"][index]  # type: ignore[union-attr]
        else:
            node.meta["val"] = value_of(node)
        self._moved.add(node)

    def _functional(self, node: fx.Node) -> tuple[Any, torch.Tensor] | None:
        """The functional overload in place of a write, and its value; None where the node stays as it is."""
        target = functional_overload(node.target)
        if target is None or written_nodes(node) != [node.args[0]]:
            return None
        written = node.args[0]
        assert isinstance(written, fx.Node)
        if not self._is_private(node, written):
            return None
        value = value_of(node, target)
        before = written.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype != before.dtype or value.stride() != before.stride():
            return None
        fresh = storage_id(value) not in {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
        if not fresh or value.shape != before.shape or (self._strided and not _fills(before)):
            return None
        return target, value

    def _is_private(self, node: fx.Node, written: fx.Node) -> bool:
        """Whether what `node` writes is read afterwards through it, or through `written`, alone."""
        storage = storage_id(written.meta["val"])
        if storage in self._owned:
            return False
        others = [n for n in node.all_input_nodes if n is not written and storage in map(storage_id, tensors_of(n))]
        twice = sum(leaf is written for leaf in tree_leaves((node.args, node.kwargs))) > 1
        if others or (twice and torch.Tag.pointwise not in node.target.tags):  # type: ignore[union-attr]
            return False  # it may read what it has written
        here = self._position[node]
        return not any(
            self._position[user] > here for holder in self._holders[storage] if holder is not written for user in holder.users
        )


def functional_overload(target: Any) -> Any | None:
    """The overload that gives as a new tensor what an in-place one writes: `aten.add.Tensor` for `aten.add_.Tensor`.

    It has the same name but for the underscore and the same arguments, which it neither writes nor gives back. None where there
    is no such overload, and for what draws random numbers or changes sizes or strides in place.
    """
    if not isinstance(target, torch._ops.OpOverload) or _BARRED & set(target.tags):
        return None
    schema = target._schema
    namespace, _, name = schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__") or len(schema.returns) != 1:
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        pure = not found._schema.is_mutable and [result.alias_info for result in found._schema.returns] == [None]
        if pure and not _BARRED & set(found.tags) and _arguments(found) == _arguments(target):
            return found
    return None


def _arguments(target: Any) -> list[tuple[str, str, Any, bool]]:
    """Names, types (without what they alias), defaults."""
    return [(a.name, str(a.real_type), a.default_value, a.kwarg_only) for a in target._schema.arguments]


def _fills(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage: who ignores its geometry (`as_strided`) finds the same in a new one."""
    nbytes = tensor.numel() * tensor.dtype.itemsize
    return not int(tensor.storage_offset()) and nbytes == int(tensor.untyped_storage().nbytes())


def _tensors(val: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(val) if isinstance(v, torch.Tensor)]
