"""Where results of a region can be written over values that nothing reads any more, tile by tile.

before:  a value x [1, 256, H, W], read by a region for the last time, and new memory for its results
after:   results [1, 128, H, W] are written over channels 0 to 128 and 128 to 256 of x

Where every tile reads of the value, before it writes, just the rows that it writes, no tile reads what another has written.
Where tiles read more, or in another order, each first copies what it reads (a `Window`), and keeps the last of its own rows for
the tile behind it, in a small buffer. So values stay dense, unlike where results are written some rows before what they are
made of (Zheng et al., vMCU, MLSys 2024).

A result may be smaller than the value: the rest of the memory is then kept as long as the result is, which is worth it only
where it is needed until then, and windows are copies; so both are for the planner to decide. What is left of such memory, once
nothing reads it, is where results are written that fit, whoever reads the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from passes.program import storage_bytes, storage_id, tensors_of
from passes.regions import Region, TileNeeds, is_view, sharing
from passes.tile_rules import Part

aten = torch.ops.aten


# A storage, and elements of it.
_Range = tuple[int, int, int]


@dataclass(frozen=True)
class Over:
    """A result is written over `value`: of its dimension `dim` from `start` on; over all of it where that is None."""

    value: fx.Node
    dim: int | None = None
    start: int = 0


@dataclass(frozen=True)
class Window:
    """What each tile copies of a value before it writes over it.

    Attributes:
        parts: by tile. kept: how many of the rows before its own are in a buffer by then. halo: how many there are at most
            besides its own.
    """

    parts: tuple[Part, ...]
    kept: int
    halo: int

    @property
    def dim(self) -> int:
        return self.parts[0].dim


@dataclass
class Places:
    """Of results those that are written over something, and where; of values those that are read through windows."""

    over: dict[fx.Node, Over] = field(default_factory=dict)
    windows: dict[fx.Node, Window] = field(default_factory=dict)

    @property
    def chosen(self) -> list[fx.Node]:
        """The results that are only there where they may be: over part of a value, or over one read through windows."""
        return [node for node, over in self.over.items() if over.dim is not None or over.value in self.windows]


def places_over(
    region: Region,
    tiles: Sequence[TileNeeds],
    results: Sequence[fx.Node],
    allowed: Callable[[fx.Node], bool],
    windows: Callable[[fx.Node], bool],
    hosted: Collection[fx.Node] = (),
) -> Places:
    """Where results can be written over values, each in memory of its own.

    `allowed` says of a result that it may be over part of a value, `windows` that it may be over one that is read through
    them; `hosted` values live on the host.
    """
    places, taken, ends = Places(), list[_Range](), dict[fx.Node, bool]()
    candidates = [value for value in _candidates(region) if value not in hosted]
    for node, windowed in itertools.product(results, (False, True)):
        for value in candidates if node not in places.over else ():
            if not fits_over(value, node, allowed(node)):
                continue
            if value not in ends:
                ends[value] = _ends(region, value)
            place = _place(value, node, taken) if ends[value] else None
            if place is None or place.dim == tiles[0].written[node].dim or not _may_keep(region, place, node, allowed(node)):
                continue
            others = [result for result, over in places.over.items() if over.value is value]
            if any(tile.written[node] != tile.written[other] for tile in tiles for other in others):
                continue
            if value not in places.windows and not _reads_in_order(region, tiles, value, node):
                window = _window(region, tiles, value, node) if windowed and windows(node) else None
                if window is None:
                    continue
                places.windows[value] = window
            places.over[node] = place
            taken.append(_range(place, node))
            break
    return places


def more_of(value: fx.Node, result: fx.Node) -> int | None:
    """The dimension of which a value has more than a result; None where they have the same shape."""
    pairs = zip(value.meta["val"].shape, result.meta["val"].shape, strict=True)
    return next((dim for dim, (one, other) in enumerate(pairs) if one != other), None)


def fits_over(value: fx.Node, result: fx.Node, larger: bool = False) -> bool:
    """Whether a value has memory of its own, in which the result can be.

    `larger`: the value may have more of one dimension, where all before it are of size 1.
    """
    one, other = value.meta.get("val"), result.meta["val"]
    if not isinstance(value.target, torch._ops.OpOverload) or not isinstance(one, torch.Tensor):
        return False
    if one.dtype != other.dtype or one.dim() != other.dim() or not one.is_contiguous() or not other.is_contiguous():
        return False
    mine = value.target is aten.alias.default  # a result that was written over something larger
    if not mine and one.untyped_storage().nbytes() != one.numel() * one.dtype.itemsize:
        return False
    more = more_of(value, result)
    if more is None:
        return True
    before, after = slice(0, more), slice(more + 1, None)
    fits = one.shape[more] > other.shape[more] and set(one.shape[before]) <= {1} and one.shape[after] == other.shape[after]
    return larger and fits


def _candidates(region: Region) -> Iterator[fx.Node]:
    """What the region reads, and what else was in the same memory, by its last names: those before are of what is gone."""
    yield from region.operands
    others = {node for value in region.operands if value.target is aten.alias.default for node in sharing(value)}
    found = [node for node in others if node.target is aten.alias.default and node not in region.operands]
    yield from sorted(found, reverse=True)


def _ends(region: Region, value: fx.Node) -> bool:
    """Whether nothing reads a value's memory after the region, and within it only operators that read that value."""
    if not isinstance(value.meta.get("val"), torch.Tensor) or any(n.op != "call_function" for n in sharing(value)):
        return False
    mine = _overlapping(value)
    stop = max(region.ordered)
    if any(user > stop for n in mine for user in n.users):
        return False
    inside = _inside(region, value)
    if any(is_view(user) for user in inside) or bool(inside) != (value in region.operands):
        return False
    return not any(n in mine and n is not value for user in inside for n in user.all_input_nodes)


