"""Tile rules, a family of operators in each file; importing this registers them all."""

from __future__ import annotations

from passes.tile_rules import adaptive, convolutions, pointwise, pooling, transposed
from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduce_parts, tile

__all__ = [
    "Part",
    "Reduced",
    "Run",
    "TileCall",
    "Tiled",
    "Untileable",
    "adaptive",
    "convolutions",
    "pointwise",
    "pooling",
    "reduce_parts",
    "tile",
    "transposed",
]
