"""Norms and softmax over whole rows, and norms whose statistics are given: every dimension but those of a row can be cut."""

from __future__ import annotations

import torch

from passes.tile_rules.base import Part, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.common import dims_of, hull_of, needs_of, refuse_along, together

aten = torch.ops.aten


@tile_rule(
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default,
    aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default,
)  # fmt: skip
def softmax(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = softmax(x[a:b])`, along another dimension than softmax's."""
    assert part is not None
    refuse_along(part, dims_of(call.arg("dim"), len(call.output.shape)), "normalises")
    return Tiled((part,), call.again)


@tile_rule(
    aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default
)  # fmt: skip
def row_norm(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = norm(x[a:b], w, c)`, along another dimension than the last ones, which are normalised."""
    hull = hull_of(parts)
    rank = len(call.tensors[0].shape)
    refuse_along(hull, range(rank - len(call.arg("normalized_shape")), rank), "normalises")
    return together(parts, hull, needs_of(call, input=hull), call.again)


@tile_rule(
    aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default,
    aten.instance_norm.default,
)  # fmt: skip
def given_statistics(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = (x[a:b] - mean) / sqrt(var + eps) * w + c` with given statistics; along channels their part `[a:b]` too.

    Instance norm over its own statistics computes them of each sample and channel: these two dimensions can be cut then.
    """
    part, others = parts[0], parts[1:]
    if part is None or any(other is not None for other in others):
        raise Untileable("has statistics besides its result, of which no part is known")
    channels = Part(0, part.start, part.stop) if part.dim == 1 else None
    per_channel = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channels)
    _check_statistics(call, part)
    return together(parts, part, needs_of(call, input=part, **per_channel), call.again)


def _check_statistics(call: TileCall, part: Part) -> None:
    if call.target is aten.instance_norm.default:
        if not call.arg("use_input_stats"):
            return
        if call.arg("running_mean") is not None or call.arg("running_var") is not None:
            raise Untileable("writes its running statistics")
        if part.dim >= 2:
            raise Untileable("needs statistics over all of its input")
    elif call.target is not aten._native_batch_norm_legit_no_training.default and call.arg("training"):
        raise Untileable("needs statistics over all of its input")
