"""Group norm: by samples and whole groups as it is; by rows in two steps, statistics that are merged and then the norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Reduced, Run, TileCall, Tiled, Untileable, reduction_rule, tile_rule
from passes.tile_rules.common import hull_of, needs_of, together
from runtime import statistics  # noqa: F401  # makes the operators

aten = torch.ops.aten
own = torch.ops.vramplan


def _whole_groups(part: Part, channels: int, groups: int) -> tuple[int, int]:
    """The groups [first, last) that the channels of the part lie in.

    Raises:
        Untileable: that is all of several, for a part of the channels.
    """
    size = channels // groups
    first, last = part.start // size, -(-part.stop // size)
    if last - first == groups and part.size < channels:
        raise Untileable(f"needs all of its {groups} groups for channels {part.start} to {part.stop}")
    return first, last


@tile_rule(own.group_statistics.default)
def statistics_of_groups(call: TileCall, part: Part | None) -> Tiled:
    """`s[a:b] = statistics(x[a:b])` for samples; for groups of `k` channels `statistics(x[:, ak:bk])`."""
    assert part is not None
    if part.dim == 0:
        return Tiled((part,), call.again)
    if part.dim == 2:
        raise Untileable("gives count, mean and deviations together")
    size = call.tensors[0].shape[1] // call.arg("groups")
    return Tiled((Part(1, part.start * size, part.stop * size),), lambda run, values: call.again(run, values, groups=part.size))


@reduction_rule(own.group_statistics.default)
def merged_statistics(call: TileCall, part: Part) -> Reduced:
    """`s = merge_t(statistics(x_t))`, parts along what follows the channels."""
    if part.dim < 2:
        raise Untileable(f"keeps dimension {part.dim}: its results are parts there, and not merged")
    return Reduced((part,), call.again, lambda run, stacked: run(own.merge_statistics.default, stacked))


@tile_rule(own.merge_statistics.default)
def merged(call: TileCall, part: Part | None) -> Tiled:
    """`s[a:b] = merge(t[:, a:b])` for samples and groups."""
    assert part is not None
    if part.dim == 2:
        raise Untileable("merges count, mean and deviations together")
    return Tiled((Part(part.dim + 1, part.start, part.stop),), call.again)


@tile_rule(own.group_normalise.default)
def normalised(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = norm(x[a:b], s)` along what follows the channels; samples take `s[a:b]`, channels whole groups and theirs."""
    assert part is not None
    if part.dim >= 2:
        return Tiled(needs_of(call, x=part), call.again)
    if part.dim == 0:
        return Tiled(needs_of(call, x=part, statistics=part), call.again)
    channels, groups = call.output.shape[1], call.tensors[1].shape[1]
    first, last = _whole_groups(part, channels, groups)
    hull = Part(1, first * (channels // groups), last * (channels // groups))
    own_channels = Part(0, hull.start, hull.stop)
    needs = needs_of(call, x=hull, statistics=Part(1, first, last), weight=own_channels, bias=own_channels)
    return together([part], hull, needs, call.again)


@tile_rule(aten.group_norm.default)
def group_norm(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = group_norm(x[a:b])` for samples and, of channels, whole groups."""
    assert part is not None
    if part.dim >= 2:
        raise Untileable("needs statistics over all of its input")
    if part.dim == 0:
        return Tiled(needs_of(call, input=part), call.again)
    channels, groups = call.output.shape[1], call.arg("num_groups")
    first, last = _whole_groups(part, channels, groups)
    hull = Part(1, first * (channels // groups), last * (channels // groups))
    own_channels = Part(0, hull.start, hull.stop)
    needs = needs_of(call, input=hull, weight=own_channels, bias=own_channels)
    return together([part], hull, needs, lambda run, values: call.again(run, values, num_groups=last - first))


@tile_rule(aten.native_group_norm.default)
def native_group_norm(call: TileCall, *parts: Part | None) -> Tiled:
    """As `group_norm`; the second and third result are mean and deviation of each group, whose dimension 1 counts groups.

    The kernel wants its input contiguous, which a part need not be.
    """
    result = parts[0]
    if result is not None and result.dim >= 2:
        raise Untileable("needs statistics over all of its input")
    channels, groups = call.arg("C"), call.arg("group")
    size = channels // groups
    if all(part is None or part.dim == 0 for part in parts):
        hull = hull_of(parts)
        return together(
            parts, hull, needs_of(call, input=hull), lambda run, values: _contiguous(call, run, values, N=hull.size)
        )
    if result is None or any(part is not None for part in parts[1:]):
        raise Untileable("is wanted in part along its groups")
    first, last = _whole_groups(result, channels, groups)
    hull, own_channels = Part(1, first * size, last * size), Part(0, first * size, last * size)

    def compute(run: Run, values: Any) -> Any:
        return _contiguous(call, run, values, C=hull.size, group=last - first)

    return together(parts, hull, needs_of(call, input=hull, weight=own_channels, bias=own_channels), compute)


def _contiguous(call: TileCall, run: Run, values: Sequence[Any], **changes: int) -> Any:
    return call.again(run, [run(aten.contiguous.default, values[0]), *values[1:]], **changes)
