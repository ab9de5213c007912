"""Between which numbers the elements of a value lie, as far as the operators that make it say.

For masks: whether what is added to attention scores can be minus infinity. Nothing is assumed of inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program import storage_id

aten = torch.ops.aten
Bounds = tuple[float, float]

_MOST_NODES = 64
_WIDE = (torch.int32, torch.int64)
_EXACT = 2.0**31  # integers of these types do not wrap below it
_SAME = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.squeeze.dims, aten.expand.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor,
    aten.select.int, aten.contiguous.default, aten.clone.default, aten.repeat.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten._to_copy.default, aten.lift_fresh_copy.default, aten.type_as.default, aten.flatten.using_ints,
    aten.broadcast_to.default, aten.expand_as.default, aten.to.device, aten.to.dtype_layout, aten.triu.default,
    aten.tril.default,
}  # fmt: skip
_FILLED = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_TRIANGLES = {aten.triu.default, aten.tril.default}  # zeros besides


def bounds(value: Any, written: Collection[int] = ()) -> Bounds | None:
    """(least, greatest) that the elements of a node's value, or a number, can be; None where that is not known.

    `written`: storages that something writes in place, of which nothing is known.
    """
    return _bounds(value, _Search(written))


def is_finite(node: fx.Node, written: Collection[int] = ()) -> bool:
    """Whether it is known that no element of the value is infinite or not a number."""
    found = bounds(node, written)
    return found is not None and all(map(math.isfinite, found))


def number_of(value: Any, written: Collection[int] = ()) -> float | None:
    """The number that a value consists of, all over; None where it is not known to."""
    found = bounds(value, written)
    return found[0] if found is not None and found[0] == found[1] else None


@dataclass
class _Search:
    written: Collection[int]
    left: int = _MOST_NODES


def _bounds(value: Any, left: _Search) -> Bounds | None:
    if isinstance(value, (bool, int, float)):
        return None if math.isnan(value) else (float(value), float(value))
    left.left -= 1
    if not isinstance(value, fx.Node) or left.left < 0:
        return None
    tensor = value.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or storage_id(tensor) in left.written:
        return None
    if tensor.dtype == torch.bool:
        return 0.0, 1.0
    found = _made(value, left) if value.op == "call_function" else None
    if found is None or any(map(math.isnan, found)):
        return None
    if not tensor.dtype.is_floating_point:
        return found if all(abs(each) < _EXACT for each in found) and tensor.dtype in _WIDE else None
    low, high = torch.tensor(found, dtype=torch.float64).to(tensor.dtype).tolist()  # as that type rounds
    return low, high


def _made(node: fx.Node, left: _Search) -> Bounds | None:
    target: Any = node.target
    args = node.args
    if target in _FILLED:
        return _bounds(args[_FILLED[target]], left)
    if target in _ZEROS or target in _ONES:
        return (0.0, 0.0) if target in _ZEROS else (1.0, 1.0)
    if target in _SAME:
        found = _bounds(args[0], left)
        return _hull(found, (0.0, 0.0)) if target in _TRIANGLES else found
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return _hull(_bounds(args[1], left), _bounds(args[2], left))
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _hull(_bounds(args[0], left), _bounds(args[2], left))
    if target in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar) and node.kwargs.get("alpha", 1) == 1:
        one, other = _bounds(args[0], left), _bounds(args[1], left)
        if target is aten.rsub.Scalar:
            one, other = other, one
        return _sum(one, other if target is aten.add.Tensor else _negative(other))
    if target is aten.mul.Tensor:
        return _product(_bounds(args[0], left), _bounds(args[1], left))
    return None


def _hull(one: Bounds | None, other: Bounds | None) -> Bounds | None:
    return None if one is None or other is None else (min(one[0], other[0]), max(one[1], other[1]))


def _negative(one: Bounds | None) -> Bounds | None:
    return None if one is None else (-one[1], -one[0])


def _sum(one: Bounds | None, other: Bounds | None) -> Bounds | None:
    return None if one is None or other is None else (one[0] + other[0], one[1] + other[1])


def _product(one: Bounds | None, other: Bounds | None) -> Bounds | None:
    if one is None or other is None:
        return None
    products = [a * b for a in one for b in other]
    return None if any(map(math.isnan, products)) else (min(products), max(products))
