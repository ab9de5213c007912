"""The search within one budget: a selection is scheduled in the room there is, and kept if the simulator says it is faster."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from planner.schedule import Placement, staged_bytes
from planner.solve.select import Selection

if TYPE_CHECKING:
    from planner.solve.decide import Schedule, Solver

# Staging arena sizes, in multiples of the largest bundle, for a schedule that is known to be as fast: 2 is double buffering.
ARENA_SLOTS = (1, 2, 3, 4, 6, 8, 12)
# Arena sizes that are tried where the allocator rounds: multiples of the unit, neighbours in about this ratio.
_ARENA_UNIT = 2 * 1024 * 1024
_ARENA_RATIO = 1.02
# How much may be staged ahead of its use, in multiples of the usual bundle, in programs of at most so many operators: what fills
# all room may break it up, and asking the memory model takes time by operators.
_AHEAD = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
_MOST_OPERATORS = 2000
# Schedules whose seconds differ by no more than this share are equally fast.
_EQUAL = 1e-9


@dataclass
class Search:
    """The best schedule so far within a budget. `host_bytes`: what streamed weights may take of page-locked host memory."""

    solver: Solver
    budget_bytes: int
    host_bytes: int | None
    best: Schedule

    @property
    def perfect(self) -> bool:
        """Whether compute never waits, which nothing beats."""
        return self.best.time.step_seconds <= self.solver.problem.compute_seconds * (1 + _EQUAL)

    def take(self, schedule: Schedule) -> bool:
        """Keeps a schedule that fits and is better."""
        if schedule.peak_bytes > self.budget_bytes or self._rank(schedule) >= self._rank(self.best):
            return False
        if self._pins_too_much(tuple(p.span for p in schedule.placements)):
            return False
        self.best = schedule
        return True

    def try_(self, selection: Selection, *, seam: bool | None = None, anyway: bool = False) -> bool:
        """Schedules a selection; gives whether it is better than what was known, or fits `anyway`."""
        solver, problem = self.solver, self.solver.problem
        resident = solver.resident_bytes(selection)
        if resident + int(problem.activation_bytes.max()) + problem.memory.fixed_bytes > self.budget_bytes:
            return False
        if self._pins_too_much(selection):
            return False
        over = solver.repeats > 1 if seam is None else seam
        if anyway or problem.memory.device != "cuda":
            return self._in_blocks(selection, resident, over, anyway)
        static = self._in_arena(selection, resident, over)
        return self._in_blocks(selection, resident, over, False) or static

    def _in_arena(self, selection: Selection, resident: int, seam: bool) -> bool:
        """Through static arenas, the largest that may fit first: what the allocator reserves besides does not change."""
        solver, memory = self.solver, self.solver.problem.memory
        room = (
            self.budget_bytes
            - memory.fixed_bytes
            - memory.reserved_alone(resident)
            - solver.reserved_activations.reserved_bytes
        )
        for size in reversed(self._arena_sizes[: bisect_right(self._arena_sizes, room)]):
            placed = self._place(selection, np.full(len(solver.segments), size, dtype=np.int64), seam)
            if placed is None:
                return False
            time = solver.seconds(placed)
            if self._slower(time.step_seconds):
                return False  # a smaller arena is no faster
            schedule = solver.within(placed, "arena", self.budget_bytes, time)
            if schedule is not None:
                return self.take(schedule)
        return False

    def _in_blocks(self, selection: Selection, resident: int, seam: bool, anyway: bool) -> bool:
        """In blocks of the allocator, in all the room that activations leave at each time."""
        solver, known = self.solver, None
        for limit in solver.limits(self.budget_bytes):
            for room in self._rooms(selection, limit - resident - solver.segments.activation_bytes):
                early = self._place(selection, room, seam)
                if early is None or early == known:
                    break
                known, time = early, solver.seconds(early)
                if not anyway and self._slower(time.step_seconds):
                    break
                schedule = solver.within(early, "allocator", self.budget_bytes, time)
                if schedule is None:
                    continue
                if anyway:
                    self.best = schedule
                return anyway or self.take(schedule)
            if known is None or (not anyway and self._slower(solver.seconds(known).step_seconds)):
                return False
        return False

    def _rooms(self, selection: Selection, room: np.ndarray) -> Iterator[np.ndarray]:
        """All of the room, then less and less of it ahead of use."""
        yield room
        problem = self.solver.problem
        if problem.memory.device == "cuda" and len(problem.names) <= _MOST_OPERATORS:
            used = self.solver.segments.held(selection)
            usual = float(np.median([span.nbytes for span in selection]))
            for ahead in _AHEAD:
                yield np.minimum(room, used + int(ahead * usual))

    def _place(self, selection: Selection, room: np.ndarray, seam: bool) -> tuple[Placement, ...] | None:
        return self.solver.segments.place(selection, room, seam)

    def _slower(self, seconds: float) -> bool:
        return seconds > self.best.time.step_seconds * (1 + _EQUAL)

    @cached_property
    def _arena_sizes(self) -> list[int]:
        sizes, size = [], float(_ARENA_UNIT)
        while size <= self.solver.problem.total_weight_bytes + _ARENA_UNIT:
            sizes.append(int(size) // _ARENA_UNIT * _ARENA_UNIT)
            size = max(size * _ARENA_RATIO, size + _ARENA_UNIT)
        return sizes

    def make_uniform(self) -> None:
        """Identical blocks get identical treatment where that costs nothing."""
        selections = self.solver.selections
        if not selections.split_roles(tuple(p.span for p in self.best.placements)):
            return
        for selection, least in selections.uniform:
            if not self._slower(least) and self.try_(selection):
                return

    def make_static(self) -> None:
        """The same bundles through one static arena, where that is as fast: nothing is asked of the allocator then."""
        spans = tuple(p.span for p in self.best.placements)
        if not spans or self.best.staging == "arena":
            return
        solver, count = self.solver, len(self.solver.problem.seconds)
        largest = max(s.nbytes for s in spans)
        floor = solver.resident_bytes(spans) + int(solver.problem.activation_bytes.max()) + solver.problem.memory.fixed_bytes
        for slots in ARENA_SLOTS:
            placed = self._place(spans, np.full(len(solver.segments), slots * largest, dtype=np.int64), solver.repeats > 1)
            if placed is None:
                continue
            if floor + int(staged_bytes(placed, count).max()) > self.budget_bytes:
                return
            time = solver.seconds(placed)
            if self._slower(time.step_seconds):
                continue
            schedule = solver.within(placed, "arena", self.budget_bytes, time)
            if schedule is not None:
                self.best = schedule
                return

    def _pins_too_much(self, selection: Selection) -> bool:
        if self.host_bytes is None:
            return False
        return self.solver.problem.arena_bytes({w for span in selection for w in span.weights}) > self.host_bytes

    def _rank(self, schedule: Schedule) -> tuple[float, int, int, int]:
        """Faster first; then what reads better; then fewer bytes over the link, then less memory."""
        split = self.solver.selections.split_roles(tuple(p.span for p in schedule.placements))
        seconds = schedule.time.step_seconds
        if seconds <= self.solver.problem.compute_seconds * (1 + _EQUAL):
            seconds = 0.0  # not slower than another such by more than rounding
        return seconds, split, schedule.streamed_bytes, schedule.peak_bytes
