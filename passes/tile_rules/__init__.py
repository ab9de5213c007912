"""Tile rules, a family of operators in each file; importing this registers them all."""

from __future__ import annotations

from passes.tile_rules import factories, group_norms, indexing, pointwise, reductions, row_norms
from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduce_parts, tile

__all__ = [
    "Part",
    "Reduced",
    "Run",
    "TileCall",
    "Tiled",
    "Untileable",
    "factories",
    "group_norms",
    "indexing",
    "pointwise",
    "reduce_parts",
    "reductions",
    "row_norms",
    "tile",
]
