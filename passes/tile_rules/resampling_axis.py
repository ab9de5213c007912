"""Where an interpolation reads: the coordinates of one resampled dimension, as ATen computes them.

`step` is how far the source position moves from one result element to the next, after
`aten/src/ATen/native/UpSample.h` (area_pixel_compute_scale): `(in - 1) / (out - 1)` with align_corners, else `1 / scale_factor`
where the call gives one, else `in / out`. Result element d lies at source position

    nearest        floor(d * step)                  in float32
    nearest-exact  floor((d + 0.5) * step)          in float32
    otherwise      d * step                         with align_corners
                   (d + 0.5) * step - 0.5           without
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import numpy as np
import numpy.typing as npt

from passes.tile_rules.base import Untileable

Table = npt.NDArray[np.int64]

# Scale factors are doubles: 1 / 1.7 is taken for 10/17, which it is as nearly as a double can be.
_LARGEST_PERIOD = 1024


@dataclass(frozen=True)
class Axis:
    """One dimension of an interpolation.

    Attributes:
        size: elements of the source.
        out: elements of the result.
        factor: the scale factor that the call gives for this dimension; None: it follows from the sizes.
        mode: "nearest", "nearest-exact", "linear", "cubic", or one of the last two with "-aa" (antialiased).
        align_corners: as in `torch.nn.functional.interpolate`.
        double: whether the tensor is float64.
    """

    size: int
    out: int
    factor: float | None
    mode: str
    align_corners: bool = False
    double: bool = False

    @property
    def nearest(self) -> bool:
        return self.mode.startswith("nearest")

    @property
    def antialias(self) -> bool:
        return self.mode.endswith("-aa")

    @property
    def step(self) -> Fraction:
        """Source elements from one result element to the next; as simple a fraction as the doubles allow."""
        if self.align_corners:
            return Fraction(self.size - 1, self.out - 1) if self.out > 1 else Fraction(0)
        if self.factor is None:
            return Fraction(self.size, self.out)
        simple = Fraction(1 / self.factor).limit_denominator(_LARGEST_PERIOD)
        return simple if abs(float(simple) * self.factor - 1) < 4e-16 else Fraction(1 / self.factor)

    @property
    def unchanged(self) -> bool:
        """Every element of the result is the element of the source at the same place."""
        return self.size == self.out and (self.align_corners or self.step == 1)

    def position(self, index: int) -> Fraction:
        """The source position of a result element, for all but the nearest modes; not clamped."""
        return index * self.step if self.align_corners else (index + Fraction(1, 2)) * self.step - Fraction(1, 2)

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """The source interval that the result elements [start, stop) are made of."""
        if self.nearest:
            table = nearest_table(self)
            return int(table[start]), int(table[stop - 1]) + 1
        low, high = self.position(start), self.position(stop - 1)
        if self.antialias:
            support = (2 if self.mode == "cubic-aa" else 1) * max(self.step, Fraction(1))
            first, last = floor(low + 1 - support), floor(high + 1 + support) - 1
        elif self.mode == "cubic":
            first, last = floor(low) - 1, floor(high) + 2
        else:
            first, last = floor(low), ceil(high)  # at a whole position the second neighbour has weight 0
        first = min(max(first, 0), self.size - 1)
        return first, max(min(last, self.size - 1), first) + 1


def float32_step(axis: Axis) -> np.float32:
    """The step of the nearest modes, rounded as `compute_scales_value<float>` does."""
    return np.float32(1 / axis.factor) if axis.factor is not None else np.float32(axis.size) / np.float32(axis.out)


@lru_cache(maxsize=512)
def nearest_table(axis: Axis) -> Table:
    """The source index of every result element in a nearest mode.

    All kernels must agree on it: that of contiguous float64 tensors on the CPU counts in float64, the others in float32, and
    some take `out == in` and `out == 2 * in` as a copy and a doubling whatever the scale factor is.

    Raises:
        Untileable: they do not.
    """
    shift = 0.5 if axis.mode == "nearest-exact" else 0.0
    index = np.arange(axis.out)
    candidates: list[npt.NDArray[np.floating]] = [(index.astype(np.float32) + np.float32(shift)) * float32_step(axis)]
    if axis.double:
        positions = (index + shift) * (1 / axis.factor if axis.factor is not None else axis.size / axis.out)
        centred = np.maximum(positions - shift, 0) + shift
        candidates += [positions, positions.astype(np.float32), centred, centred.astype(np.float32)]
    tables = [np.minimum(np.floor(candidate).astype(np.int64), axis.size - 1) for candidate in candidates]
    if axis.mode == "nearest" and axis.out in (axis.size, 2 * axis.size):
        tables.append(index // (axis.out // axis.size))
    if any(not np.array_equal(tables[0], table) for table in tables[1:]):
        raise Untileable(f"takes {axis.size} elements to {axis.out} where the rounding of its kernel decides which")
    tables[0].setflags(write=False)
    return tables[0]


@dataclass(frozen=True)
class Window:
    """The same interpolation on a slice of the source: its coordinates are shifted by a whole number of elements.

    Attributes:
        start, stop: the slice of the source.
        out: how many elements to compute from it.
        factor: the scale factor to give; None: it follows from the sizes.
        drop: how many of the first elements are not wanted.
    """

    start: int
    stop: int
    out: int
    factor: float | None
    drop: int


def window(axis: Axis, start: int, stop: int) -> Window | None:
    """The smallest slice on which the operator itself gives the elements [start, stop), or None where there is none.

    With `step = p / q` in lowest terms, coordinates repeat every q elements of the result and p of the source: the slice begins
    at a multiple k * p at or before what is read, and its element d is element k * q + d of the whole.
    """
    low, high = axis.reads(start, stop)
    if (start, stop) == (0, axis.out):
        return Window(0, axis.size, axis.out, axis.factor, 0)
    if axis.size == 1:
        return Window(0, 1, stop - start, None, 0)  # whatever the weights are, their sum is 1
    p, q = axis.step.numerator, axis.step.denominator
    periods = min(start // q, low // p)
    if axis.align_corners:
        last = min(max(ceil((stop - 1) / q), ceil((high - 1) / p), periods + 1), (axis.out - 1) // q)
        return Window(periods * p, last * p + 1, (last - periods) * q + 1, None, start - periods * q)
    factor = axis.factor if axis.factor is not None else axis.out / axis.size
    first, drop = periods * p, start - periods * q
    longer = (Window(first, high, stop - periods * q + extra, factor, drop) for extra in range(3))
    return next((found for found in longer if _same_kernel(axis, found) and _same_elements(axis, start, stop, found)), None)


def _same_kernel(axis: Axis, found: Window) -> bool:
    """Whether the kernel computes the slice as it does the whole: smooth ones take equal sizes for a copy, whatever the factor.

    The antialiased kernel of the CPU is wrong (torch 2.13) for a result of width 1: its rows are all the same.
    """
    if axis.nearest:
        return True
    return (found.out != found.stop - found.start or axis.step == 1) and not (axis.antialias and found.out == 1)


def _same_elements(axis: Axis, start: int, stop: int, found: Window) -> bool:
    """Whether the nearest elements on the slice are those of the whole, by every kernel."""
    if not axis.nearest:
        return True
    try:
        table = nearest_table(replace(axis, size=found.stop - found.start, out=found.out, factor=found.factor))
    except Untileable:
        return False
    wanted = nearest_table(axis)[start:stop] - found.start
    return np.array_equal(table[found.drop : found.drop + stop - start], wanted)


def is_lean(axis: Axis, start: int, stop: int, found: Window) -> bool:
    """Whether a window computes and reads little beyond what is wanted."""
    low, high = axis.reads(start, stop)
    extra_out = found.out - (stop - start)
    extra_in = found.stop - found.start - (high - low)
    return extra_out <= max(16, stop - start) and extra_in <= max(2, (high - low) // 4)
