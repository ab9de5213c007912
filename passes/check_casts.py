"""The checker's part about weights that are stored in another type: they are cast back with their own scales, and only that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from passes.check_slices import arrivals
from passes.program import Program, Weight
from runtime import ops
from runtime.errors import CheckError

_UPCAST = torch.ops.vramplan.upcast.default
_PARTS = ("values", "scales")

Refuse = Callable[[fx.Node | None, str, str], CheckError]


def check_casts(program: Program, refuse: Refuse) -> None:
    """What is stored of a weight is read by `upcast` alone, values and scales of the same rows together (I3).

    It looks at the emitted graph and at `Weight.stored` alone; `refuse(node, invariant, message)` if not.
    """
    weights = program.weights
    if not any(is_cast(weight) for weight in weights.values()):
        return
    arrived = {node: weights[key] for node, key in arrivals(program)}
    for node, weight in arrived.items():
        for user in [user for user in node.users if user.target is not ops.free]:
            if is_cast(weight) and user.target is not _UPCAST:
                raise refuse(user, "I3", f"{user.name} reads {weight.label}, which is stored in another type")
    for node in program.graph.nodes:
        if node.target is _UPCAST:
            held = [arrived.get(argument) for argument in node.args[:2]]
            if not _are_one(held):
                labels = " and ".join(str(None if weight is None else weight.label) for weight in held)
                raise refuse(node, "I3", f"{node.name} joins {labels}, which are not values and scales of one weight")


def is_cast(weight: Weight) -> bool:
    """Whether it is stored in another type, and not only in another layout."""
    return weight.stored is not None and weight.stored.part in _PARTS


def _are_one(held: list[Weight | None]) -> bool:
    values, scales = held
    if values is None or scales is None or values.stored is None or scales.stored is None:
        return False
    one, other = values.stored, scales.stored
    same = (one.weight, one.dtype, one.dim) == (other.weight, other.dtype, other.dim)
    if not same or (one.part, other.part) != _PARTS or values.spec.dtype != one.dtype:
        return False
    rows = values.rows if one.dim == 0 else None
    return scales.rows == rows
