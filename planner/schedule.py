"""Schedule: when each streamed bundle starts to travel, and where in the staging arena it lies.

Positions are operator indices: a bundle prefetched at p and last read at l occupies its bytes over [p, l], inclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.program import Program
from planner.solve.bundles import BundleSpan
from planner.solve.problem import Problem
from runtime import ops
from runtime.layout import Bundle, Layout, Slot, pack


@dataclass(frozen=True)
class Placement:
    """A bundle with the position of its prefetch."""

    span: BundleSpan
    prefetch: int


def prefetch_into_arena(spans: Sequence[BundleSpan], staging_bytes: int) -> tuple[Placement, ...]:
    """As early as the copies before them have been evicted from `staging_bytes`, first in first out; at the latest on use."""
    placed: list[Placement] = []
    staged: list[BundleSpan] = []
    earliest = 0
    for span in spans:
        staged = sorted((s for s in staged if s.last >= earliest), key=lambda s: s.last)
        used, at = sum(s.nbytes for s in staged), earliest
        for held in staged:
            if used + span.nbytes <= staging_bytes:
                break
            used, at = used - held.nbytes, held.last + 1
        if span.nbytes > staging_bytes:
            at = span.first  # it never fits: as late as can be
        earliest = max(earliest, min(at, span.first))
        placed.append(Placement(span, earliest))
        staged.append(span)
    return tuple(placed)


def prefetch_into_headroom(
    spans: Sequence[BundleSpan], activation_bytes: np.ndarray, resident_bytes: int, limit_bytes: int
) -> tuple[Placement, ...] | None:
    """As early as activations, residents and copies before it leave room under `limit_bytes`; None where it cannot fit.

    A larger limit never moves a prefetch later, so a larger budget is never slower.
    """
    room = limit_bytes - resident_bytes - activation_bytes
    placed: list[Placement] = []
    earliest = 0
    for span in spans:
        if int(room[span.first : span.last + 1].min()) < span.nbytes:
            return None
        tight = np.flatnonzero(room[earliest : span.first] < span.nbytes)
        start = earliest if tight.size == 0 else earliest + int(tight[-1]) + 1
        start = min(start, span.first)
        room[start : span.last + 1] -= span.nbytes
        earliest = start
        placed.append(Placement(span, start))
    return tuple(placed)


def staged_bytes(placements: Sequence[Placement], length: int) -> np.ndarray:
    """Bytes of staged bundles at every operator; int64[length]."""
    delta = np.zeros(length + 1, dtype=np.int64)
    for placed in placements:
        delta[placed.prefetch] += placed.span.nbytes
        delta[placed.span.last + 1] -= placed.span.nbytes
    return np.cumsum(delta[:-1])


def arena_offsets(placements: Sequence[Placement]) -> tuple[tuple[int, ...], int]:
    """Best-fit offsets for intervals that must not overlap (I2); returns them and the arena's size.

    Two orders are tried, by time and by size; the search ends at once where the lower bound (the most bytes staged at one
    time) is met.
    """
    length = max((p.span.last for p in placements), default=0) + 1
    bound = int(staged_bytes(placements, length).max(initial=0))
    orders = (
        sorted(range(len(placements)), key=lambda i: placements[i].prefetch),
        sorted(range(len(placements)), key=lambda i: (-placements[i].span.nbytes, placements[i].prefetch)),
    )
    best: tuple[tuple[int, ...], int] | None = None
    for order in orders:
        offsets, size = _best_fit(placements, order)
        if best is None or size < best[1]:
            best = (offsets, size)
        if size == bound:
            break
    assert best is not None
    return best


def _best_fit(placements: Sequence[Placement], order: Sequence[int]) -> tuple[tuple[int, ...], int]:
    count = len(placements)
    start = np.array([p.prefetch for p in placements], dtype=np.int64)
    stop = np.array([p.span.last for p in placements], dtype=np.int64)
    sizes = np.array([p.span.nbytes for p in placements], dtype=np.int64)
    offsets = np.zeros(count, dtype=np.int64)
    placed = np.zeros(count, dtype=bool)
    size = 0
    for i in order:
        near = np.flatnonzero(placed & (start <= stop[i]) & (start[i] <= stop))
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
    offsets, staging = arena_offsets(placements) if arena and placements else ([None] * len(placements), 0)
    bundles = []
    for index, (placed, offset) in enumerate(zip(placements, offsets, strict=True)):
        slots, nbytes = pack([(w, weights[w].nbytes) for w in placed.span.weights], alignment)
        bundles.append(Bundle(index, slots, nbytes, offset))
    return Layout(alignment, resident, resident_bytes, state, staging, tuple(bundles))


def order_refills(program: Program) -> Program:
    """Tells each prefetch which evictions it has to wait for: those of bundles whose bytes it refills (I4)."""
    layout = program.layout
    assert layout is not None
    graph = program.copy_graph()
    evicted: list[Bundle] = []
    for node in graph.nodes:
        if node.target is ops.evict:
            evicted.append(layout.bundles[node.args[0]])
        elif node.target is ops.prefetch:
            bundle = layout.bundles[node.args[0]]
            node.args = (bundle.index, _occupants(bundle, evicted))
    return replace(program, graph=graph)


def _occupants(bundle: Bundle, evicted: Sequence[Bundle]) -> tuple[int, ...]:
    """The last evicted bundle that overlaps: the compute stream is in order, so its eviction implies all earlier ones."""
    if bundle.offset is None:
        return ()
    for other in reversed(evicted):
        assert other.offset is not None
        if other.offset < bundle.offset + bundle.nbytes and bundle.offset < other.offset + other.nbytes:
            return (other.index,)
    return ()
