"""Several tensors as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.parts import nothing

aten = torch.ops.aten


def _as_result(call: TileCall, run: Run, values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
    """The chosen values, of the result's type where joining those alone would give another one."""
    given, dtype = [values[i] for i in chosen], call.output.dtype
    if reduce(torch.promote_types, (call.tensors[i].dtype for i in chosen)) == dtype and len(given) > 1:
        return given
    return [v if call.tensors[i].dtype == dtype else run(aten.to.dtype, v, dtype) for i, v in zip(chosen, given, strict=True)]


def _joined(call: TileCall, part: Part, dim: int) -> Tiled:
    """`y[a:b] = cat(x_i[a - o_i : b - o_i], ...)` along the joined dimension; along others of the same part of each.

    A tensor without a piece in the interval is left out, and one piece alone needs no operator.
    """
    # A tensor of shape [0] joins anything, and adds nothing.
    legacy = [len(spec.shape) < len(call.output.shape) for spec in call.tensors]
    sizes = [0 if skip else spec.shape[dim] for spec, skip in zip(call.tensors, legacy, strict=True)]
    if part.dim != dim:
        needs = [None if skip else part for skip in legacy]
        pieces = [index for index, skip in enumerate(legacy) if not skip]
    else:
        starts = list(accumulate(sizes, initial=0))
        # Clipped, so that an empty part is at the tensor's nearer end: a hull with the neighbouring tiles' parts stays small.
        needs = [
            Part(dim, *(min(max(edge - start, 0), size) for edge in (part.start, part.stop))) if not skip else Part(0, 0, 0)
            for start, size, skip in zip(starts, sizes, legacy, strict=False)
        ]
        pieces = [index for index, need in enumerate(needs) if need and need.size]

    def compute(run: Run, values: Sequence[Any]) -> Any:
        given = _as_result(call, run, values, pieces)
        return given[0] if len(given) == 1 else run(aten.cat.default, given, dim)

    return Tiled(tuple(needs), compute)


@tile_rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = cat(x_i[a - o_i : b - o_i], ...)`; see `_joined`."""
    assert part is not None
    return _joined(call, part, call.arg("dim") % len(call.output.shape))


@tile_rule(aten.hstack.default, aten.vstack.default)
def stack_rows(call: TileCall, part: Part | None) -> Tiled:
    """As `cat` where that is what it is: `hstack` of vectors along dimension 0, otherwise along 1, `vstack` along 0."""
    assert part is not None
    rank = len(call.output.shape)
    if any(len(spec.shape) != rank for spec in call.tensors):
        raise Untileable("joins tensors of other ranks than its result")
    return _joined(call, part, 1 if call.target is aten.hstack.default and rank > 1 else 0)


@tile_rule(aten.stack.default)
def stack(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = stack(x_a, ..., x_(b-1))` along the new dimension; along others of the same part of each."""
    assert part is not None
    new = call.arg("dim") % len(call.output.shape)
    if part.dim != new:
        return Tiled((Part(part.dim - (part.dim > new), part.start, part.stop),) * len(call.tensors), call.again)
    needs = tuple(None if part.start <= i < part.stop else nothing(spec) for i, spec in enumerate(call.tensors))

    def compute(run: Run, values: Sequence[Any]) -> Any:
        given = _as_result(call, run, values, range(part.start, part.stop))
        return run(aten.unsqueeze.default, given[0], new) if len(given) == 1 else run(aten.stack.default, given, new)

    return Tiled(needs, compute)


@tile_rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(call: TileCall, *parts: Part | None) -> Tiled:
    """Declines: the results are made of a few numbers."""
    raise Untileable("makes grids of a few numbers, which are as well made whole")
