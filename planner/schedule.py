"""Schedule: when each streamed bundle starts to travel, and where in the staging arena it lies.

Positions are operator indices: a bundle prefetched at p and last read at l occupies its bytes over [p, l], inclusive, and where
p > l from p on to the end of one call and up to l in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.solve.bundles import BundleSpan
from planner.solve.problem import Problem
from runtime.layout import Bundle, Layout, Slot, pack

# Calls after which the pattern of prefetches over the seam has to repeat itself.
_MAX_UNROLLED = 8


@dataclass(frozen=True)
class Placement:
    """A bundle with the position of its prefetch. Where that is behind its last reader, it is for the next call."""

    span: BundleSpan
    prefetch: int

    @property
    def carried(self) -> bool:
        """Whether the bundle comes over the seam between two calls."""
        return self.prefetch > self.span.last

    def pieces(self, length: int) -> tuple[tuple[int, int], ...]:
        """The positions at which its bytes are taken, as inclusive intervals; `length` is that of the program."""
        if not self.carried:
            return ((self.prefetch, self.span.last),)
        return ((0, self.span.last), (self.prefetch, length - 1))


def earliest_prefetches(
    firsts: Sequence[int], lasts: Sequence[int], sizes: Sequence[int], room: np.ndarray, seam: bool
) -> list[int] | None:
    """Prefetch positions, as early as `room` allows, first in first out; None where it cannot be.

    Args:
        firsts, lasts, sizes: of the bundles in order of first use: where they are read, and their bytes.
        room: bytes for bundles at every position; int64[n].
        seam: whether a prefetch may be made in the call before, behind the bundle's last reader there.

    With more room no prefetch is later, so more memory is never slower: a bundle only follows the one before it, and what
    earlier bundles take from there on does not depend on when they came.
    """
    length = len(room)
    free, earliest = room.copy(), 0
    before: list[int] | None = None
    for _ in range(_MAX_UNROLLED if seam else 1):
        # `free` begins one call before this one, but for the first call.
        origin = 0 if before is None else length
        starts: list[int] = []
        for index, size in enumerate(sizes):
            first, last = firsts[index] + origin, lasts[index] + origin
            if free[first : last + 1].min() < size:
                return None
            start = max(earliest, last - length + 1) if before is not None else earliest
            tight = np.flatnonzero(free[start:first] < size)
            start = min(start if tight.size == 0 else start + int(tight[-1]) + 1, first)
            free[start : last + 1] -= size
            earliest = start
            starts.append(start - origin)
        if not seam:
            return starts
        if starts == before:
            return [start if start >= 0 else start + length for start in starts]
        before, earliest = starts, earliest - origin
        free = np.concatenate([free[origin:], room])
    return None


def staged_bytes(placements: Sequence[Placement], length: int) -> np.ndarray:
    """Bytes of staged bundles at every operator; int64[length]."""
    delta = np.zeros(length + 1, dtype=np.int64)
    for placed in placements:
        for start, stop in placed.pieces(length):
            delta[start] += placed.span.nbytes
            delta[stop + 1] -= placed.span.nbytes
    return np.cumsum(delta[:-1])


def arena_offsets(placements: Sequence[Placement], length: int) -> tuple[tuple[int, ...], int]:
    """Best-fit offsets for intervals that must not overlap (I2); returns them and the arena's size.

    Two orders are tried, by time and by size; the search ends at once where the lower bound (the most bytes staged at one
    time) is met.
    """
    bound = int(staged_bytes(placements, length).max(initial=0))
    orders = (
        sorted(range(len(placements)), key=lambda i: (not placements[i].carried, placements[i].prefetch)),
        sorted(range(len(placements)), key=lambda i: (-placements[i].span.nbytes, placements[i].prefetch)),
    )
    best: tuple[tuple[int, ...], int] | None = None
    for order in orders:
        offsets, size = _best_fit(placements, order, length)
        if best is None or size < best[1]:
            best = (offsets, size)
        if size == bound:
            break
    assert best is not None
    return best


def _best_fit(placements: Sequence[Placement], order: Sequence[int], length: int) -> tuple[tuple[int, ...], int]:
    count = len(placements)
    start = np.array([p.prefetch for p in placements], dtype=np.int64)
    # One that comes over the seam is an interval that goes on in the next call, and one that began in the call before.
    stop = np.array([p.span.last + (length if p.carried else 0) for p in placements], dtype=np.int64)
    sizes = np.array([p.span.nbytes for p in placements], dtype=np.int64)
    offsets = np.zeros(count, dtype=np.int64)
    placed = np.zeros(count, dtype=bool)
    size = 0
    for i in order:
        meets = np.zeros(count, dtype=bool)
        for shift in (-length, 0, length):
            meets |= (start + shift <= stop[i]) & (start[i] <= stop + shift)
        near = np.flatnonzero(placed & meets)
        taken = sorted(zip(offsets[near].tolist(), (offsets[near] + sizes[near]).tolist(), strict=True))
        offsets[i] = _smallest_gap(taken, int(sizes[i]), size)
        size = max(size, int(offsets[i] + sizes[i]))
        placed[i] = True
    return tuple(offsets.tolist()), size


def _smallest_gap(taken: Sequence[tuple[int, int]], nbytes: int, size: int) -> int:
    """The start of the tightest gap that holds `nbytes`, else the end of what is taken."""
    best, best_gap, cursor = -1, 0, 0
    for start, stop in taken:
        gap = start - cursor
        if gap >= nbytes and (best < 0 or gap < best_gap):
            best, best_gap = cursor, gap
        cursor = max(cursor, stop)
    tail = size - cursor
    if best >= 0 and not (nbytes <= tail < best_gap):
        return best
    return cursor


def make_layout(problem: Problem, placements: Sequence[Placement], arena: bool) -> Layout:
    """Offsets for everything: residents packed in order of first use, bundles in the staging arena or by the allocator."""
    streamed = {w for p in placements for w in p.span.weights}
    first_use = dict.fromkeys(v.weight for v in problem.visits)
    kept = [w for w in (*first_use, *problem.weight_bytes) if w not in streamed]
    weights = problem.program.weights
    alignment = problem.memory.weight_alignment
    kept = list(dict.fromkeys(kept))
    state = tuple(Slot(w, 0, weights[w].nbytes) for w in kept if weights[w].state)
    resident, resident_bytes = pack([(w, weights[w].nbytes) for w in kept if not weights[w].state], alignment)
    length = len(problem.names)
    offsets, staging = arena_offsets(placements, length) if arena and placements else ([None] * len(placements), 0)
    bundles = []
    for index, (placed, offset) in enumerate(zip(placements, offsets, strict=True)):
        slots, nbytes = pack([(w, weights[w].nbytes) for w in placed.span.weights], alignment)
        bundles.append(Bundle(index, slots, nbytes, offset, placed.carried))
    return Layout(alignment, resident, resident_bytes, state, staging, bundles=tuple(bundles))