def _overlapping(value: fx.Node) -> list[fx.Node]:
    """The nodes whose values are in the memory of a dense value, itself among them."""
    first, end = _span(value.meta["val"])
    here = storage_id(value.meta["val"])
    spans = {n: [_span(tensor) for tensor in tensors_of(n) if storage_id(tensor) == here] for n in sharing(value)}
    return [n for n, each in spans.items() if any(start < end and first < stop for start, stop in each)]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """From the first element to behind the last one, in those of its storage."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return int(tensor.storage_offset()), int(tensor.storage_offset() + last + 1)


def _inside(region: Region, value: fx.Node) -> list[fx.Node]:
    """The operators that run in tiles and read a value's memory."""
    readers = dict.fromkeys(user for n in _overlapping(value) for user in n.users)
    return [user for user in readers if user in region.dims or user in region.merged]


def _may_keep(region: Region, place: Over, result: fx.Node, allowed: bool) -> bool:
    """Whether a result may keep all of a memory, of which it may take a part.

    Not where the program gives it, or a view of it, as whoever has that would keep all of it. Where nothing in the region reads
    what was there, only as long as something else keeps that memory anyway.
    """
    value, mine = place.value, sharing(place.value)
    given = any(user.op == "output" for n in sharing(result) for user in n.users)
    if given and storage_bytes(value.meta["val"]) > result.meta["val"].numel() * result.meta["val"].dtype.itemsize:
        return False
    if value in region.operands or allowed:
        return True
    stop = max(region.ordered)
    return any(user > stop for n in mine for user in n.users)


def _place(value: fx.Node, node: fx.Node, taken: Sequence[_Range]) -> Over | None:
    """The first part of a value's memory that is not taken."""
    dim = more_of(value, node)
    size = int(value.meta["val"].shape[dim] - node.meta["val"].shape[dim]) if dim is not None else 0
    step = value.meta["val"].stride(dim) if dim is not None else 1
    offset, storage = value.meta["val"].storage_offset(), storage_id(value.meta["val"])
    ends = [-(-(end - offset) // step) for key, _, end in taken if key == storage]
    for start in sorted({0, *ends}):
        place = Over(value, dim, start)
        _, begin, end = _range(place, node)
        if 0 <= start <= size and not any(key == storage and first < end and begin < last for key, first, last in taken):
            return place
    return None


def _range(place: Over, node: fx.Node) -> _Range:
    """The storage, and the elements of it that a result takes."""
    value = place.value.meta["val"]
    begin = int(value.storage_offset() + (place.start * value.stride(place.dim) if place.dim is not None else 0))
    return storage_id(value), begin, begin + int(node.meta["val"].numel())


def _reads_in_order(region: Region, tiles: Sequence[TileNeeds], value: fx.Node, node: fx.Node) -> bool:
    """Whether each tile reads of a value just the rows of the result, before it writes these."""
    inside = _inside(region, value)
    if any(user > node for user in inside):
        return False
    return all(need == tile.written[node] for tile in tiles for need in _needs(region, tile, inside, value))


def _window(region: Region, tiles: Sequence[TileNeeds], value: fx.Node, node: fx.Node) -> Window | None:
    """Of a value the part that each tile has to copy; None where a tile needs more than the one before it can keep."""
    inside = _inside(region, value)
    hulls: list[Part] = []
    for tile in tiles:
        needs = list(_needs(region, tile, inside, value))
        if not needs or any(need is None or need.dim != tile.written[node].dim for need in needs):
            return None
        hull = next(need for need in needs if need is not None)
        for need in needs:
            hull = hull.hull(need) if need is not None else hull
        hulls.append(hull)
    own = [tile.written[node] for tile in tiles]
    kept = max(0, *(part.start - hull.start for part, hull in zip(own, hulls, strict=True)))
    if any(after.start - kept < before.start for before, after in itertools.pairwise(own)):
        return None
    starts = [part.start - kept if kept and part.start else hull.start for part, hull in zip(own, hulls, strict=True)]
    if any(hull.stop <= part.start or hull.start > part.stop for part, hull in zip(own, hulls, strict=True)):
        return None
    parts = tuple(Part(hull.dim, start, hull.stop) for start, hull in zip(starts, hulls, strict=True))
    return Window(parts, kept, max(part.size - mine.size for part, mine in zip(parts, own, strict=True)))


def _needs(region: Region, tile: TileNeeds, inside: Sequence[fx.Node], value: fx.Node) -> Iterator[Part | None]:
    """What operators of a tile read of a value."""
    for user in inside:
        step = tile.steps[user]
        if step is not None:
            pairs = zip(region.calls.arguments(user), step.needs, strict=True)
            yield from (need for argument, need in pairs if argument is value and (need is None or need.size))
