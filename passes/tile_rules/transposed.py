"""Transposed convolutions: every row of the argument adds to a window of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, tile_rule
from passes.tile_rules.channels import group_range
from passes.tile_rules.windows import Windows, ceil_div, needs_of, padded, per_axis, replaced, sliced

aten = torch.ops.aten


@tile_rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b]` from the rows `i` of `x` with `a <= i*s - p + d*j < b` for a `j < k`.

    Along the batch `y[a:b] = f(x[a:b])`, along the channels `y[a:b] = f(x, weight[:, a:b], bias[a:b])`.
    """
    assert part is not None
    return transposed_part(call, part)


def transposed_part(call: TileCall, part: Part) -> Tiled:
    """`conv_transpose`, for any operator with arguments of these names."""
    rank = len(call.arg("weight").shape) - 2
    channel = len(call.output.shape) - rank - 1  # 1, or 0 without a batch
    if part.dim > channel:
        return _spatial(call, part, part.dim - channel - 1)
    if part.dim == channel:
        return _channels(call, part)
    return Tiled(needs_of(call, input=part), call.again)


def _channels(call: TileCall, part: Part) -> Tiled:
    """`y[a:b] = f(x, weight[:, a:b], bias[a:b])`; with groups `x` and the weight have but the inputs of those of [a, b).

    A part that begins or ends inside one of several groups computes these groups whole.
    """
    weight, groups = call.arg("weight"), call.arg("groups")
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    chosen = group_range(part, outputs, groups)
    start, stop = chosen.computed
    # A part is of one dimension: where it is the group's inputs, the group's outputs are sliced.
    of_weight = Part(1, start, stop) if groups == 1 else chosen.inputs(0, inputs)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        values = list(values)
        if groups > 1 and chosen.single:
            index = call.index_of("weight")
            assert index is not None
            origin = chosen.first * outputs
            values[index] = sliced(run, values[index], 1, start - origin, stop - origin, outputs)
        y = call.again(run, values, groups=chosen.last - chosen.first)
        return sliced(run, y, part.dim, part.start - start, part.stop - start, stop - start)

    return Tiled(needs_of(call, input=chosen.inputs(part.dim, inputs), weight=of_weight, bias=Part(0, start, stop)), compute)


@dataclass(frozen=True)
class _Cut:
    """What one dimension of the operator runs on and what it gives.

    Attributes:
        zeros: rows of zeros put before (first) and after the tile; negative: rows cut off.
        padding: results cut off on both sides by the operator itself.
        output_padding: results added at the end, on which no row has an influence.
        skipped: results before the wanted ones.
        results: the results computed.
    """

    zeros: tuple[int, int]
    padding: int
    output_padding: int
    skipped: int
    results: int


def _spatial(call: TileCall, part: Part, axis: int) -> Tiled:
    """The transposed convolution of the rows that reach [a, b), of which what lies before `a` and after `b` is cut off."""
    weight, rank = call.arg("weight"), len(call.arg("weight").shape) - 2
    stride, dilation = per_axis(call.arg("stride"), rank), per_axis(call.arg("dilation"), rank)
    padding, extra = per_axis(call.arg("padding"), rank), per_axis(call.arg("output_padding"), rank)
    size = call.arg("input").shape[part.dim]
    windows = Windows(size, weight.shape[2 + axis], stride[axis], dilation[axis], padding[axis])
    reached = windows.reached_from(part.start, part.stop)
    if reached is None:
        # Nothing but the bias: zeros in the place of whichever row is nearest.
        row = min(max((part.start + windows.padding) // windows.stride, 0), size - 1)
        reached, cut = (row, row + 1), _only_bias(windows, part)
    else:
        cut = _cut(windows, part, *reached)
    x_index = call.index_of("input")
    assert x_index is not None
    pads = [cut.zeros if index == axis else (0, 0) for index in range(rank)]

    def compute(run: Run, values: Sequence[Any]) -> Any:
        values = list(values)
        values[x_index] = padded(run, values[x_index], pads)
        y = call.again(
            run,
            values,
            padding=replaced(padding, axis, cut.padding),
            output_padding=replaced(extra, axis, cut.output_padding),
        )
        return sliced(run, y, part.dim, cut.skipped, cut.skipped + part.size, cut.results)

    return Tiled(needs_of(call, input=Part(part.dim, *reached)), compute)


def _cut(windows: Windows, part: Part, low: int, high: int) -> _Cut:
    """How [part.start, part.stop) comes from the rows [low, high), all of those that reach it.

    Results that no row reaches (the kernel is smaller than the stride, or output padding) are at the end given by
    `output_padding`, which they fit in: the next row would reach further. At the start they are given by a row of zeros.
    """
    gap = low * windows.stride - windows.padding > part.start
    low -= gap
    first = low * windows.stride - windows.padding
    end = (high - 1) * windows.stride - windows.padding + windows.reach
    missing = max(0, part.stop - end)
    both = min(part.start - first, end + missing - part.stop)
    return _Cut((int(gap), 0), both, missing, part.start - first - both, end + missing - first - 2 * both)


def _only_bias(windows: Windows, part: Part) -> _Cut:
    """Enough rows of zeros, instead of the one row that there is, for a result of the part's size."""
    rows = 1 + max(0, ceil_div(part.size - windows.reach, windows.stride))
    return _Cut((rows, -1), 0, 0, 0, (rows - 1) * windows.stride + windows.reach)
