"""Operators run before the other readers of what they read, so that it ends there.

before:  h = conv2d(silu(x), w); y = conv2d(silu(h), v); s = conv2d(x, u); z = add(s, y)
after:   s = conv2d(x, u); h = conv2d(silu(x), w); y = conv2d(silu(h), v); z = add(s, y)

As the shortcut of a resnet, which comes last: from `h` on its smaller result is there in the place of `x`. In tiles one loop
can then make both, and write them over `x`.

Requires: a functional program. Ensures: the same operators on the same values (I5).
Raises: PlanFileError, where an operator cannot be moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.program import Program, storage_bytes
from passes.regions import is_view, sharing
from runtime.errors import PlanFileError


@dataclass(frozen=True)
class MoveUp:
    """`names`: the operators that are moved, each in front of the last other reader of what it reads."""

    names: tuple[str, ...]
    name: str = "move_up"

    def apply(self, program: Program) -> Program:
        if not self.names:
            return program
        program = program.with_graph(program.copy_graph())
        nodes = {node.name: node for node in program.ops()}
        for name in self.names:
            reader = _place(program, nodes[name]) if name in nodes else None
            if reader is None:
                raise PlanFileError(f"the plan moves {name!r} up, which cannot be; plan the model again")
            reader.prepend(nodes[name])
        return program


def movable(program: Program) -> dict[str, str]:
    """The operators that can be moved so that something larger than their result ends, and where to: in front of which."""
    places = {node.name: _place(program, node) for node in program.ops()}
    return {name: place.name for name, place in places.items() if place is not None}


def _place(program: Program, node: fx.Node) -> fx.Node | None:
    """The operator in front of which one can be moved; None where it cannot, or where nothing would end."""
    if not _is_plain(node) or is_view(node):
        return None
    read = [n for n in node.all_input_nodes if n.name not in program.weights or program.weights[n.name].state]
    if len(read) != 1 or read[0].op != "call_function" or not isinstance(read[0].meta.get("val"), torch.Tensor):
        return None
    (value,) = read
    others = [user for user in value.users if user is not node]
    last = max(others, default=node)
    if last >= node or last.next is node or storage_bytes(node.meta["val"]) >= storage_bytes(value.meta["val"]):
        return None
    return last if sharing(value) == [value] and all(_is_plain(user) for user in others) else None


def _is_plain(node: fx.Node) -> bool:
    """An operator that gives a new tensor, whenever it runs the same, and changes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return isinstance(node.meta.get("val"), torch.Tensor)
