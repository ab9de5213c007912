"""Interpolation to another size: nearest, linear, cubic, antialiased, and sampling at given points.

The coordinates are always those of the whole (`resampling_axis`). Where they repeat after few elements, as they do for all
whole factors, the operator itself runs on a slice of its source, with the halo that its weights reach; where they do not, the
elements along the tiled dimension are gathered and weighted one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.resampling_axis import Axis, Window, float32_step, is_lean, nearest_table, window

aten = torch.ops.aten

# Family: the mode, and the packet's overload with explicit sizes, by which every tile is computed.
_FAMILIES = {
    aten.upsample_nearest1d: "nearest",
    aten.upsample_nearest2d: "nearest",
    aten.upsample_nearest3d: "nearest",
    aten._upsample_nearest_exact1d: "nearest-exact",
    aten._upsample_nearest_exact2d: "nearest-exact",
    aten._upsample_nearest_exact3d: "nearest-exact",
    aten.upsample_linear1d: "linear",
    aten.upsample_bilinear2d: "linear",
    aten.upsample_trilinear3d: "linear",
    aten.upsample_bicubic2d: "cubic",
    aten._upsample_bilinear2d_aa: "linear-aa",
    aten._upsample_bicubic2d_aa: "cubic-aa",
}
_OVERLOADS = [getattr(packet, overload) for packet in _FAMILIES for overload in ("default", "vec")]


@tile_rule(*_OVERLOADS)
def upsample(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = sum_k w[a:b, k] * x[index[a:b, k]]`, index and weights those of the whole operator.

    Along batch and channels the operator is free. Of a spatial dimension the interval from the first to the last element read
    is needed; see `window` and `_gathered` for how it is used.
    """
    assert part is not None
    axes = _axes(call)
    if part.dim < 2:
        return Tiled((part,), call.again)
    axis = axes[part.dim - 2]
    found = window(axis, part.start, part.stop)
    if found is not None and is_lean(axis, part.start, part.stop, found):
        return _windowed(call, part, axes, found)
    if not axis.antialias:
        return _gathered(call, part, axes)
    raise Untileable(f"blends {axis.size} elements to {axis.out} by weights that do not repeat within a tile")


def _axes(call: TileCall) -> list[Axis]:
    """The spatial dimensions of the call, whichever overload it is."""
    mode = _FAMILIES[call.target.overloadpacket]
    source = call.tensors[0]
    if not mode.startswith("nearest") and not source.dtype.is_floating_point:
        raise Untileable(f"interpolates {source.dtype}, whose rounding depends on the kernel")
    names = {argument.name for argument in call.target._schema.arguments}
    align = bool(call.arg("align_corners")) if "align_corners" in names else False
    sizes, outs = source.shape[2:], call.output.shape[2:]
    if mode.endswith("-aa") and (align or 1 in outs):
        raise Untileable("is antialiased " + ("with align_corners=True" if align else "to a size of 1"))
    geometry = zip(sizes, outs, _factors(call, names), strict=True)
    axes = [Axis(size, out, factor, mode, align, source.dtype == torch.float64) for size, out, factor in geometry]
    if mode.startswith("nearest"):
        for axis in axes:
            nearest_table(axis)  # refuses what depends on the kernel
    elif any(axis.size == axis.out and not axis.unchanged for axis in axes):
        raise Untileable("has a scale factor but keeps a size: some kernels copy, some scale")
    return axes


def _factors(call: TileCall, names: set[str]) -> list[float | None]:
    """The scale factors that the call gives, one a spatial dimension; ATen takes those that are not positive for absent."""
    rank = len(call.output.shape) - 2
    if "scale_factors" in names:
        given = call.arg("scale_factors") or [None] * rank
    else:
        given = [call.arg(name) for name in ("scales", "scales_d", "scales_h", "scales_w") if name in names]
    return [float(factor) if factor is not None and factor > 0 else None for factor in given]


def _interpolate(
    call: TileCall, run: Run, value: Any, axes: Sequence[Axis], sizes: Sequence[int], factors: Sequence[Any]
) -> Any:
    """The operator itself, to explicit sizes."""
    corners = () if axes[0].nearest else (axes[0].align_corners,)
    return run(call.target.overloadpacket.default, value, list(sizes), *corners, *factors)


def _windowed(call: TileCall, part: Part, axes: list[Axis], found: Window) -> Tiled:
    """The operator on a slice that begins a whole number of periods in: the same coordinates but for a whole shift."""
    sizes = [axis.out for axis in axes]
    factors = [axis.factor for axis in axes]
    sizes[part.dim - 2], factors[part.dim - 2] = found.out, found.factor

    def compute(run: Run, values: Sequence[Any]) -> Any:
        result = _interpolate(call, run, values[0], axes, sizes, factors)
        if found.out == part.size:
            return result
        return run(aten.slice.Tensor, result, part.dim, found.drop, found.drop + part.size)

    return Tiled((Part(part.dim, found.start, found.stop),), compute)


