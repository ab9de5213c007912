"""Look-ups, triangles, sorting and reversing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.common import dims_of, hull_of, needs_of, refuse_along, sliced, together
from passes.tile_rules.pointwise import broadcast_part

aten = torch.ops.aten


# --- look-ups ------------------------------------------------------------------------------------------------------------


@tile_rule(aten.embedding.default)
def embedding(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = w[i[a:b]]`; of the features `w[:, a:b][i]`."""
    assert part is not None
    if part.dim == len(call.output.shape) - 1:
        return Tiled(needs_of(call, weight=Part(1, part.start, part.stop)), call.again)
    return Tiled(needs_of(call, indices=part), call.again)


@tile_rule(aten.index_select.default)
def index_select(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = x[i[a:b]]`; along another dimension `x[:, a:b][i]`."""
    assert part is not None
    if not call.tensors[0].shape or not call.tensors[1].shape:
        raise Untileable("has an argument without dimensions")
    (dim,) = dims_of(call.arg("dim"), len(call.tensors[0].shape))
    if part.dim == dim:
        return Tiled(needs_of(call, index=Part(0, part.start, part.stop)), call.again)
    return Tiled(needs_of(call, self=part), call.again)


@tile_rule(aten.gather.default)
def gather(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = gather(x[a:b], i[a:b])`; along the dimension of the look-up `gather(x, i[a:b])`."""
    assert part is not None
    source, rank = call.tensors[0].shape, len(call.output.shape)
    if len(source) != rank or len(call.tensors[1].shape) != rank:
        raise Untileable("has arguments of different numbers of dimensions")
    (dim,) = dims_of(call.arg("dim"), rank)
    return Tiled(needs_of(call, self=None if part.dim == dim else part, index=part), call.again)


@tile_rule(aten.take_along_dim.default)
def take_along_dim(call: TileCall, part: Part | None) -> Tiled:
    """As `gather`, where both arguments broadcast along the other dimensions."""
    assert part is not None
    if call.arg("dim") is None:
        raise Untileable("looks up in its flattened input")
    rank = len(call.output.shape)
    (dim,) = dims_of(call.arg("dim"), rank)
    source, index = (broadcast_part(spec, rank, part) for spec in call.tensors)
    return Tiled(needs_of(call, self=None if part.dim == dim else source, indices=index), call.again)


@tile_rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(call: TileCall, part: Part | None) -> Tiled:
    """`y = x[..., i, j, ...]`: of the dimensions of the indices their parts, of the others `x`'s.

    The indices' dimensions come where the first index stands if they stand side by side, else first.
    """
    assert part is not None
    source = call.tensors[0]
    indices = list(call.arg("indices"))
    if any(spec is not None and spec.dtype in (torch.bool, torch.uint8) for spec in indices):
        raise Untileable("looks up by a mask")
    places = [place for place, spec in enumerate(indices) if spec is not None]
    if not places:
        return Tiled((part,), call.again)
    shape = _broadcast([indices[place].shape for place in places])
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    if first <= part.dim < first + len(shape):
        inner = Part(part.dim - first, part.start, part.stop)
        return Tiled((None, *(broadcast_part(indices[place], len(shape), inner) for place in places)), call.again)
    kept = [dim for dim in range(len(source.shape)) if dim not in places]
    dim = kept[part.dim if part.dim < first else part.dim - len(shape)]
    return Tiled((Part(dim, part.start, part.stop), *(None for _ in places)), call.again)


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))


@tile_rule(aten.one_hot.default)
def one_hot(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = one_hot(i[a:b])`, where the number of classes is given."""
    assert part is not None
    if call.arg("num_classes") <= 0:
        raise Untileable("has as many classes as its input says")
    refuse_along(part, [len(call.output.shape) - 1], "makes rows")
    return Tiled((part,), call.again)


@tile_rule(aten.bucketize.Tensor, aten.isin.Tensor_Tensor)
def membership(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b], table)`."""
    return Tiled((part, None), call.again)


# --- triangles -----------------------------------------------------------------------------------------------------------


@tile_rule(aten.tril.default, aten.triu.default)
def triangle(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = tril(x[a:b], d + a)` for rows, `tril(x[:, a:b], d - a)` for columns, `tril(x[a:b], d)` for the others.

    A diagonal beyond the corners is moved to them, so that tiles that are kept or cleared as a whole look alike.
    """
    assert part is not None
    rank, diagonal = len(call.output.shape), call.arg("diagonal")
    rows, columns = call.output.shape[-2:]
    if part.dim == rank - 2:
        rows, diagonal = part.size, diagonal + part.start
    elif part.dim == rank - 1:
        columns, diagonal = part.size, diagonal - part.start
    else:
        return Tiled((part,), call.again)
    diagonal = max(-rows, min(diagonal, columns))
    return Tiled((part,), lambda run, values: call.again(run, values, diagonal=diagonal))


# --- order ---------------------------------------------------------------------------------------------------------------


@tile_rule(
    aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable, aten.topk.default
)  # fmt: skip
def sort(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = sort(x[a:b])`, along another dimension than the sorted one."""
    hull = hull_of(parts)
    refuse_along(hull, dims_of(call.arg("dim"), len(call.outputs[0].shape)), "sorts")
    return together(parts, hull, (hull,), call.again)


@tile_rule(aten.flip.default)
def flip(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = flip(x[n - b : n - a])` along a reversed dimension of size n, `flip(x[a:b])` along the others."""
    assert part is not None
    shape = call.output.shape
    if part.dim not in dims_of(call.arg("dims"), len(shape)):
        return Tiled((part,), call.again)
    size = shape[part.dim]
    return Tiled((Part(part.dim, size - part.stop, size - part.start),), call.again)


@tile_rule(aten.roll.default)
def roll(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = roll(x[a:b])`, along a dimension that is not rolled; along one that is, all would be needed at the seam."""
    assert part is not None
    dims = dims_of(call.arg("dims"), len(call.output.shape))
    if not dims:
        raise Untileable("rolls its flattened input")
    refuse_along(part, dims, "rolls")
    return Tiled((part,), call.again)


@tile_rule(aten.diff.default)
def diff(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = diff(x[a : b + n])` for the n-th differences; along another dimension `diff(x[a:b])`, and that of its ends."""
    assert part is not None
    (dim,) = dims_of(call.arg("dim"), len(call.output.shape))
    if part.dim != dim:
        return Tiled(tuple(part for _ in call.tensors), call.again)
    if len(call.tensors) > 1:
        raise Untileable(f"puts something to the ends of dimension {dim}")
    if part.stop + call.arg("n") > call.tensors[0].shape[dim]:
        raise Untileable("takes more differences than there are")
    return Tiled((Part(dim, part.start, part.stop + call.arg("n")),), call.again)


@tile_rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = repeat(x[a // r : ceil(b / r)], r)[a % r :][: b - a]`; along the other dimensions `repeat(x[a:b])`."""
    assert part is not None
    source: TensorSpec = call.tensors[0]
    if call.arg("dim") is None and len(source.shape) != 1:
        raise Untileable("repeats its flattened input")
    (dim,) = dims_of(call.arg("dim") or 0, len(source.shape))
    if part.dim != dim:
        return Tiled((part,), call.again)
    times = call.arg("repeats")
    first, last = part.start // times, -(-part.stop // times)
    repeated = Part(dim, first * times, last * times)

    def compute(run: Run, values: Any) -> Any:
        changes = {} if call.arg("output_size") is None else {"output_size": repeated.size}
        return sliced(run, call.again(run, values, **changes), part, repeated)

    return Tiled((Part(dim, first, last),), compute)
