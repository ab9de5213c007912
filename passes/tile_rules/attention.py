"""Scaled dot product attention as one operator: every dimension of its result can be cut, its keys are whole.

Only causal attention needs less than all keys: queries up to `b` look at keys up to `b`. What no query of a part may look at is
not read, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule

aten = torch.ops.aten


@tile_rule(aten.scaled_dot_product_attention.default)
def attention(call: TileCall, part: Part | None) -> Tiled:
    """`y[..., i, :] = sum_j softmax_j(scale q[..., i, :] . k[..., j, :] + mask[..., i, j]) v[..., j, :]`.

    Queries (i): `q[a:b]` and the mask's rows. Features: those of `v`. Batch: all that have it. Heads: all that have them, whole
    groups of query heads where they share keys.
    """
    assert part is not None
    _understood(call)
    rank = len(call.output.shape)
    if part.dim == rank - 1:
        value = call.index_of("value")
        needs = [None if index != value else _cut(spec, rank, part) for index, spec in enumerate(call.tensors)]
        return Tiled(tuple(needs), call.again)
    if part.dim == rank - 2:
        return _causal_queries(call, part) if call.arg("is_causal") else Tiled(_queries(call, part), call.again)
    if part.dim == rank - 3 and call.arg("enable_gqa"):
        return _grouped_heads(call, part)
    return Tiled(tuple(_cut(spec, rank, part) for spec in call.tensors), call.again)


def _understood(call: TileCall) -> None:
    """Raises Untileable for what is random, and for shapes that do not broadcast as we understand it."""
    if call.arg("dropout_p"):
        raise Untileable("drops at random")
    query, key, value = call.tensors[:3]
    output = call.output.shape
    rank = len(output)
    if (output[-2], output[-1]) != (query.shape[-2], value.shape[-1]) or key.shape[-2] != value.shape[-2]:
        raise Untileable("has arguments of unusual shapes")
    grouped = {1: -3, 2: -3} if call.arg("enable_gqa") else {}  # where keys and values have fewer heads
    for index, spec in enumerate(call.tensors):
        if len(spec.shape) > rank:
            raise Untileable("has an argument with more dimensions than its result")
        for dim in range(-len(spec.shape), -2):
            if spec.shape[dim] not in (1, output[dim]) and dim != grouped.get(index):
                raise Untileable("has an argument that does not broadcast to its result")
    for mask in call.tensors[3:]:
        scores = (query.shape[-2], key.shape[-2])[-len(mask.shape) :] if mask.shape else ()
        if call.arg("is_causal"):
            raise Untileable("has a mask and is causal")
        if any(size not in (1, wanted) for size, wanted in zip(mask.shape[-2:], scores, strict=True)):
            raise Untileable("has a mask that does not broadcast to its scores")


def _cut(spec: TensorSpec, rank: int, part: Part) -> Part | None:
    """The part of an argument along a dimension of the result, counted from the right; None where it broadcasts."""
    dim = part.dim - rank + len(spec.shape)
    return None if dim < 0 or spec.shape[dim] == 1 else Part(dim, part.start, part.stop)


def _queries(call: TileCall, part: Part) -> tuple[Part | None, ...]:
    """`q[a:b]` and the mask's rows; keys and values whole."""
    rank = len(call.output.shape)
    query, *masks = (_cut(spec, rank, part) for spec in (call.tensors[0], *call.tensors[3:]))
    return (query, None, None, *masks)


def _causal_queries(call: TileCall, part: Part) -> Tiled:
    """`y[a:b]` from `q[a:b]` and the keys `[0, c)`, `c = min(b, Sk)`: query `i` looks at keys `j <= i`.

    From the beginning (a = 0) that is a causal call again. Queries that all look at all of those keys (one query, or
    a >= Sk - 1) need no mask. The others get one, whose row r is true up to column a + r.
    """
    query, *others = call.tensors
    keys = min(part.stop, others[0].shape[-2])
    rank = len(call.output.shape)
    needs = (_cut(query, rank, part), *(Part(len(spec.shape) - 2, 0, keys) for spec in others))
    if part.start == 0:
        return Tiled(needs, call.again)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        if part.start + 1 >= keys:
            return call.again(run, values, is_causal=False)
        mask = run(aten.new_ones.default, values[0], [part.size, keys], dtype=torch.bool)
        return call.again(run, values, is_causal=False, attn_mask=run(aten.tril.default, mask, part.start))

    return Tiled(needs, compute)


def _grouped_heads(call: TileCall, part: Part) -> Tiled:
    """`y[h] = f(q[h], k[h // g], v[h // g])`: groups of g query heads share the keys and values of one head.

    A part that has the same number of query heads from each group that it touches is a grouped call again; any other is
    computed in whole groups, of which the wanted heads are a slice.
    """
    rank, heads = len(call.output.shape), call.output.shape[part.dim]
    if call.tensors[0].shape[-3] != heads:
        raise Untileable("has fewer query heads than its result")
    sizes = [heads // max(1, spec.shape[-3]) for spec in call.tensors[1:3]]
    wide = part
    if not all(_even(part, size) for size in sizes):
        group = lcm(*sizes)
        wide = Part(part.dim, part.start // group * group, -(-part.stop // group) * group)
        if wide.size >= heads:
            raise Untileable("shares keys and values between heads in and out of the part, so that all heads would be needed")
    needs: list[Part | None] = [_cut(spec, rank, wide) for spec in call.tensors]
    for index, size in enumerate(sizes, start=1):
        dim = len(call.tensors[index].shape) - 3
        needs[index] = Part(dim, wide.start // size, -(-wide.stop // size))

    def compute(run: Run, values: Sequence[Any]) -> Any:
        whole = call.again(run, values)
        if wide == part:
            return whole
        inner = part.within(wide)
        return run(aten.slice.Tensor, whole, inner.dim, inner.start, inner.stop)

    return Tiled(tuple(needs), compute)


def _even(part: Part, size: int) -> bool:
    """Whether a part has equally many members of each group of `size` that it touches."""
    first, last = part.start // size, (part.stop - 1) // size
    counts = {min(part.stop, (g + 1) * size) - max(part.start, g * size) for g in range(first, last + 1)}
    return len(counts) == 1
