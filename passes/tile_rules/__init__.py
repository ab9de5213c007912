"""Tile rules, a family of operators in each file; importing this registers them all."""

from __future__ import annotations

from passes.tile_rules import dims, joins, pads, pointwise, reshapes, shuffles, slices
from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduce_parts, tile

__all__ = [
    "Part",
    "Reduced",
    "Run",
    "TileCall",
    "Tiled",
    "Untileable",
    "dims",
    "joins",
    "pads",
    "pointwise",
    "reduce_parts",
    "reshapes",
    "shuffles",
    "slices",
    "tile",
]
