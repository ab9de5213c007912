"""Reductions and scans, tiled along what they keep; sums, means, extremes and norms are also merged of parts of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduction_rule, tile_rule
from passes.tile_rules.common import dims_of, hull_of, needs_of, refuse_along, together

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)


def reduced_dims(call: TileCall) -> tuple[int, ...]:
    """The dimensions of the first tensor that the call reduces, ascending: what `dim` says, all where it says nothing.

    Raises:
        Untileable: the result has not the shape that reducing these gives.
    """
    source = call.tensors[0].shape
    rank = len(source)
    named = {argument.name for argument in call.target._schema.arguments}
    given = call.arg("dim") if "dim" in named else None
    dims = range(rank) if given is None or given == [] or given == () else sorted(set(dims_of(given, rank)))
    keep = "keepdim" in named and bool(call.arg("keepdim"))
    shape = tuple(1 if dim in dims else n for dim, n in enumerate(source) if keep or dim not in dims)
    if any(output.shape != shape for output in call.outputs):
        raise Untileable("reduces dimensions in an unusual way")
    return tuple(dims)


@tile_rule(
    aten.sum.dim_IntList, aten.nansum.default, aten.mean.dim, aten.nanmean.default, aten.prod.dim_int, aten.amax.default,
    aten.amin.default, aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims, aten.max.dim, aten.min.dim,
    aten.aminmax.default, aten.argmax.default, aten.argmin.default, aten.var.dim, aten.var.correction, aten.std.dim,
    aten.std.correction, aten.var_mean.dim, aten.var_mean.correction, aten.std_mean.dim, aten.std_mean.correction,
    aten.logsumexp.default, aten.special_logsumexp.default, aten.median.dim, aten.nanmedian.dim, aten.kthvalue.default,
    aten.mode.default, aten.count_nonzero.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype, aten.frobenius_norm.dim,
)  # fmt: skip
def reduction(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = reduce(x[a:b])`, along a dimension that is kept (which may have another number in `x`)."""
    hull = hull_of(parts)
    rank, dims = len(call.tensors[0].shape), reduced_dims(call)
    if len(call.outputs[0].shape) < rank:
        source = [dim for dim in range(rank) if dim not in dims][hull.dim]
    else:
        source = hull.dim
        refuse_along(hull, dims, "reduces")
    needs = needs_of(call, self=Part(source, hull.start, hull.stop))
    return together(parts, hull, needs, call.again)


@tile_rule(
    aten.cumsum.default, aten.cumprod.default, aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default
)  # fmt: skip
def scan(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = scan(x[a:b])`, along another dimension than the one that is accumulated."""
    hull = hull_of(parts)
    refuse_along(hull, dims_of(call.arg("dim"), len(call.outputs[0].shape)), "accumulates")
    return together(parts, hull, needs_of(call, self=hull), call.again)


# --- merging -----------------------------------------------------------------------------------------------------------


def _merged(call: TileCall, part: Part, operator: Any, ways: dict[str, Any], merge: Any) -> Reduced:
    """Partial results by `operator` over the same dimensions, with other arguments in `ways`."""
    dims = reduced_dims(call)
    if part.dim not in dims:
        raise Untileable(f"keeps dimension {part.dim}: its results are parts there, and not merged")
    named = {argument.name for argument in call.target._schema.arguments}
    keep = bool(call.arg("keepdim")) if "keepdim" in named else False

    def partial(run: Run, values: Sequence[Any]) -> Any:
        return run(operator, values[0], *ways.get("args", ()), list(dims), keep, **ways.get("kwargs", {}))

    return Reduced(needs_of(call, self=part), partial, merge)


def _accumulator(call: TileCall) -> torch.dtype:
    """What partial results are added up in: the type of the result, fp32 where that is half.

    Raises:
        Untileable: the argument is rounded to a narrower type before it is reduced.
    """
    source, result = call.tensors[0].dtype, call.output.dtype
    fractional = source.is_floating_point or source.is_complex
    if result == torch.bool or result == torch.complex32:
        raise Untileable(f"gives {result}, whose sums are not sums of parts")
    if torch.promote_types(source, result) != result and (fractional or result.is_floating_point):
        raise Untileable(f"rounds to {result} before it adds")
    if result in _HALF and not fractional:
        raise Untileable(f"rounds to {result} before it adds")
    return torch.float32 if result in _HALF else result


def _rounded(run: Run, value: Any, call: TileCall, accumulator: torch.dtype) -> Any:
    return value if accumulator == call.output.dtype else run(aten.to.dtype, value, call.output.dtype)


@reduction_rule(aten.sum.dim_IntList, aten.sum.default)
def merged_sum(call: TileCall, part: Part) -> Reduced:
    """`y = sum_t sum(x_t)`, in fp32 at least."""
    accumulator = _accumulator(call)

    def merge(run: Run, stacked: Any) -> Any:
        return _rounded(run, run(aten.sum.dim_IntList, stacked, [0], False, dtype=accumulator), call, accumulator)

    return _merged(call, part, aten.sum.dim_IntList, {"kwargs": {"dtype": accumulator}}, merge)


@reduction_rule(aten.mean.dim, aten.mean.default)
def merged_mean(call: TileCall, part: Part) -> Reduced:
    """`y = sum_t sum(x_t) / n`, in fp32 at least."""
    accumulator = _accumulator(call)
    count = prod(call.tensors[0].shape[dim] for dim in reduced_dims(call))

    def merge(run: Run, stacked: Any) -> Any:
        total = run(aten.sum.dim_IntList, stacked, [0], False, dtype=accumulator)
        return _rounded(run, run(aten.div.Scalar, total, count), call, accumulator)

    return _merged(call, part, aten.sum.dim_IntList, {"kwargs": {"dtype": accumulator}}, merge)


@reduction_rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def merged_extreme(call: TileCall, part: Part) -> Reduced:
    """`y = max_t max(x_t)`; the same for the least."""
    operator = aten.amax.default if call.target in (aten.amax.default, aten.max.default) else aten.amin.default
    return _merged(call, part, operator, {}, lambda run, stacked: run(operator, stacked, [0]))


@reduction_rule(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def merged_truth(call: TileCall, part: Part) -> Reduced:
    """`y = any_t any(x_t)`; the same for all."""
    operator = aten.any.dims if call.target in (aten.any.default, aten.any.dim, aten.any.dims) else aten.all.dims
    return _merged(call, part, operator, {}, lambda run, stacked: run(operator, stacked, [0]))


@reduction_rule(
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype, aten.norm.Scalar
)  # fmt: skip
def merged_norm(call: TileCall, part: Part) -> Reduced:
    """`y = norm_t(norm(x_t))` for orders of 1 and above, in fp32 at least."""
    order = call.arg("ord" if call.target is aten.linalg_vector_norm.default else "p")
    order = 2 if order is None else order
    if not call.tensors[0].dtype.is_floating_point or order < 1:
        raise Untileable(f"of order {order} has no norm of norms")
    accumulator = _accumulator(call)

    def merge(run: Run, stacked: Any) -> Any:
        whole = run(aten.linalg_vector_norm.default, stacked, order, [0], False, dtype=accumulator)
        return _rounded(run, whole, call, accumulator)

    ways = {"args": (order,), "kwargs": {"dtype": accumulator}}
    return _merged(call, part, aten.linalg_vector_norm.default, ways, merge)
