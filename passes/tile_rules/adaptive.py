"""Adaptive pools: result `i` of `m` looks at the rows from `floor(i*n/m)` to `ceil((i+1)*n/m)` of `n`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduction_rule, tile_rule
from passes.tile_rules.pooling import with_indices
from passes.tile_rules.windows import ceil_div, per_axis, replaced, sliced

aten = torch.ops.aten

MOST_ROWS = 32
"""Results that are computed one by one, a launch each, where their windows are not those of a smaller adaptive pool."""

_AVERAGES = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
}
_MAXIMA = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}


def _window(index: int, size: int, results: int) -> tuple[int, int]:
    return index * size // results, ceil_div((index + 1) * size, results)


@tile_rule(*_AVERAGES, *_MAXIMA)
def adaptive_pool(call: TileCall, part: Part | None, indices: Part | None = None) -> Tiled:
    """`y[a:b] = pool(x[floor(a*n/m) : ceil(b*n/m)], b - a)` where that has the same windows, else row by row."""
    rank = {**_AVERAGES, **_MAXIMA}[call.target]
    if indices is not None or part is None:
        return with_indices(call, rank, part, indices)
    axis = part.dim - (len(call.outputs[0].shape) - rank)
    if axis < 0:
        return Tiled((part,), lambda run, values: _wrapped(call, _pooled(call, run, values[0])))
    size, results = call.tensors[0].shape[part.dim], call.outputs[0].shape[part.dim]
    windows = [_window(index, size, results) for index in range(part.start, part.stop)]
    first, last = windows[0][0], windows[-1][1]
    here = [(start - first, stop - first) for start, stop in windows]
    shape = per_axis(call.arg("output_size"), rank)
    alike = here == [_window(index, last - first, part.size) for index in range(part.size)]
    if not alike and part.size > MOST_ROWS:
        raise Untileable(f"has windows of different sizes, {results} over {size} rows: that is a launch for each row")

    def compute(run: Run, values: Sequence[Any]) -> Any:
        (x,) = values
        if alike:
            return _wrapped(call, _pooled(call, run, x, replaced(shape, axis, part.size)))
        one = replaced(shape, axis, 1)
        rows = [_pooled(call, run, sliced(run, x, part.dim, a, b, last - first), one) for a, b in here]
        return _wrapped(call, run(aten.cat.default, rows, part.dim))

    return Tiled((Part(part.dim, first, last),), compute)


def _pooled(call: TileCall, run: Run, x: Any, shape: list[int] | None = None) -> Any:
    """The averages, or the maxima without their indices."""
    y = call.again(run, [x]) if shape is None else call.again(run, [x], output_size=shape)
    return run(operator.getitem, y, 0) if call.target in _MAXIMA else y


def _wrapped(call: TileCall, y: Any) -> Any:
    return [y, None] if call.target in _MAXIMA else y


@reduction_rule(*_AVERAGES)
def global_average(call: TileCall, part: Part) -> Reduced:
    """`mean(x) = (sum(x[0:a]) + sum(x[a:b]) + ...) / n`, for a pool to one element; half precision is summed in float32."""
    rank, x, y = _AVERAGES[call.target], call.tensors[0], call.output
    first = len(x.shape) - rank
    if any(n != 1 for n in y.shape[first:]) or part.dim < first or not y.dtype.is_floating_point:
        raise Untileable("is no average over all of its rows")
    precision = torch.promote_types(y.dtype, torch.float32)
    count = 1
    for n in x.shape[first:]:
        count *= n

    def partial(run: Run, values: Sequence[Any]) -> Any:
        return run(aten.sum.dim_IntList, values[0], list(range(first, len(x.shape))), True, dtype=precision)

    def merge(run: Run, stacked: Any) -> Any:
        mean = run(aten.div.Tensor, run(aten.sum.dim_IntList, stacked, [0]), count)
        return mean if y.dtype == precision else run(aten.to.dtype, mean, y.dtype)

    return Reduced((part,), partial, merge)
