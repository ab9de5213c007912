"""Which results of a region can be written over a value that nothing reads any more, tile by tile.

Every tile reads of that value, before it writes, just the rows that it writes; so no tile reads what another has written. A
result that is smaller than the value is written over its beginning: the rest of the memory is then kept as long as the result
is, which is worth it only where the value is needed until then; so that is for the planner to decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from passes.regions import Region, TileNeeds, is_view, sharing
from passes.tile_rules import Part

aten = torch.ops.aten


def written_over(region: Region, tiles: Sequence[TileNeeds], node: fx.Node, larger: bool = False) -> fx.Node | None:
    """The value in whose memory a result of the region can be written; None where there is none.

    `larger`: the value may have more of one dimension, which those before it (all of size 1) leave at the beginning of the
    memory.
    """
    stop = max(region.ordered)
    for value in region.operands:
        if not fits_over(value, node, larger):
            continue
        mine = sharing(value)
        readers = [user for n in mine for user in n.users]
        inside = [user for user in readers if user in region.dims or user in region.merged]
        if any(n.op != "call_function" for n in mine) or any(user > stop for user in readers):
            continue
        if not inside or any(user > node or is_view(user) for user in inside):
            continue
        if any(n in mine and n is not value for user in inside for n in user.all_input_nodes):
            continue  # another part of the same memory
        part, more = tiles[0].written[node], more_of(value, node)
        if part.dim == more or (more is not None and _is_given(region, node)):
            continue
        if all(_reads_just(region, tile, user, value, tile.written[node]) for tile in tiles for user in inside):
            return value
    return None


def more_of(value: fx.Node, result: fx.Node) -> int | None:
    """The dimension of which a value has more than a result; None where they have the same shape."""
    pairs = zip(value.meta["val"].shape, result.meta["val"].shape, strict=True)
    return next((dim for dim, (one, other) in enumerate(pairs) if one != other), None)


def fits_over(value: fx.Node, result: fx.Node, larger: bool = False) -> bool:
    """Whether a value has memory of its own, in which the result can be."""
    one, other = value.meta.get("val"), result.meta["val"]
    if not isinstance(value.target, torch._ops.OpOverload) or not isinstance(one, torch.Tensor):
        return False
    if one.dtype != other.dtype or one.dim() != other.dim() or not one.is_contiguous() or not other.is_contiguous():
        return False
    mine = value.target is aten.alias.default  # a result that was written over something larger
    if not mine and one.untyped_storage().nbytes() != one.numel() * one.dtype.itemsize:
        return False
    more = more_of(value, result)
    if more is None:
        return True
    before, after = slice(0, more), slice(more + 1, None)
    begins = one.shape[more] > other.shape[more] and set(one.shape[before]) <= {1} and one.shape[after] == other.shape[after]
    return larger and begins


def _is_given(region: Region, result: fx.Node) -> bool:
    """Whether the program gives a result, or a view of it: whoever has that would keep all of the memory."""
    return any(user.op == "output" for n in sharing(result) for user in n.users)


def _reads_just(region: Region, tile: TileNeeds, user: fx.Node, value: fx.Node, part: Part) -> bool:
    step = tile.steps[user]
    if step is None:
        return True
    needs = zip(region.calls.arguments(user), step.needs, strict=True)
    return all(need == part for argument, need in needs if argument is value)
