"""Between channels and pixels, between a dimension and its windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.parts import sliced

aten = torch.ops.aten


def _coarser(call: TileCall, part: Part, factor: int) -> Tiled:
    """`y[a:b] = f(x[a//r : ceil(b/r)])[a - a//r*r :][: b-a]`, where an index of `x` becomes `r` indices of `y`."""
    need = Part(part.dim, part.start // factor, -(-part.stop // factor))
    local = Part(part.dim, part.start - need.start * factor, part.stop - need.start * factor)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        return sliced(run, call.again(run, values), local, need.size * factor)

    return Tiled((need,), compute)


def _finer(call: TileCall, part: Part, factor: int) -> Tiled:
    """`y[a:b] = f(x[a*r : b*r])`, where `r` indices of `x` become one of `y`."""
    return Tiled((Part(part.dim, part.start * factor, part.stop * factor),), call.again)


@tile_rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: TileCall, part: Part | None) -> Tiled:
    """Rows and columns from an `r`-th of them, a channel from `r*r` channels; other dimensions as they are."""
    assert part is not None
    factor, behind = call.arg("upscale_factor"), len(call.output.shape) - part.dim
    if behind <= 2:
        return _coarser(call, part, factor)
    return _finer(call, part, factor * factor if behind == 3 else 1)


@tile_rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: TileCall, part: Part | None) -> Tiled:
    """Rows and columns from `r` times as many, `r*r` channels from one; other dimensions as they are."""
    assert part is not None
    factor, behind = call.arg("downscale_factor"), len(call.output.shape) - part.dim
    if behind <= 2:
        return _finer(call, part, factor)
    return _coarser(call, part, factor * factor if behind == 3 else 1)


@tile_rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`; neighbouring channels come from different groups."""
    assert part is not None
    if part.dim == 1:
        raise Untileable("takes neighbouring channels from all over its input")
    return Tiled((part,), call.again)


@tile_rule(aten.unfold.default)
def windows(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a*step : (b-1)*step + size])` of the windows; of their elements `f(x[a : (n-1)*step + b], size=b-a)`."""
    assert part is not None
    rank = len(call.tensors[0].shape)
    size, step = call.arg("size"), call.arg("step")
    dim = call.arg("dimension") % rank if rank else 0
    if part.dim == dim and rank:
        return Tiled((Part(dim, part.start * step, (part.stop - 1) * step + size),), call.again)
    if part.dim < rank:
        return Tiled((part,), call.again)
    if not rank:
        return Tiled((None,), call.again)
    last = (call.output.shape[dim] - 1) * step
    need = Part(dim, part.start, last + part.stop)
    return Tiled((need,), lambda run, values: call.again(run, values, size=part.size))


@tile_rule(aten.im2col.default, aten.col2im.default)
def patches(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])` of a batch; a column's elements are strewn over the image."""
    assert part is not None
    batched = len(call.tensors[0].shape) == (4 if call.target is aten.im2col.default else 3)
    if part.dim or not batched:
        raise Untileable("makes columns of patches, whose pixels are strewn over the image")
    return Tiled((part,), call.again)
