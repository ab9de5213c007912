"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, TileCall, Tiled, tile_rule

aten = torch.ops.aten


def broadcast_part(spec: TensorSpec, rank: int, part: Part) -> Part | None:
    """The part of an argument that broadcasting to `rank` dimensions spreads over `part` of the result; None: all of it."""
    dim = part.dim - (rank - len(spec.shape))
    return None if dim < 0 or spec.shape[dim] == 1 else Part(dim, part.start, part.stop)


@tile_rule(aten.silu.default, aten.gelu.default, aten.add.Tensor, aten.mul.Tensor)
def pointwise(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b], ...)`, where an argument of size 1 along the dimension is taken whole.

    A result of size 1 is the exception that is none: its argument has size 1 too.
    """
    assert part is not None
    rank = len(call.output.shape)
    return Tiled(tuple(broadcast_part(spec, rank, part) for spec in call.tensors), call.again)
