"""Average and maximum pools: like convolutions, but what is no row of the tensor counts differently, or not at all."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.windows import Windows, padded, per_axis, replaced, sliced

aten = torch.ops.aten

_AVERAGES = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_MAXIMA = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
# The same without the positions of the maxima.
_VALUES = {
    aten.max_pool1d_with_indices.default: aten.max_pool1d.default,
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d.default,
}
_RANKS = {**_AVERAGES, **_MAXIMA, **{target: _MAXIMA[values] for target, values in _VALUES.items()}}


@dataclass(frozen=True)
class _Way:
    """How a tile of one dimension is pooled.

    Attributes:
        added: rows copied to the tile, before and after it, which no wanted window looks at.
        padding: the operator's own padding.
        ceil: whether a last window may hang over.
        skipped: results before the wanted ones.
        results: the results computed.
    """

    added: tuple[int, int]
    padding: int
    ceil: bool
    skipped: int
    results: int


@dataclass(frozen=True)
class _Pool:
    """The arguments of a pool, for each of its `rank` last dimensions."""

    call: TileCall
    rank: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    ceil: bool
    pads_count: bool  # whether padding is among what an average divides by

    @classmethod
    def of(cls, call: TileCall, rank: int) -> _Pool:
        names = {argument.name for argument in call.target._schema.arguments}
        kernel = per_axis(call.arg("kernel_size"), rank)
        return cls(
            call,
            rank,
            kernel,
            per_axis(call.arg("stride"), rank) or kernel,
            per_axis(call.arg("dilation"), rank) if "dilation" in names else (1,) * rank,
            per_axis(call.arg("padding"), rank),
            bool(call.arg("ceil_mode")),
            "count_include_pad" in names
            and bool(call.arg("count_include_pad"))
            and not ("divisor_override" in names and call.arg("divisor_override") is not None),
        )

    def windows(self, axis: int) -> Windows:
        size = self.call.tensors[0].shape[axis - self.rank]
        return Windows(size, self.kernel[axis], self.stride[axis], self.dilation[axis], self.padding[axis])

    def run(self, run: Run, x: Any, axis: int, way: _Way, part: Part) -> Any:
        """Pools a tile, and slices what is too much of it off (in other dimensions too, which `way.ceil` can make longer)."""
        call, fill = self.call, -torch.inf if self._maximum else 0.0
        x = padded(run, x, [way.added if index == axis else (0, 0) for index in range(self.rank)], fill)
        changes = {"padding": replaced(self.padding, axis, way.padding), "ceil_mode": way.ceil}
        if call.target in _VALUES:
            args = (self.kernel, self.stride, changes["padding"], self.dilation, way.ceil)
            y = run(_VALUES[call.target], x, *(list(a) if isinstance(a, tuple) else a for a in args))
        else:
            y = call.again(run, [x], **changes)
        for index in range(self.rank):
            dim = len(call.outputs[0].shape) - self.rank + index
            if index == axis:
                y = sliced(run, y, dim, way.skipped, way.skipped + part.size, way.results)
            elif way.ceil != self.ceil:
                windows, wanted = self.windows(index), call.outputs[0].shape[dim]
                y = sliced(run, y, dim, 0, wanted, _results(windows, windows.size, windows.padding, way.ceil))
        return y

    @property
    def _maximum(self) -> bool:
        return self.call.target not in _AVERAGES

    def spatial(self, part: Part) -> tuple[Part, int, _Way]:
        """The rows that the part needs, which of the pooled dimensions it is of, and how they are pooled."""
        axis = part.dim - (len(self.call.outputs[0].shape) - self.rank)
        windows = self.windows(axis)
        rows = windows.touched(part.start, part.stop)
        if rows is None:
            raise Untileable(f"has no rows for {part.start} to {part.stop} of its result")
        need = Part(part.dim, *rows)
        for added, padding, ceil in self._candidates(windows, part, need):
            way = self._way(windows, part, need, added, padding, ceil)
            if way is not None:
                return need, axis, way
        raise Untileable(f"cannot compute {part.start} to {part.stop} of its result without rows that it does not need")

    def _candidates(self, windows: Windows, part: Part, need: Part) -> Iterator[tuple[tuple[int, int], int, bool]]:
        """What to try, the cheapest first: other padding, a last window that hangs over, and last a copy of the tile."""
        most = max(windows.padding, windows.kernel // 2)  # more, the operators refuse
        for ceil in dict.fromkeys((self.ceil, True)):
            for padding in range(most + 1):
                for added in self._filled_up(windows, need):
                    yield added, padding, ceil
        if self._maximum and not self.call.outputs[0].dtype.is_floating_point:
            return  # no -inf
        # The first wanted window at its place again, counted from the beginning of the tensor in steps of the stride, and
        # as many rows after the tile as the tensor has under the last.
        origin = part.start * windows.stride
        before = max(need.start - origin, 0) or need.start % windows.stride
        after = min(windows.span(part.start, part.stop)[1], windows.size) - need.stop
        yield (before, after), windows.padding, self.ceil

    def _filled_up(self, windows: Windows, need: Part) -> list[tuple[int, int]]:
        """Rows added to a tile that has less than the operator takes, on the side where the tensor goes on."""
        lacking = windows.kernel - need.size
        if self.call.target != aten.avg_pool3d.default or lacking <= 0:
            return [(0, 0)]
        if need.stop < windows.size:
            return [(0, lacking)]
        return [(lacking + more, 0) for more in range(windows.stride)]

    def _way(self, windows: Windows, part: Part, need: Part, added: tuple[int, int], padding: int, ceil: bool) -> _Way | None:
        """The way with these choices; None where the wanted windows are not among those computed, or count otherwise."""
        low, high = windows.span(part.start, part.stop)
        shift = padding + low - need.start + added[0]  # from the first computed window to the first wanted
        results = _results(windows, need.size + sum(added), padding, ceil)
        if shift < 0 or shift % windows.stride or results < shift // windows.stride + part.size:
            return None
        if self.pads_count:
            # An average divides by rows up to the end of the padding: the last window has to hang over as far as in the whole.
            end, end_here = windows.size + windows.padding, need.stop + added[1] + padding
            if high > min(end, end_here) and end != end_here:
                return None
        return _Way(added, padding, ceil, shift // windows.stride, results)


def _results(windows: Windows, size: int, padding: int, ceil: bool) -> int:
    """How many windows `size` rows have (`pooling_output_shape` in ATen/native/Pool.h)."""
    over = windows.stride - 1 if ceil else 0
    count = (size + 2 * padding - windows.reach + over) // windows.stride + 1
    if ceil and (count - 1) * windows.stride >= size + padding:
        count -= 1  # it would begin in the padding at the end
    return count


@tile_rule(*_AVERAGES, *_MAXIMA)
def pool(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = pool(x[a*s - p : (b-1)*s - p + d*(k-1) + 1])`, padded and divided by as in the whole; else `pool(x[a:b])`."""
    assert part is not None
    rank = _RANKS[call.target]
    if part.dim < len(call.output.shape) - rank:
        return Tiled((part,), call.again)
    of = _Pool.of(call, rank)
    need, axis, way = of.spatial(part)
    return Tiled((need,), lambda run, values: of.run(run, values[0], axis, way, part))


