"""Segments: runs of operators between which nothing happens to any weight. What the solver counts in instead of operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planner.schedule import Placement, earliest_prefetches
from planner.solve.bundles import BundleSpan
from planner.solve.problem import Problem

# A segment takes at most this share of the step, so that a prefetch need not be put off for long.
_FINEST = 1 / 256


@dataclass(frozen=True, eq=False)
class Segments:
    """`starts`: the first operator of each, int64[k + 1], the last entry being their number; seconds and bytes by segment.

    `activation_bytes` are the most of a segment: whatever fits there fits at each of its operators. `peaks`: operators between
    which and those that need them nothing happens to any weight.
    """

    starts: np.ndarray
    seconds: np.ndarray
    activation_bytes: np.ndarray
    peaks: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> Segments:
        """Cut wherever a weight's visit begins or ends, and where a segment would take long."""
        count = len(problem.seconds)
        cuts = {0, count, *(v.first for v in problem.visits), *(v.last + 1 for v in problem.visits)}
        elapsed = problem.elapsed
        ticks = np.searchsorted(elapsed, np.arange(0.0, elapsed[-1], max(elapsed[-1] * _FINEST, 1e-30)))
        starts = np.array(sorted(cuts | {int(t) for t in ticks if t < count}), dtype=np.int64)
        return cls(starts, np.diff(elapsed[starts]), np.maximum.reduceat(problem.activation_bytes, starts[:-1]), starts[:-1])

    def joined(self, most: int) -> Segments:
        """At most about so many: neighbours are joined, but for the last one. Visits begin and end within these."""
        every = -(-len(self) // most)
        if every == 1:
            return self
        first = np.arange(0, len(self) - 1, every)
        runs = np.append(first, len(self) - 1)
        own = [begin + int(np.argmax(self.activation_bytes[begin:end])) for begin, end in pairwise([*runs.tolist(), len(self)])]
        starts = np.append(self.starts[runs], self.starts[-1])
        return Segments(starts, np.add.reduceat(self.seconds, runs), self.activation_bytes[own], self.peaks[own])

    def __len__(self) -> int:
        return len(self.seconds)

    def index(self, operators: Sequence[int]) -> list[int]:
        """The segments in which operators lie."""
        return (np.searchsorted(self.starts, np.asarray(operators, dtype=np.int64), side="right") - 1).tolist()

    def held(self, spans: Sequence[BundleSpan]) -> np.ndarray:
        """Bytes of the spans while they are read, by segment; int64[k]."""
        delta = np.zeros(len(self) + 1, dtype=np.int64)
        np.add.at(delta, self.index([s.first for s in spans]), [s.nbytes for s in spans])
        np.add.at(delta, np.asarray(self.index([s.last for s in spans])) + 1, [-s.nbytes for s in spans])
        return np.cumsum(delta[:-1])

    def place(self, spans: Sequence[BundleSpan], room: np.ndarray, seam: bool) -> tuple[Placement, ...] | None:
        """Prefetches of `spans` as early as `room` (bytes by segment) allows; None where it cannot be."""
        firsts, lasts = self.index([s.first for s in spans]), self.index([s.last for s in spans])
        found = earliest_prefetches(firsts, lasts, [s.nbytes for s in spans], room, seam)
        if found is None:
            return None
        return tuple(Placement(span, int(self.starts[at])) for span, at in zip(spans, found, strict=True))
