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
            start = min(max(earliest, last - length + 1), first) if before is not None else min(earliest, first)
            tight = (free[start : last + 1] < size).nonzero()[0]
            if tight.size:
                start += int(tight[-1]) + 1
                if start > first:
                    return None
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


def arena_offsets(placements: Sequence[Placement], length: int, limit: int | None = None) -> tuple[tuple[int, ...], int] | None:
    """Best-fit offsets for intervals that must not overlap (I2); returns them and the arena's size.

    Two orders are tried, by time and by size; the search ends at once where the lower bound (the most bytes staged at one
    time) is met. None, and that sooner, where the arena were larger than `limit`.
    """
    bound = int(staged_bytes(placements, length).max(initial=0))
    most = limit if limit is not None else sum(p.span.nbytes for p in placements)
    if bound > most:
        return None
    orders = (
        sorted(range(len(placements)), key=lambda i: (not placements[i].carried, placements[i].prefetch)),
        sorted(range(len(placements)), key=lambda i: (-placements[i].span.nbytes, placements[i].prefetch)),
    )
    meeting = _meeting(placements, length)
    best: tuple[tuple[int, ...], int] | None = None
    for order in orders:
        found = _best_fit(placements, order, meeting, most)
        if found is not None:
            best, most = found, found[1] - 1  # only what is smaller counts from here on
        if most < bound:
            break
    return best


def _meeting(placements: Sequence[Placement], length: int) -> list[list[int]]:
    """For each bundle those that are there at some time when it is."""
    start = np.array([p.prefetch for p in placements], dtype=np.int64)
    # One that comes over the seam is an interval that goes on in the next call, and one that began in the call before.
    stop = np.array([p.span.last + (length if p.carried else 0) for p in placements], dtype=np.int64)
    meets = np.zeros((len(placements), len(placements)), dtype=bool)
    for shift in (-length, 0, length):
        meets |= (start + shift <= stop[:, None]) & (start[:, None] <= stop + shift)
    return [np.flatnonzero(row).tolist() for row in meets]


def _best_fit(
    placements: Sequence[Placement], order: Sequence[int], meeting: Sequence[Sequence[int]], most: int
) -> tuple[tuple[int, ...], int] | None:
    """Offsets in this order and the size; None once that passes `most`."""
    sizes = [p.span.nbytes for p in placements]
    offsets = [-1] * len(placements)
    size = 0
    for i in order:
        taken = sorted((offsets[j], offsets[j] + sizes[j]) for j in meeting[i] if offsets[j] >= 0)
        offsets[i] = _smallest_gap(taken, sizes[i], size)
        size = max(size, offsets[i] + sizes[i])
        if size > most:
            return None
    return tuple(offsets), size


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
    offsets, staging = (arena_offsets(placements, length) if arena else None) or ([None] * len(placements), 0)
    bundles = []
    for index, (placed, offset) in enumerate(zip(placements, offsets, strict=True)):
        slots, nbytes = pack([(w, weights[w].nbytes) for w in placed.span.weights], alignment)
        bundles.append(Bundle(index, slots, nbytes, offset, placed.carried))
    hosted, host_bytes = problem.hosted
    return Layout(
        alignment, resident, resident_bytes, state, staging, bundles=tuple(bundles), hosted=hosted, host_bytes=host_bytes
    )