@tile_rule(*_VALUES)
def pool_with_indices(call: TileCall, part: Part | None, indices: Part | None) -> Tiled:
    """The values as `pool`; the indices, which count from the beginning of the pooled dimensions, of whole ones only."""
    rank = _RANKS[call.target]
    if indices is not None or (part is not None and part.dim < len(call.outputs[0].shape) - rank):
        return with_indices(call, rank, part, indices)
    assert part is not None
    of = _Pool.of(call, rank)
    need, axis, way = of.spatial(part)
    return Tiled((need,), lambda run, values: [of.run(run, values[0], axis, way, part), None])


def with_indices(call: TileCall, rank: int, *parts: Part | None) -> Tiled:
    """Values and indices of images or channels: `y[a:b], i[a:b] = pool(x[a:b])`."""
    wanted = [part for part in parts if part is not None]
    if any(part != wanted[0] for part in wanted):
        raise Untileable("is wanted in different parts, values and indices")
    if wanted[0].dim >= len(call.outputs[0].shape) - rank:
        raise Untileable("gives indices that count from the beginning of the whole image")

    def compute(run: Run, values: Sequence[Any]) -> Any:
        both = call.again(run, values)
        return [None if part is None else run(operator.getitem, both, index) for index, part in enumerate(parts)]

    return Tiled((wanted[0],), compute)
