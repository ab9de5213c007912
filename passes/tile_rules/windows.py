"""What convolutions and pools share: windows that step over a dimension, per-dimension arguments, pads and slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall

aten = torch.ops.aten


@dataclass(frozen=True)
class Windows:
    """Result `i` along a dimension looks at the rows `i * stride - padding + dilation * j`, `j < kernel`, of `size` rows.

    Rows that are not in [0, size) are padding.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: int

    @property
    def reach(self) -> int:
        """Rows from the first to the last that one window looks at."""
        return self.dilation * (self.kernel - 1) + 1

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """From the first row that the results [start, stop) look at to the end of the last, padding included."""
        return start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.reach

    def touched(self, start: int, stop: int) -> tuple[int, int] | None:
        """The smallest interval of rows with all that the results [start, stop) look at; None where they see but padding.

        At a border it can be smaller than the span cut to the tensor: a dilated window steps over rows.
        """
        first, last = self.size, -1
        for tap in range(self.kernel):
            shift = self.padding - self.dilation * tap  # the row is i * stride - shift
            low = max(start, ceil_div(shift, self.stride))
            high = min(stop - 1, (self.size - 1 + shift) // self.stride)
            if low <= high:
                first = min(first, low * self.stride - shift)
                last = max(last, high * self.stride - shift)
        return None if last < 0 else (first, last + 1)

    def reached_from(self, start: int, stop: int) -> tuple[int, int] | None:
        """The same for the transposed operator: the results that look at any of the rows [start, stop), `size` results."""
        first, last = self.size, -1
        for tap in range(self.kernel):
            shift = self.padding - self.dilation * tap
            low = max(0, ceil_div(start + shift, self.stride))
            high = min(self.size - 1, (stop - 1 + shift) // self.stride)
            if low <= high:
                first, last = min(first, low), max(last, high)
        return None if last < 0 else (first, last + 1)


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """An argument that is one number for all dimensions, or one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def needs_of(call: TileCall, **parts: Part | None) -> tuple[Part | None, ...]:
    """`Tiled.needs` by the arguments' names; those not named whole, those that the call has not left out."""
    by_index = {call.index_of(name): part for name, part in parts.items()}
    return tuple(by_index.get(index) for index in range(len(call.tensors)))


def replaced(values: Sequence[int], index: int, value: int) -> list[int]:
    return [value if i == index else old for i, old in enumerate(values)]


def padded(run: Run, value: Any, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> Any:
    """`value` with `pads` rows before and after (cut off where negative) in its last dimensions; itself where all are 0."""
    if not any(before or after for before, after in pads):
        return value
    return run(aten.constant_pad_nd.default, value, [n for pair in reversed(pads) for n in pair], fill)


def sliced(run: Run, value: Any, dim: int, start: int, stop: int, size: int) -> Any:
    """The rows [start, stop) of the `size` rows of `value`, a view; itself where these are all."""
    return value if (start, stop) == (0, size) else run(aten.slice.Tensor, value, dim, start, stop)
