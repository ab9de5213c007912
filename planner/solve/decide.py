"""Decide: of all candidate schedules that fit the budget, the fastest under the simulator.

A candidate is a selection of bundles to stream; its copies start as early as the budget leaves room, and over the seam of two
calls where calls follow each other. Selections do not depend on the budget, and with more room each only gets faster; so a
larger budget is never slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from passes.cuda_replay import Trace
from passes.liveness import Liveness
from passes.stream_weights import Stream
from planner.memory import AllocationEvent, Reserved
from planner.schedule import Placement, arena_offsets, staged_bytes
from planner.solve.bundles import BundleSpan, make_bundles
from planner.solve.decisions import Decisions, StagingMode
from planner.solve.homes import HostMemory, HostPlan
from planner.solve.problem import Problem
from planner.solve.relax import Relaxation, relax
from planner.solve.search import Search
from planner.solve.segments import Segments
from planner.solve.select import GRANULARITIES, Selections
from planner.solve.simulate import EngineProgram, StepTime, phase_seconds, step_time

# How many bundles ahead of their use everything is fetched in the simplest schedules.
DEPTHS = (1, 2)
# So many equal tiles are replayed: the second finds what the first gave back, as every later one does.
_ALIKE = 3


@dataclass(frozen=True)
class Schedule:
    """A feasible candidate with what the memory model and the simulator say of it."""

    placements: tuple[Placement, ...]
    staging: StagingMode
    peak_bytes: int
    peak_position: int
    time: StepTime
    staging_bytes: int = 0  # of the static arena, where there is one
    pools: tuple[int, ...] = ()  # bytes of the segments that the device's allocator is given beforehand
    host: HostPlan | None = None  # what of the weights the host has in memory, where that has a budget

    @property
    def streamed_bytes(self) -> int:
        return sum(p.span.nbytes for p in self.placements)

    def with_host(self, solver: Solver, homes: HostPlan) -> Schedule:
        """The same copies from other homes."""
        return replace(self, host=homes, time=solver.seconds(self.placements, homes))

    def decisions(self, problem: Problem) -> Decisions:
        names = problem.names
        return Decisions(
            tuple(Stream(p.span.weights, names[p.prefetch], names[p.span.first], names[p.span.last]) for p in self.placements),
            self.staging,
            problem.tiling,
            None if self.host is None else self.host.homes,
        )


@dataclass(frozen=True, eq=False)
class Solver:
    """Solves one problem for any number of budgets; what does not depend on the budget is computed once.

    `repeats`: how many calls follow each other; from two on copies go over the seam between them. `pool`: whether the device's
    allocator can be given a segment beforehand (where several programs share a device it cannot).
    """

    problem: Problem
    repeats: int = 1
    pool: bool = True

    @cached_property
    def segments(self) -> Segments:
        return Segments.of(self.problem)

    @cached_property
    def selections(self) -> Selections:
        most = max(self.resident.peak_bytes, self.minimum.peak_bytes)
        return Selections(self.problem, self.segments, self.repeats > 1, self.minimum.peak_bytes, most)

    @cached_property
    def minimum(self) -> Schedule:
        """The schedule of least memory: every visit its own bundle, copied when it is needed, not before."""
        return min(self.tightest, self.resident, key=lambda s: s.peak_bytes)

    @cached_property
    def tightest(self) -> Schedule:
        """Everything that may be streamed is, each visit by itself."""
        spans = make_bundles(self.problem, 0, 0)
        return self.evaluate(tuple(Placement(s, s.first) for s in spans), "allocator")

    @cached_property
    def resident(self) -> Schedule:
        """Everything stays on the device: the unplanned way."""
        return self.evaluate((), "arena")

    @cached_property
    def stepwise(self) -> list[tuple[tuple[Placement, ...], StepTime]]:
        """Everything streamed, each bundle fetched when the one so many before it is used: little memory, and hardly a choice.

        Where the allocator reserves more than is live, what fills all room near the minimum breaks it up; this does not.
        """
        schedules = []
        for spans in self.selections.granularities:
            for depth in DEPTHS:
                ahead = [spans[max(0, i - depth)].first for i in range(len(spans))]
                placements = tuple(Placement(s, min(at, s.first)) for s, at in zip(spans, ahead, strict=True))
                schedules.append((placements, self.seconds(placements)))
        return schedules

    def relaxed(self, budget_bytes: int) -> Relaxation | None:
        """The linear program's bound and solution within a budget; None where not even fractions of weights fit."""
        if budget_bytes not in self._relaxed:
            self._relaxed[budget_bytes] = relax(self.problem, self.segments, budget_bytes, seam=self.repeats > 1)
        return self._relaxed[budget_bytes]

    @cached_property
    def _relaxed(self) -> dict[int, Relaxation | None]:
        return {}

    def solve(self, budget_bytes: int, host: HostMemory | None = None) -> Schedule:
        """The fastest schedule within the budget; requires `budget_bytes >= minimum.peak_bytes`.

        Where the host's memory has a budget, `host`, part of what is streamed may come from disk. Requires that it fits there.
        """
        assert budget_bytes >= self.minimum.peak_bytes
        if self.resident.peak_bytes <= budget_bytes:
            return self.resident if host is None else replace(self.resident, host=host.of(self.problem).plan(()))
        if host is not None:
            return Search(self, budget_bytes, host.of(self.problem), self.minimum).run()
        if budget_bytes not in self._solved:
            self._solved[budget_bytes] = Search(self, budget_bytes, None, self.minimum).run()
        return self._solved[budget_bytes]

    @cached_property
    def _solved(self) -> dict[int, Schedule]:
        return {}

    def pass_through(self, budget_bytes: int) -> Schedule:
        """The fastest schedule that keeps nothing between calls: all that is worth a copy is streamed in every one.

        Requires `budget_bytes >= minimum.peak_bytes`.
        """
        assert budget_bytes >= self.minimum.peak_bytes
        search = Search(self, budget_bytes, None, self.minimum)
        fresh = not self.minimum.placements
        for target, tiny in GRANULARITIES:
            schedule = search.first_in_blocks(make_bundles(self.problem, target, tiny))
            if schedule is not None and schedule.placements:
                search.best = schedule if fresh else search.best
                fresh = False
                search.take(schedule)
        return search.best

    def seconds(self, placements: Sequence[Placement], host: HostPlan | None = None) -> StepTime:
        """What the simulator says."""
        program = EngineProgram.placed(self.problem.seconds, placements, self.problem.banded, host, self.repeats > 1)
        return step_time(program, self.problem.machine, self.repeats)

    def phase_seconds(self, schedule: Schedule, calls: int) -> float:
        """Of so many calls on end, with what the first and the last of them do otherwise."""
        carried = [index for index, placed in enumerate(schedule.placements) if placed.carried]
        if not carried:
            return calls * schedule.time.step_seconds
        program = EngineProgram.placed(self.problem.seconds, schedule.placements, self.problem.banded)
        return phase_seconds(program, self.problem.machine, carried, calls)

    def resident_bytes(self, spans: Sequence[BundleSpan]) -> int:
        """Of the weights that these spans leave on the device."""
        streamed = {w for s in spans for w in s.weights}
        return self.problem.total_weight_bytes - self.problem.arena_bytes(streamed)

    def weights_at(self, schedule: Schedule) -> np.ndarray:
        """Bytes of weights on the device at every operator, resident and staged; int64[n]."""
        resident = self.resident_bytes([p.span for p in schedule.placements])
        if schedule.staging == "arena":
            return np.full(len(self.problem.seconds), resident + schedule.staging_bytes, dtype=np.int64)
        return resident + staged_bytes(schedule.placements, len(self.problem.seconds))

    def evaluate(self, placements: Sequence[Placement], staging: StagingMode, time: StepTime | None = None) -> Schedule:
        """What the memory model says of a schedule, and the simulator, where `time` does not say it already."""
        schedule = self.within(placements, staging, None, time)
        assert schedule is not None
        return schedule

    def within(
        self, placements: Sequence[Placement], staging: StagingMode, budget_bytes: int | None, time: StepTime | None = None
    ) -> Schedule | None:
        """As `evaluate`; None, and that sooner, for a schedule that takes more than `budget_bytes`."""
        problem, memory, count = self.problem, self.problem.memory, len(self.problem.seconds)
        placements = tuple(placements)
        resident = self.resident_bytes([p.span for p in placements])
        staged = staged_bytes(placements, count)
        arena = 0
        if staging == "arena" and placements:
            found = arena_offsets(placements, count, None if budget_bytes is None else budget_bytes - self._besides(resident))
            if found is None:
                return None
            arena = found[1]
        total = problem.activation_bytes + resident + (arena if staging == "arena" else staged)
        position = int(np.argmax(total))
        peak, pools = int(total[position]), tuple[int, ...]()
        if memory.device == "cuda":
            arenas = memory.reserved_alone(resident) + memory.reserved_alone(arena)
            limit = None if budget_bytes is None else budget_bytes - arenas - memory.fixed_bytes
            reserved = self._reserve(placements, limit) if staging == "allocator" else self.reserved_activations
            if reserved is None:
                return None
            peak, pools = arenas + reserved.reserved_bytes, reserved.pools
        peak += memory.fixed_bytes
        if budget_bytes is not None and peak > budget_bytes:
            return None
        return Schedule(placements, staging, peak, position, time or self.seconds(placements), arena, pools)

    def _besides(self, resident_bytes: int) -> int:
        """What is taken besides a static arena, at least."""
        memory = self.problem.memory
        most = self.problem.most_activation_bytes
        activations = self.reserved_activations.reserved_bytes if memory.device == "cuda" else most
        return memory.fixed_bytes + memory.reserved_alone(resident_bytes) + activations

    @cached_property
    def reserved_activations(self) -> Reserved:
        """What the device's allocator reserves without any bundle."""
        reserved = self._reserve((), None)
        assert reserved is not None
        return reserved

    def _reserve(self, own: Sequence[Placement], limit: int | None) -> Reserved | None:
        """What the device's allocator reserves besides the arenas, `own` bundles included; None where that passes the limit."""
        memory, count = self.problem.memory, len(self.problem.seconds)
        blocks = []
        for placed in own:
            # Step 0 makes the inputs, operator i is step i + 1; behind the last operator a second call may follow.
            span, nbytes = placed.span, placed.span.nbytes
            if not placed.carried:
                blocks += [(placed.prefetch + 1 + call, span.last + 1 + call, nbytes) for call in self._calls]
            else:
                blocks += [(1, span.last + 1, nbytes), (placed.prefetch + 1, span.last + 1 + count, nbytes)]
                blocks.append((placed.prefetch + 1 + count, 2 * count, nbytes))
        trace = self._trace.holding(blocks) if blocks else self._trace
        if self.pool:
            return memory.reserve(trace, limit)
        reserved = trace.reserved_bytes(limit=limit)
        return Reserved(reserved) if limit is None or reserved <= limit else None

    @property
    def _calls(self) -> tuple[int, ...]:
        """Where calls begin that the allocator's replay goes through."""
        return (0, len(self.problem.seconds)) if self.repeats > 1 else (0,)

    @cached_property
    def _trace(self) -> Trace:
        """What the device's allocator is asked for besides the arenas: the inputs, then by operator.

        Where calls follow each other there are two, and what the first returns is kept while the second runs, as in `y = f(x)`.
        """
        live = self.problem.liveness
        fresh = iter(range(1, 1 << 62))
        steps: list[list[AllocationEvent]] = [[(next(fresh), nbytes) for nbytes in live.input_storages]]
        for _ in self._calls:
            steps += _events(live, fresh)
        return Trace.of(steps)


def _events(live: Liveness, fresh: Iterator[int]) -> list[list[AllocationEvent]]:
    """What each operator asks the allocator for. `fresh` gives keys."""
    keys: dict[int, int] = {}
    steps: list[list[AllocationEvent]] = []
    for i, (born, dies, cost) in enumerate(zip(live.born, live.dies, live.costs, strict=True)):
        events = []
        for storage, nbytes in born:
            keys[storage] = next(fresh)
            events.append((keys[storage], nbytes))
        if i in live.bodies:
            events += _tile_events(live, i, fresh)
        elif cost.workspace_bytes:
            workspace = next(fresh)
            events += [(workspace, cost.workspace_bytes), (-workspace, 0)]
        events += [(-keys.pop(storage), 0) for storage in dies]
        steps.append(events)
    return steps


def _tile_events(live: Liveness, index: int, fresh: Iterator[int]) -> Iterator[AllocationEvent]:
    """Of a loop: its tiles one after the other, of many that are alike the first ones, which leave the state of the rest."""
    for run, body in zip(live.nodes[index].meta["loop"].runs, live.bodies[index], strict=True):
        for _ in run.table[:_ALIKE]:
            yield from itertools.chain.from_iterable(_events(body, fresh))
