"""Pieces of a tensor: slices, selections, splits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, tile_rule
from passes.tile_rules.parts import agreed, sliced

aten = torch.ops.aten


@tile_rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = x[s + a*step : s + (b-1)*step + 1 : step]` along the sliced dimension, `f(x[a:b])` along others."""
    assert part is not None
    shape, step = call.tensors[0].shape, call.arg("step")
    dim = call.arg("dim") % len(shape)
    start, stop, _ = slice(call.arg("start"), call.arg("end"), step).indices(shape[dim])
    if part.dim != dim:
        ends = start, max(start, stop)  # spelled out: what a tile takes has to be there
        return Tiled((part,), lambda run, values: run(call.target, values[0], dim, *ends, step))
    need = Part(part.dim, start + part.start * step, start + (part.stop - 1) * step + 1)
    if step == 1 or part.size == 1:
        return Tiled((need,), lambda run, values: values[0])
    return Tiled((need,), lambda run, values: run(aten.slice.Tensor, values[0], part.dim, 0, need.size, step))


@tile_rule(aten.narrow.default, aten.narrow_copy.default)
def narrow(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = x[s+a : s+b]` along the narrowed dimension, `f(x[a:b])` along others."""
    assert part is not None
    shape = call.tensors[0].shape
    if part.dim != call.arg("dim") % len(shape):
        return Tiled((part,), call.again)
    start = call.arg("start") % shape[part.dim] if call.arg("start") < 0 else call.arg("start")
    return Tiled((Part(part.dim, start + part.start, start + part.stop),), lambda run, values: values[0])


@tile_rule(aten.select.int, aten.select_copy.int)
def select(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`; a dimension behind the selected one is one further in the input."""
    assert part is not None
    shape = call.tensors[0].shape
    gone = call.arg("dim") % len(shape)
    need = Part(part.dim + (part.dim >= gone), part.start, part.stop)
    return Tiled((need,), lambda run, values: run(call.target, values[0], gone, call.arg("index") % shape[gone]))


def boundaries(call: TileCall, dim: int) -> list[tuple[int, int]]:
    """Which interval of `dim` each result of a split is."""
    if call.target is aten.tensor_split.indices:
        size = call.tensors[0].shape[dim]
        edges = [0, *call.arg("indices"), size]
        return [slice(*edge).indices(size)[:2] for edge in pairwise(edges)]
    return list(pairwise(accumulate((spec.shape[dim] for spec in call.outputs), initial=0)))


@tile_rule(
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default,
    aten.tensor_split.sections, aten.tensor_split.indices,
)  # fmt: skip
def split(call: TileCall, *parts: Part | None) -> Tiled:
    """`y_i[a:b] = x[o_i + a : o_i + b]` along the split dimension; along another each is a piece of the hull of all."""
    size = call.tensors[0].shape
    dim = call.arg("dim") % len(size)
    pieces = boundaries(call, dim)

    def place(index: int, part: Part) -> Part:
        """The part of the input that is needed for this part of a result."""
        offset = pieces[index][0] if part.dim == dim else 0
        return Part(part.dim, part.start + offset, part.stop + offset)

    need = agreed([place(index, part) for index, part in enumerate(parts) if part is not None])

    def piece(run: Run, value: Any, index: int, part: Part) -> Any:
        if part.dim != dim:
            value = sliced(run, value, Part(dim, *pieces[index]), size[dim])
        return sliced(run, value, place(index, part).within(need), need.size)

    # Slices, not another split: only what is wanted, in one call each unless their parts differ. All are views.
    return Tiled(
        (need,),
        lambda run, values: [part and piece(run, values[0], index, part) for index, part in enumerate(parts)],
    )


@tile_rule(aten.unbind.int)
def unbind(call: TileCall, *parts: Part | None) -> Tiled:
    """`y_i[a:b] = f(x[a:b])_i`; a dimension behind the unbound one is one further in the input."""
    gone = call.arg("dim") % len(call.tensors[0].shape)
    places = [part and Part(part.dim + (part.dim >= gone), part.start, part.stop) for part in parts]
    need = agreed([place for place in places if place is not None])

    def compute(run: Run, values: Sequence[Any]) -> Any:
        return [
            place and run(aten.select.int, sliced(run, values[0], place.within(need), need.size), gone, index)
            for index, place in enumerate(places)
        ]

    return Tiled((need,), compute)
