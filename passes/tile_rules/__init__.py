"""Tile rules, a family of operators in each file; importing this registers them all."""

from __future__ import annotations

from passes.tile_rules import (
    adaptive,
    attention,
    contractions,
    convolutions,
    dims,
    joins,
    pads,
    pointwise,
    pooling,
    resampling,
    reshapes,
    shuffles,
    slices,
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
    "dims",
    "joins",
    "pads",
    "pointwise",
    "pooling",
    "reduce_parts",
    "resampling",
    "reshapes",
    "shuffles",
    "slices",
    "tile",
    "transposed",
]
