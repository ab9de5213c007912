"""Tile rules, a family of operators in each file; importing this registers them all."""

from __future__ import annotations

from passes.tile_rules import (
    adaptive,
    attention,
    contractions,
    convolutions,
    pointwise,
    pooling,
    resampling,
    transposed,
)
from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduce_parts, tile

__all__ = [
    "Part",
    "Reduced",
    "Run",
    "TileCall",
    "Tiled",
    "Untileable",
    "adaptive",
    "attention",
    "contractions",
    "convolutions",
    "pointwise",
    "pooling",
    "reduce_parts",
    "resampling",
    "tile",
    "transposed",
]