def _gathered(call: TileCall, part: Part, axes: list[Axis]) -> Tiled:
    """Elements along the tiled dimension by index, then the operator along the others.

    In half precision the sums are of float32 and rounded once, at the end.
    """
    axis = axes[part.dim - 2]
    low, high = axis.reads(part.start, part.stop)
    source = call.tensors[0]
    gather = _nearest_elements if axis.nearest else _weighted_elements
    sizes = [part.size if other is axis else other.out for other in axes]
    factors = [None if other is axis else other.factor for other in axes]
    others = not all(other is axis or other.unchanged for other in axes)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        result = gather(run, values[0], call, part, axis, low, high)
        if others:
            result = _interpolate(call, run, result, axes, sizes, factors)
        if not axis.nearest and source.dtype.itemsize < 4:
            result = run(aten.to.dtype, result, source.dtype)
        return result

    return Tiled((Part(part.dim, low, high),), compute)


def _counted(run: Run, value: Any, part: Part, shift: float, dtype: torch.dtype) -> Any:
    """`[start + shift, ..., stop - 1 + shift]` on the device of `value`, which a rule does not know."""
    ones = run(aten.new_ones.default, value, [part.size], dtype=torch.int64)
    counted = run(aten.to.dtype, run(aten.cumsum.default, ones, 0), dtype)
    return run(aten.add.Tensor, counted, part.start - 1 + shift)


def _nearest_elements(run: Run, value: Any, call: TileCall, part: Part, axis: Axis, low: int, high: int) -> Any:
    """`x[floor((d + shift) * step)]`, in float32 arithmetic as the operator's."""
    shift = 0.5 if axis.mode == "nearest-exact" else 0.0
    position = run(aten.mul.Tensor, _counted(run, value, part, shift, torch.float32), float(float32_step(axis)))
    index = run(aten.sub.Tensor, run(aten.to.dtype, position, torch.int64), low)
    return run(aten.index_select.default, value, part.dim, run(aten.clamp.default, index, 0, high - low - 1))


def _weighted_elements(run: Run, value: Any, call: TileCall, part: Part, axis: Axis, low: int, high: int) -> Any:
    """`sum_k w_k(t) * x[i + k]` where `i + t` is the position, in the type that the operator computes in.

    An index that rounding puts beside the interval has a weight of 0 but for rounding, so that clamping it changes nothing.
    """
    compute_dtype = torch.float64 if call.output.dtype == torch.float64 else torch.float32
    half = 0.0 if axis.align_corners else 0.5
    position = run(aten.mul.Tensor, _counted(run, value, part, half, compute_dtype), float(axis.step))
    position = run(aten.sub.Tensor, position, low + half)
    if axis.mode == "linear":
        position = run(aten.clamp.default, position, 0, high - low - 1)
    whole = run(aten.floor.default, position)
    offset = run(aten.sub.Tensor, position, whole)
    index = run(aten.to.dtype, whole, torch.int64)
    result = None
    for place, weight in _weights(run, axis.mode, offset):
        at = run(aten.clamp.default, run(aten.add.Tensor, index, place), 0, high - low - 1)
        column = run(aten.view.default, weight, [part.size] + [1] * (len(call.output.shape) - 1 - part.dim))
        term = run(aten.mul.Tensor, run(aten.index_select.default, value, part.dim, at), column)
        result = term if result is None else run(aten.add.Tensor, result, term)
    return result


def _weights(run: Run, mode: str, t: Any) -> list[tuple[int, Any]]:
    """The elements beside a position and their weights, by the part `t` of the position after the point."""
    if mode == "linear":
        return [(0, run(aten.rsub.Scalar, t, 1)), (1, t)]

    def polynomial(s: Any, *coefficients: float) -> Any:
        value = run(aten.mul.Tensor, s, coefficients[0])
        for coefficient in coefficients[1:-1]:
            value = run(aten.mul.Tensor, run(aten.add.Tensor, value, coefficient), s)
        return run(aten.add.Tensor, value, coefficients[-1])

    # Keys' convolution kernel; ATen takes a = -0.75 (UpSample.h, get_cubic_upsample_coefficients).
    a = -0.75
    near, far = (a + 2, -(a + 3), 0.0, 1.0), (a, -5 * a, 8 * a, -4 * a)
    other = run(aten.rsub.Scalar, t, 1)
    return [
        (-1, polynomial(run(aten.add.Tensor, t, 1), *far)),
        (0, polynomial(t, *near)),
        (1, polynomial(other, *near)),
        (2, polynomial(run(aten.add.Tensor, other, 1), *far)),
    ]


@tile_rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(call: TileCall, part: Part | None) -> Tiled:
    """`y[n, c, i, j] = sample(x[n, c], grid[n, i, j])`: any source element may be asked for, so the source is needed whole.

    A part of the batch needs it of both, one of the channels none of the grid, one of a spatial dimension only the grid's.
    """
    assert part is not None
    if part.dim == 0:
        return Tiled((part, part), call.again)
    if part.dim == 1:
        return Tiled((part, None), call.again)
    return Tiled((None, Part(part.dim - 1, part.start, part.stop)), call.again)
