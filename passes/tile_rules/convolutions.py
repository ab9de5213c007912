"""Convolutions: spatial parts with a halo, batch, output channels. Padding is only where the tensor ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.channels import group_range
from passes.tile_rules.transposed import transposed_part
from passes.tile_rules.windows import Windows, ceil_div, needs_of, padded, per_axis, sliced

aten = torch.ops.aten

# Operators whose padding is a word, and the same with numbers.
_NUMERIC = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension of what is computed: `size` rows between `before` and `after` rows of zeros give `count` results.

    Negative: so many rows are cut off.
    """

    windows: Windows
    size: int
    before: int
    after: int
    count: int

    @property
    def even(self) -> bool:
        return self.before == self.after >= 0

    @property
    def symmetric(self) -> int:
        """The least padding for both sides with which all wanted windows are among the computed ones."""
        return self.before + self.windows.stride * max(0, ceil_div(self.after - self.before, self.windows.stride))

    def results(self, padding: int) -> int:
        return (self.size + 2 * padding - self.windows.reach) // self.windows.stride + 1


def _borders(call: TileCall, rank: int) -> list[tuple[int, int]]:
    """The rows of zeros before and after each spatial dimension."""
    padding = call.arg("padding")
    if padding == "valid":
        return [(0, 0)] * rank
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(per_axis(call.arg("dilation"), rank), _weight(call).shape[2:], strict=True)]
        return [(total // 2, total - total // 2) for total in totals]  # of an odd number the larger half comes after
    return [(p, p) for p in per_axis(padding, rank)]


def _weight(call: TileCall) -> Any:
    return call.arg("weight")


def _axes(call: TileCall) -> list[_Axis]:
    """All spatial dimensions, whole."""
    weight, x = _weight(call), call.arg("input")
    rank = len(weight.shape) - 2
    borders = _borders(call, rank)
    strides, dilations = per_axis(call.arg("stride"), rank), per_axis(call.arg("dilation"), rank)
    rows = zip(x.shape[-rank:], weight.shape[2:], strides, dilations, borders, call.output.shape[-rank:], strict=True)
    return [_Axis(Windows(n, k, s, d, before), n, before, after, m) for n, k, s, d, (before, after), m in rows]


@tile_rule(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
def convolution(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = conv(x[a*s - p : (b-1)*s - p + d*(k-1) + 1])`, with zeros only for the rows that `x` has not.

    Along the batch `y[a:b] = conv(x[a:b])`, along the channels `y[a:b] = conv(x, weight[a:b], bias[a:b])`.
    """
    assert part is not None
    rank = len(_weight(call).shape) - 2
    channel = len(call.output.shape) - rank - 1  # 1, or 0 without a batch
    if part.dim > channel:
        return _spatial(call, part, part.dim - channel - 1)
    if part.dim == channel:
        return _channels(call, part)
    return Tiled(needs_of(call, input=part), call.again)


@tile_rule(aten.convolution.default, aten._convolution.default, aten._convolution.deprecated)
def general_convolution(call: TileCall, part: Part | None) -> Tiled:
    """A convolution or, where `transposed` is set, the transposed one."""
    assert part is not None
    return transposed_part(call, part) if call.arg("transposed") else convolution(call, part)


@tile_rule(aten._weight_norm.default, aten._weight_norm_interface.default)
def weight_norm(call: TileCall, *parts: Part | None) -> Tiled:
    """Refuses: all its arguments are weights, so there is nothing in it that a tile of an activation would make smaller."""
    raise Untileable("scales a weight, which every tile needs whole")


def _channels(call: TileCall, part: Part) -> Tiled:
    """`y[a:b] = conv(x, weight[a:b], bias[a:b])`; with groups `x` has but the channels of those that [a, b) lies in.

    A part that begins or ends inside one of several groups computes these groups whole.
    """
    weight, groups = _weight(call), call.arg("groups")
    chosen = group_range(part, weight.shape[0] // groups, groups)
    start, stop = chosen.computed
    out = Part(0, start, stop)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        y = call.again(run, values, groups=chosen.last - chosen.first)
        return sliced(run, y, part.dim, part.start - start, part.stop - start, stop - start)

    return Tiled(needs_of(call, input=chosen.inputs(part.dim, weight.shape[1]), weight=out, bias=out), compute)


def _spatial(call: TileCall, part: Part, axis: int) -> Tiled:
    axes = _axes(call)
    windows = axes[axis].windows
    low, high = windows.span(part.start, part.stop)
    touched = windows.touched(part.start, part.stop)
    if touched is None:
        # They see but padding, and an argument has to be something: a row, which is cut off again.
        first = min(max(low, 0), windows.size - 1)
        last = first + 1
        axes[axis] = _Axis(windows, 1, high - low, -1, part.size)
    else:
        first, last = touched
        axes[axis] = _Axis(windows, last - first, first - low, high - last, part.size)
    return Tiled(needs_of(call, input=Part(part.dim, first, last)), _Spatial(call, tuple(axes)))


@dataclass(frozen=True)
class _Spatial:
    """Computes a spatial part by one convolution, with the same padding on both sides of every dimension.

    Where the sides differ (a tile at one border; `same` with an even kernel) the larger padding is on both, and the results
    that are too many at the other side, computed with zeros that are none, are sliced off. Where they are more bytes than the
    tile, the zeros are copied to it instead.
    """

    call: TileCall
    axes: tuple[_Axis, ...]

    def __call__(self, run: Run, values: Sequence[Any]) -> Any:
        if self._copies():
            values = list(values)
            pads = [(0, 0) if axis.even else (axis.before, axis.after) for axis in self.axes]
            index = self.call.index_of("input") or 0
            values[index] = padded(run, values[index], pads)
            return self._convolve(run, values, [axis.before if axis.even else 0 for axis in self.axes])
        paddings = [axis.symmetric for axis in self.axes]
        y = self._convolve(run, values, paddings)
        for index, (axis, padding) in enumerate(zip(self.axes, paddings, strict=True)):
            start = (padding - axis.before) // axis.windows.stride
            dim = len(self.call.output.shape) - len(self.axes) + index
            y = sliced(run, y, dim, start, start + axis.count, axis.results(padding))
        return y

    def _convolve(self, run: Run, values: Sequence[Any], padding: list[int]) -> Any:
        call = self.call
        if call.target not in _NUMERIC:
            return call.again(run, values, padding=padding)
        x, weight, *bias = values
        options = (call.arg("stride"), padding, call.arg("dilation"), call.arg("groups"))
        return run(_NUMERIC[call.target], x, weight, bias[0] if bias else None, *options)

    def _copies(self) -> bool:
        """Whether zeros are copied to the tile: results that are sliced off would be more elements, or rows must go."""
        if any(min(axis.before, axis.after) < 0 for axis in self.axes):
            return True
        results = prod(axis.results(axis.symmetric) for axis in self.axes) - prod(axis.count for axis in self.axes)
        rows = prod(axis.size + (0 if axis.even else axis.before + axis.after) for axis in self.axes)
        weight = _weight(self.call)
        return results * weight.shape[0] > rows * weight.shape[1] * self.call.arg("groups")
