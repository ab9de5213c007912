"""Elementwise operators write over their input, where that ends there.

before:  c = conv2d(x, w); y = silu(c); z = add(y, x)
after:   c = conv2d(x, w); y_place = alias(c); y = silu_(y_place); z = add(y, x)

The `alias`, which canonical programs do not have, says to the checker: this memory is written over, and names that it had
before are nobody's from then on. So less is live, and nothing else changes: the same kernel reads and writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.fakes import is_dense
from passes.functionalise import functional_overload
from passes.loop import loop_of
from passes.program import Program, copy_graph, geometry, is_symbolic, storage_bytes, storage_id, tensors_of
from passes.refresh_values import carry_on
from passes.tile_rules.base import rule_of
from passes.tile_rules.pointwise import pointwise
from runtime.errors import PlanFileError

aten = torch.ops.aten
# y = f(a, b) = f(b, a), bit for bit.
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


@dataclass(frozen=True)
class WriteInPlace:
    """`names`: the operators that write in place, of those that can (`writable_in_place`); bodies of loops have theirs.

    Requires: everything else that rewrites operators is done. Ensures: the same values bit for bit (I5); operators keep their
    names; at no operator more is live than before.
    Raises: PlanFileError, where an operator cannot.
    """

    names: tuple[str, ...]
    name: str = "write_in_place"

    def apply(self, program: Program) -> Program:
        program = program.with_graph(program.copy_graph())
        loops = {node: loop for node in program.ops() if (loop := loop_of(node)) is not None}
        within = {node.name for loop in loops.values() for run in loop.runs for node in run.body.nodes}
        names, done = set(self.names), set(self._rewritten(program.graph, within))
        bodies: dict[fx.Graph, fx.Graph] = {}  # runs go on sharing them

        def changed(body: fx.Graph) -> fx.Graph:
            if body not in bodies:
                bodies[body] = copy_graph(body)
                done.update(self._rewritten(bodies[body], {node.name for node in program.graph.nodes}))
            return bodies[body]

        for node, loop in loops.items():
            node.meta["loop"] = loop.map_bodies(changed)
        if names - done:
            raise PlanFileError(f"{min(names - done)!r} cannot write in place; plan the model again")
        return program

    def _rewritten(self, graph: fx.Graph, taken: set[str]) -> list[str]:
        """The operators of a graph that now write in place; names of a body and of what is around it are apart."""
        names = set(self.names)
        found = {node: index for node, index in _arguments_to_write(graph).items() if node.name in names}
        for node, index in found.items():
            _rewrite(node, index, taken)
        return [node.name for node in found]


def writable_in_place(program: Program) -> tuple[str, ...]:
    """The elementwise operators that may write over an argument, in program order, also where sizes are symbols.

    That argument is all of a storage that the program made. Nothing reads this storage afterwards, and the operator itself only
    through that one argument, once. The result would be in a storage of its own, of the same dtype, sizes and strides.
    """
    loops = [loop for node in program.ops() if (loop := loop_of(node)) is not None]
    graphs = [program.graph, *(run.body for loop in loops for run in loop.runs)]
    return tuple(dict.fromkeys(node.name for graph in graphs for node in _arguments_to_write(graph)))


def in_place_overload(target: Any) -> Any | None:
    """The overload that writes over its first argument what an elementwise one gives: `aten.add_.Tensor` for `aten.add.Tensor`.

    None where there is none, and for operators that are not elementwise.
    """
    return _in_place_overload(target) if isinstance(target, torch._ops.OpOverload) else None


@cache
def _in_place_overload(target: Any) -> Any | None:
    if torch.Tag.pointwise not in target.tags and rule_of(target) is not pointwise:
        return None
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return next((overload for overload in overloads if functional_overload(overload) is target), None)


def _arguments_to_write(graph: fx.Graph) -> dict[fx.Node, int]:
    """The operators that may write in place, with the position of the argument that they write over."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    holders: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in dict.fromkeys(map(storage_id, tensors_of(node))):
            holders.setdefault(storage, []).append(node)
    found = {}
    for node in graph.nodes:
        if in_place_overload(node.target) is None or not _is_fresh(node, holders):
            continue
        for index in _candidates(node):
            if _ends_at(node.args[index], node, holders, position):
                found[node] = index
                break
    return found


def _is_fresh(node: fx.Node, holders: Mapping[int, list[fx.Node]]) -> bool:
    """Whether the result is one tensor in a storage of its own."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or holders[storage_id(value)][0] is not node:
        return False
    return is_symbolic(node) or value.numel() > 0


def _candidates(node: fx.Node) -> list[int]:
    """Positions of the arguments that the operator could write over, were they to end there."""
    found = [0]
    if node.target in _COMMUTATIVE and node.kwargs.get("alpha", 1) == 1:
        values = [argument.meta.get("val") for argument in node.args[:2] if isinstance(argument, fx.Node)]
        dtypes = {value.dtype if isinstance(value, torch.Tensor) else None for value in values}
        if len(values) == 2 and len(dtypes) == 1:  # of two dtypes one could be rounded where it is not in the other's place
            found.append(1)
    return found


def _ends_at(value: Any, node: fx.Node, holders: Mapping[int, list[fx.Node]], position: Mapping[fx.Node, int]) -> bool:
    """Whether a result can be written over an argument."""
    if not isinstance(value, fx.Node) or not _same_place(value, node):
        return False
    mine = holders[storage_id(value.meta["val"])]
    if mine[0].op != "call_function" or not isinstance(mine[0].target, torch._ops.OpOverload):
        return False  # an input, a weight, or what lives on the host
    if sum(leaf in mine for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)) > 1:
        return False
    return all(position[user] <= position[node] for holder in mine for user in holder.users)


def _same_place(value: fx.Node, node: fx.Node) -> bool:
    """Whether a value is all of its storage, laid out as the result is."""
    one, other = value.meta.get("val"), node.meta["val"]
    if not isinstance(one, torch.Tensor) or one.dtype != other.dtype or one.device != other.device:
        return False
    sizes, rank = geometry(one), one.dim()  # in symbols, where they are some: those are equal where the expressions are
    if sizes != geometry(other) or sizes[-1] != 0 or storage_bytes(one) != storage_bytes(other):
        return False
    if not is_symbolic(value):
        return storage_bytes(one) == one.numel() * one.dtype.itemsize and is_dense(one)
    steps = [prod(sizes[dim + 1 : rank]) for dim in range(rank)]
    whole = storage_bytes(one) == prod(sizes[:rank]) * one.dtype.itemsize
    return whole and all(step == stride for step, stride in zip(steps, sizes[rank:-1], strict=True))


def _rewrite(node: fx.Node, index: int, taken: set[str]) -> None:
    """Lets an operator write over an argument."""
    graph, old = node.graph, node.meta["val"]
    name = f"{node.name}_place"
    while name in taken:
        name += "_"
    with graph.inserting_before(node):
        place = graph.create_node("call_function", aten.alias.default, (node.args[index],), name=name)
    place.meta |= {key: value for key, value in node.meta.items() if key != "val"}
    place.meta["val"] = node.args[index].meta["val"]  # type: ignore[union-attr]
    others = [argument for i, argument in enumerate(node.args) if i != index]
    node.target, node.args = in_place_overload(node.target), (place, *others)  # type: ignore[assignment]
    node.meta["val"] = place.meta["val"]  # which has the geometry of what was there
    carry_on({node: old})
