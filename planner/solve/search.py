"""The search within one budget: selections are scheduled in the room there is, and the best under the simulator is kept.

Where live bytes are all that counts, the room at every operator is known, and a selection has one schedule. On CUDA it has
several. Through a static arena of some size, what the allocator reserves besides does not change. In blocks of the allocator
activations and weights share memory over time, but how much the allocator reserves for some live bytes only a replay tells.
Sizes are from grids that do not depend on the budget: a larger one has all the schedules of a smaller one.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from planner.bounds import physical_bound
from planner.schedule import Placement, staged_bytes
from planner.solve.decisions import StagingMode
from planner.solve.homes import HostPlan, HostProblem, rings
from planner.solve.select import Selection
from planner.solve.simulate import StepTime

if TYPE_CHECKING:
    from planner.solve.decide import Schedule, Solver

# Staging arena sizes, in multiples of the largest bundle, for a schedule that is known to be as fast: 2 is double buffering.
ARENA_SLOTS = (1, 2, 3, 4, 6, 8, 12)
# Sizes that are tried where the allocator rounds: multiples of the unit, neighbours in about the ratio.
_UNIT = 2 * 1024 * 1024
_ARENA_RATIO = 1.04
_BLOCKS_RATIO = 1.01
# How much may be staged ahead of use in blocks, in multiples of the usual bundle: what fills all room may break it up. The
# first three of every selection, all of what streams everything, which is what there is near the minimum.
_AHEAD = (math.inf, 3.0, 1.5, 4.0, 2.0, 1.0, 0.5)
_MOST_AHEAD = 3
# Of programs of more operators only what streams everything is tried in blocks: a replay takes long there, and of the others
# hardly any was faster than in an arena.
_MOST_OPERATORS = 2000
# Schedules whose seconds differ by no more than this share are equally fast.
_EQUAL = 1e-9
# A step that takes no more than so many times what the disk takes at least is not improved.
NEAR = 1.02


@dataclass(order=True)
class _Candidate:
    """A selection in blocks: nothing of it is faster than `seconds`. The next room to try is that of `index`."""

    seconds: float
    order: int
    selection: Selection = field(compare=False)
    ahead: float = field(compare=False)
    index: int = field(compare=False, default=0)
    placements: tuple[Placement, ...] = field(compare=False, default=())


@dataclass
class Search:
    """The best schedule so far within a budget. `host`: the weights and the host's memory, where that has a budget."""

    solver: Solver
    budget_bytes: int
    host: HostProblem | None
    best: Schedule

    @property
    def perfect(self) -> bool:
        """Whether compute never waits, which nothing beats; or hardly longer than the disk takes at least."""
        least = self.solver.problem.compute_seconds
        return self.best.time.step_seconds <= max(least * (1 + _EQUAL), self._least_disk_seconds * NEAR)

    def run(self) -> Schedule:
        """All families of selections, those first whose schedules are known without a replay."""
        if self.host is not None:
            self.best = self._on_host(self.best)
        selections = self.solver.selections
        tried: dict[Selection, float] = {}
        for family in (selections.relaxed, selections.even):
            for selection in family(self.budget_bytes, lambda: self.best.time.step_seconds):
                if self.perfect:
                    break
                least = max(selections.least_seconds(selection), self._disk_seconds(selection))
                if selection not in tried and least < self.best.time.step_seconds and self._may_fit(selection):
                    tried[selection] = least
                    self._in_arena(selection) if self._rounds else self._exactly(selection)
        if self._rounds and not self.perfect:
            self._stepwise()
            self._best_in_blocks(tried)
        self._make_uniform()
        self._make_static()
        self._fit_ring()
        return self.best

    def take(self, schedule: Schedule) -> bool:
        """Keeps a schedule that fits and is better."""
        if schedule.peak_bytes > self.budget_bytes or self._rank(schedule) >= self._rank(self.best):
            return False
        self.best = schedule
        return True

    def _on_host(self, schedule: Schedule) -> Schedule:
        """With homes for what it streams, and the seconds that it takes so."""
        if self.host is None:
            return schedule
        homes = self._homes(schedule.placements)
        time = self.solver.seconds(schedule.placements, homes) if homes is not None and homes.read_bytes else schedule.time
        return replace(schedule, host=homes, time=time)

    def _homes(self, placements: Sequence[Placement]) -> HostPlan | None:
        """Found once for every selection: they do not depend on when its bundles are copied."""
        if self.host is None:
            return None
        selection = tuple(placed.span for placed in placements)
        if selection not in self._known_homes:
            self._known_homes[selection] = self.host.plan(selection)
        return self._known_homes[selection]

    def _seconds(self, placements: Sequence[Placement]) -> StepTime:
        return self.solver.seconds(placements, self._homes(placements))

    def _within(self, placements: Sequence[Placement], staging: StagingMode, time: StepTime) -> Schedule | None:
        schedule = self.solver.within(placements, staging, self.budget_bytes, time)
        return schedule if schedule is None or self.host is None else replace(schedule, host=self._homes(placements))

    def _disk_seconds(self, selection: Selection) -> float:
        """What reading takes at least, if these bundles are streamed."""
        if self.host is None:
            return 0.0
        return self.host.least_read_bytes(selection) / self.solver.problem.machine.disk_bandwidth

    @cached_property
    def _least_disk_seconds(self) -> float:
        """What reading takes at least, whatever is streamed."""
        if self.host is None:
            return 0.0
        return physical_bound(self.solver.problem, self.budget_bytes, self.host.host).disk_seconds

    def _fit_ring(self) -> None:
        """Rings of other sizes: a larger one evens out more, and leaves less room for weights."""
        if self.host is None or self.best.host is None or not self.best.host.read_bytes:
            return
        placements = self.best.placements
        for homes in rings(self.host, tuple(placed.span for placed in placements)):
            time = self.solver.seconds(placements, homes)
            if self._faster(time.step_seconds):
                self.best = replace(self.best, host=homes, time=time)

    def first_in_blocks(self, selection: Selection) -> Schedule | None:
        """A selection by itself, without copies over the seam, in as much room as fits; None where it does not."""
        solver = self.solver
        if not self._may_fit(selection):
            return None
        for room in self._rooms(selection):
            placed = solver.segments.place(selection, room, False)
            if placed is None:
                return None
            schedule = solver.within(placed, "allocator", self.budget_bytes)
            if schedule is not None:
                return schedule
        return None

    def _exactly(self, selection: Selection) -> bool:
        """In all the room that activations leave at each time."""
        placed = self._place(selection, next(self._rooms(selection)))
        if placed is None:
            return False
        time = self._seconds(placed)
        if self._slower(time.step_seconds):
            return False
        schedule = self._within(placed, "allocator", time)
        return schedule is not None and self.take(schedule)

    def _in_arena(self, selection: Selection) -> bool:
        """Through static arenas, the largest that may fit first."""
        solver, sizes = self.solver, self._arena_sizes
        room = self._room(selection) - solver.reserved_activations.reserved_bytes
        known: tuple[Placement, ...] | None = None
        for size in reversed(sizes[: bisect_right(sizes, room)]):
            placed = self._place(selection, np.full(len(solver.segments), size, dtype=np.int64))
            if placed is None:
                return False
            if placed == known:
                continue
            known, time = placed, self._seconds(placed)
            if self._slower(time.step_seconds):
                return False  # a smaller arena is no faster
            schedule = self._within(placed, "arena", time)
            if schedule is not None:
                return self.take(schedule)
        return False

    def _stepwise(self) -> None:
        for placements, time in self.solver.stepwise:
            if self._faster(time.step_seconds):
                schedule = self._within(placements, "allocator", time)
                if schedule is not None:
                    self.take(self._on_host(schedule))

    def _best_in_blocks(self, selections: dict[Selection, float]) -> None:
        """Best first: what no other can beat is replayed next, until it fits; where it does not it gets less room."""
        everything = set(self.solver.selections.granularities)
        queue: list[_Candidate] = []
        for selection, least in selections.items():
            for ahead in _AHEAD if selection in everything else _AHEAD[: _MOST_AHEAD if self._short else 0]:
                queue.append(_Candidate(least, len(queue), selection, ahead))
        heapq.heapify(queue)
        while queue and self._faster(queue[0].seconds) and not self.perfect:
            candidate = heapq.heappop(queue)
            if candidate.placements:
                time = self._seconds(candidate.placements)
                schedule = self._within(candidate.placements, "allocator", time)
                if schedule is not None:
                    self.take(schedule)
                    continue
            following = self._following(candidate)
            if following is not None:
                heapq.heappush(queue, following)

    def _following(self, candidate: _Candidate) -> _Candidate | None:
        """The same selection in less room; None where no schedule of it is left that is faster than what is known."""
        rooms = self._rooms(candidate.selection, candidate.ahead, candidate.index)
        for index, room in enumerate(rooms, candidate.index):
            placed = self._place(candidate.selection, room)
            if placed is None:
                return None
            if placed != candidate.placements:
                seconds = self._seconds(placed).step_seconds
                if not self._faster(seconds):
                    return None  # less room is no faster
                return replace(candidate, seconds=seconds, index=index + 1, placements=placed)
        return None

    def _rooms(self, selection: Selection, ahead: float = math.inf, skip: int = 0) -> Iterator[np.ndarray]:
        """Bytes for bundles by segment, falling: what live activations leave of the room for both."""
        room, activations = self._room(selection), self.solver.segments.activation_bytes
        if not self._rounds:
            yield room - activations
            return
        for size in self._blocks_sizes[: bisect_right(self._blocks_sizes, room)][::-1][skip:]:
            left = size - activations
            yield left if ahead == math.inf else np.minimum(left, self._held(selection, ahead))

    def _held(self, selection: Selection, ahead: float) -> np.ndarray:
        """What is read at each time, and so many usual bundles."""
        usual = float(np.median([span.nbytes for span in selection]))
        return self.solver.segments.held(selection) + int(ahead * usual)

    def _place(self, selection: Selection, room: np.ndarray) -> tuple[Placement, ...] | None:
        return self.solver.segments.place(selection, room, self.solver.repeats > 1)

    def _room(self, selection: Selection) -> int:
        """Bytes for activations and bundles, besides the weights that stay."""
        memory = self.solver.problem.memory
        return self.budget_bytes - memory.fixed_bytes - memory.reserved_alone(self.solver.resident_bytes(selection))

    def _may_fit(self, selection: Selection) -> bool:
        most = self.solver.problem.most_activation_bytes
        return self._room(selection) >= most

    @cached_property
    def _rounds(self) -> bool:
        """Whether the device reserves more than is live."""
        return self.solver.problem.memory.device == "cuda"

    @cached_property
    def _arena_sizes(self) -> list[int]:
        return _sizes(self.solver, _ARENA_RATIO)

    @cached_property
    def _blocks_sizes(self) -> list[int]:
        return _sizes(self.solver, _BLOCKS_RATIO)

    @cached_property
    def _short(self) -> bool:
        return len(self.solver.problem.names) <= _MOST_OPERATORS

    def _slower(self, seconds: float) -> bool:
        return seconds > self.best.time.step_seconds * (1 + _EQUAL)

    def _faster(self, seconds: float) -> bool:
        return seconds < self.best.time.step_seconds * (1 - _EQUAL)

    def _make_uniform(self) -> None:
        """Identical blocks get identical treatment where that costs nothing."""
        selections = self.solver.selections
        if not selections.split_roles(tuple(p.span for p in self.best.placements)):
            return
        for selection, least in selections.uniform:
            if self._slower(least) or not self._may_fit(selection):
                continue
            if self._in_arena(selection) if self._rounds else self._exactly(selection):
                return

    def _make_static(self) -> None:
        """The same bundles through one static arena, where that is as fast: nothing is asked of the allocator then."""
        spans = tuple(p.span for p in self.best.placements)
        if not spans or self.best.staging == "arena":
            return
        solver, count = self.solver, len(self.solver.problem.seconds)
        largest = max(s.nbytes for s in spans)
        floor = solver.resident_bytes(spans) + solver.problem.most_activation_bytes + solver.problem.memory.fixed_bytes
        for slots in ARENA_SLOTS:
            placed = self._place(spans, np.full(len(solver.segments), slots * largest, dtype=np.int64))
            if placed is None:
                continue
            if floor + int(staged_bytes(placed, count).max()) > self.budget_bytes:
                return
            time = self._seconds(placed)
            if self._slower(time.step_seconds):
                continue
            schedule = self._within(placed, "arena", time)
            if schedule is not None:
                self.best = schedule
                return

    @cached_property
    def _known_homes(self) -> dict[Selection, HostPlan]:
        return {}

    def _rank(self, schedule: Schedule) -> tuple[float, int, int, int]:
        """Faster first; then what reads better; then fewer bytes over the link, then less memory."""
        split = self.solver.selections.split_roles(tuple(p.span for p in schedule.placements))
        seconds = schedule.time.step_seconds
        if seconds <= self.solver.problem.compute_seconds * (1 + _EQUAL):
            seconds = 0.0  # not slower than another such by more than rounding
        return seconds, split, schedule.streamed_bytes, schedule.peak_bytes


def _sizes(solver: Solver, ratio: float) -> list[int]:
    """From one unit to all that weights and activations take, rising."""
    most = solver.problem.total_weight_bytes + solver.problem.most_activation_bytes
    sizes, size = [], float(_UNIT)
    while size <= most + _UNIT:
        sizes.append(int(size) // _UNIT * _UNIT)
        size = max(size * ratio, size + _UNIT)
    return sizes
