"""Reshapes: the same elements, in the same order, under another shape."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.parts import nothing, sliced

aten = torch.ops.aten

Groups = list[tuple[list[int], list[int]]]


def factor_groups(source: Sequence[int], target: Sequence[int]) -> Groups:
    """The dimensions of two shapes of as many elements, in the smallest runs of equal products; those of size 1 are in none.

    `(2, 6, 5), (12, 1, 5)` gives `[([0, 1], [0]), ([2], [2])]`. A reshape maps the elements of each run onto each other, for
    itself.
    """
    assert prod(source) == prod(target) != 0, f"{tuple(source)} is not reshaped to {tuple(target)}"
    left = [dim for dim, size in enumerate(source) if size != 1]
    right = [dim for dim, size in enumerate(target) if size != 1]
    groups: Groups = []
    while left:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while (here := prod(source[d] for d in ours)) != (there := prod(target[d] for d in theirs)):
            if here < there:
                ours.append(left.pop(0))
            else:
                theirs.append(right.pop(0))
        groups.append((ours, theirs))
    return groups


@tile_rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_copy.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
def reshape(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = reshape(x[a*q//p : ceil(b*q/p)])[a*q - a*q//p*p :][: (b-a)*q]`, along the outermost dimensions of a group.

    There `q` and `p` are the elements that one index of the result's and the input's dimension has within the group. An inner
    dimension's elements are strewn over the whole group: were the input divided where they are, the group would be two.
    The part becomes a reshape even of a view, as a part's strides may not allow one.
    """
    assert part is not None
    source, target = call.tensors[0].shape, call.output.shape
    if 0 in target:
        raise Untileable("has no elements")
    # What `view_as` reads of its second tensor is the shape, which is known.
    unread = tuple(nothing(spec) for spec in call.tensors[1:])
    if target[part.dim] == 1:
        return Tiled((None, *unread), lambda run, values: run(aten.reshape.default, values[0], list(target)))
    ours, theirs = next(group for group in factor_groups(source, target) if part.dim in group[1])
    if part.dim != theirs[0]:
        raise Untileable(f"spreads dimension {part.dim} of its result over all of dimension {ours[0]} of its input")
    p, q = (prod(shape[d] for d in dims[1:]) for shape, dims in ((source, ours), (target, theirs)))
    need = Part(ours[0], part.start * q // p, -(-part.stop * q // p))
    first, held = part.start * q - need.start * p, need.size * p
    before, after, beyond = target[: part.dim], target[part.dim + 1 :], target[theirs[-1] + 1 :]

    def compute(run: Run, values: Sequence[Any]) -> Any:
        if first % q == held % q == 0:
            value = run(aten.reshape.default, values[0], [*before, held // q, *after])
            return sliced(run, value, Part(part.dim, first // q, first // q + part.size), held // q)
        flat = run(aten.reshape.default, values[0], [*before, held, *beyond])
        piece = sliced(run, flat, Part(part.dim, first, first + part.size * q), held)
        return run(aten.reshape.default, piece, [*before, part.size, *after])

    return Tiled((need, *unread), compute)


@tile_rule(aten.view.dtype, aten.view_copy.dtype)
def view_dtype(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])` where elements stay of the same size; otherwise strides would have to suit."""
    assert part is not None
    if call.tensors[0].dtype.itemsize != call.output.dtype.itemsize:
        raise Untileable("changes the size of an element, which a part's strides may not allow")
    return Tiled((part,), call.again)
