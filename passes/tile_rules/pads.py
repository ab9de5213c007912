"""Padding: only the tiles at the borders have any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.parts import sliced

aten = torch.ops.aten

Mode = Literal["constant", "reflect", "replicate", "circular"]


class Edge(NamedTuple):
    """How a part of a padded dimension comes from `need` of the input: first padded by `pads`, then cut to `keep`.

    `turned`: all of it lies in one mirrored border.
    """

    need: Part
    pads: tuple[int, int]
    keep: tuple[int, int]
    turned: bool = False


def _constant(part: Part, size: int, before: int, after: int) -> Edge:
    """`y[a:b] = pad(x[a-l : b-l])` by what is outside of `x`; where all is outside, of nothing."""
    start, stop = part.start - before, part.stop - before
    need = Part(part.dim, min(max(start, 0), size), min(max(stop, 0), size))
    left = min(max(-start, 0), part.size)
    return Edge(need, (left, part.size - left - need.size), (0, part.size))


def _replicate(part: Part, size: int, before: int, after: int) -> Edge:
    """`y[a:b] = pad(x[a-l : b-l])` by what is outside of `x`; where all is outside, of the border's only element."""
    start, stop = part.start - before, part.stop - before
    need = Part(part.dim, min(max(start, 0), size - 1), max(min(stop, size), 1))
    left = min(max(-start, 0), part.size - 1)
    return Edge(need, (left, part.size - left - need.size), (0, part.size))


def _reflect(part: Part, size: int, before: int, after: int) -> Edge:
    """`y[a:b] = pad(x[hull])[...]`, the hull of what is wanted inside of `x` and of what is mirrored to its outside.

    A border's tile needs as many elements at the border as it has outside of it, and one more, to mirror them.
    """
    start, stop = part.start - before, part.stop - before
    if stop <= 0:
        return Edge(Part(part.dim, 1 - stop, 1 - start), (0, 0), (0, part.size), turned=True)
    if start >= size:
        last = 2 * (size - 1)
        return Edge(Part(part.dim, last - stop + 1, last - start + 1), (0, 0), (0, part.size), turned=True)
    left, right = max(-start, 0), max(stop - size, 0)
    low = min(max(start, 0), size - 1 - right) if right else max(start, 0)
    high = max(min(stop, size), left + 1) if left else min(stop, size)
    skipped = 0 if left else start - low
    return Edge(Part(part.dim, low, high), (left, right), (skipped, skipped + part.size))


_EDGES = {"constant": _constant, "replicate": _replicate, "reflect": _reflect}


@tile_rule(
    aten.pad.default, aten.constant_pad_nd.default, aten._pad_circular.default,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
)  # fmt: skip
def pad(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = pad(x[...])` with the padding that is in the interval; in the interior `x[a-l : b-l]`, without any operator.

    Negative padding is a crop. What is mirrored or wrapped round is part of what is needed.
    """
    assert part is not None
    mode = _mode(call)
    shape, name = call.tensors[0].shape, _name(call)
    given = list(call.arg(name))
    at = 2 * (len(shape) - 1 - part.dim)  # the last dimension's come first
    if at >= len(given) or not any(given[at : at + 2]):
        return Tiled((part,), call.again)
    before, after = given[at : at + 2]
    if mode == "circular":
        return _circular(call, part, at, before, after)
    edge = _EDGES[mode](part, shape[part.dim], before, after)
    pads = [*given[:at], *edge.pads, *given[at + 2 :]]
    held = edge.need.size + sum(edge.pads)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        value = run(aten.flip.default, values[0], [part.dim]) if edge.turned else values[0]
        padded = call.again(run, [value], **{name: pads}) if any(pads) else value
        return sliced(run, padded, Part(part.dim, *edge.keep), held)

    return Tiled((edge.need,), compute)


def _name(call: TileCall) -> str:
    """What the operator calls its padding."""
    return next(name for name in ("pad", "padding") if any(name == a.name for a in call.target._schema.arguments))


def _mode(call: TileCall) -> Mode:
    modes: dict[str, Mode] = {
        "constant": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular",
        "aten::constant_pad_nd": "constant", "aten::_pad_circular": "circular",
        "aten::reflection_pad1d": "reflect", "aten::reflection_pad2d": "reflect", "aten::reflection_pad3d": "reflect",
        "aten::replication_pad1d": "replicate", "aten::replication_pad2d": "replicate", "aten::replication_pad3d": "replicate",
    }  # fmt: skip
    said = call.arg("mode") if call.target is aten.pad.default else call.target._schema.name
    if said not in modes:
        raise Untileable(f"pads in a way that is not known: {said!r}")
    return modes[said]


def _circular(call: TileCall, part: Part, at: int, before: int, after: int) -> Tiled:
    """`y[a:b] = cat(x[...], ...)` of the pieces that are wrapped round: what is behind the end is the beginning.

    Negative padding crops first: what is wrapped is cropped already.
    """
    first = max(-before, 0)
    size = call.tensors[0].shape[part.dim] - first - max(-after, 0)
    start, stop = part.start - max(before, 0), part.stop - max(before, 0)
    pieces = [
        Part(part.dim, first + max(start, turn * size) - turn * size, first + min(stop, (turn + 1) * size) - turn * size)
        for turn in range(start // size, -(-stop // size))
    ]
    need = Part(part.dim, min(piece.start for piece in pieces), max(piece.stop for piece in pieces))
    given = list(call.arg("pad"))
    pads = [*given[:at], 0, 0, *given[at + 2 :]]

    def compute(run: Run, values: Sequence[Any]) -> Any:
        value = values[0]
        # The other dimensions first, while the tile has no border twice.
        padded = call.again(run, [value], pad=pads) if any(pads) else value
        cuts = [sliced(run, padded, piece.within(need), need.size) for piece in pieces]
        return cuts[0] if len(cuts) == 1 else run(aten.cat.default, cuts, part.dim)

    return Tiled((need,), compute)
