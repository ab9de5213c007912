"""How many bytes parts of values are, and how long a tile needs them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import fx

from passes.program import storage_id, tensors_of
from passes.regions import Region, TileNeeds
from passes.tile_rules import Part


def share_of(node: fx.Node, tile: TileNeeds) -> float:
    """The share of a node's result that the tile computes."""
    parts = tile.parts.get(node)
    if parts is None:
        return 0.0
    whole = sum(t.numel() for t in tensors_of(node))
    mine = sum(
        t.numel() // t.shape[part.dim] * part.size for t, part in zip(tensors_of(node), parts, strict=True) if part is not None
    )
    return mine / max(whole, 1)


def last_readers(region: Region) -> Mapping[int, int]:
    """By storage made in the region: the position of its last reader there."""
    last: dict[int, int] = {}
    order = {node: i for i, node in enumerate(region.ordered)}
    for i, node in enumerate(region.ordered):
        for tensor in tensors_of(node):
            uses = [order[user] for user in node.users if user in order]
            mine = max(uses, default=i)
            last[storage_id(tensor)] = max(last.get(storage_id(tensor), -1), mine)
    return last


def part_bytes(node: fx.Node, part: Part) -> int:
    tensor = node.meta["val"]
    return int(tensor.numel() // max(tensor.shape[part.dim], 1) * part.size * tensor.dtype.itemsize)


def partial_bytes(node: fx.Node) -> int:
    """Of one tile's share in a result that is merged; sums of half precision are kept in fp32."""
    tensor = node.meta["val"]
    return int(tensor.numel() * (max(tensor.dtype.itemsize, 4) if tensor.dtype.is_floating_point else tensor.dtype.itemsize))


def dense_bytes(node: fx.Node) -> int:
    return sum(prod(t.shape) * t.dtype.itemsize for t in tensors_of(node))
