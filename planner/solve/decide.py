"""Decide: of all candidate schedules that fit the budget, the fastest under the simulator.

A candidate is a bundling, a rate at which to stream (evenly by compute time) and a staging policy. None of
these depends on the budget, and a schedule that starts copies as early as the budget leaves room only gets faster with more
room; so a larger budget is never slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from passes.stream_weights import Stream
from planner.memory import AllocationEvent
from planner.schedule import (
    Placement,
    arena_offsets,
    prefetch_into_arena,
    prefetch_into_headroom,
    staged_bytes,
)  # fmt: skip
from planner.solve.bundles import TINY_BYTES, BundleSpan, make_bundles, spread
from planner.solve.decisions import Decisions, StagingMode
from planner.solve.problem import Problem
from planner.solve.simulate import StepTime, simulate

MIB = 1024 * 1024
# (bundle target, what is too small to stream). The finest comes last: it sets the minimum budget.
GRANULARITIES = ((64 * MIB, TINY_BYTES), (16 * MIB, TINY_BYTES), (0, TINY_BYTES), (0, 0))
# Bytes streamed per second of compute, in units of all weights over the whole step; the last streams everything.
RATES = (*(i / 48 for i in range(1, 48)), *(1.05**i for i in range(80)), 1e30)
# Staging arena sizes, in multiples of the largest bundle: 2 is double buffering.
ARENA_SLOTS = (1, 2, 3, 4, 6, 8, 12)
# Ratio of neighbouring limits for schedules in the headroom, for allocators that reserve more than is live.
LIMIT_STEP = 1.01


@dataclass(frozen=True)
class Schedule:
    """A feasible candidate with what the memory model and the simulator say of it."""

    placements: tuple[Placement, ...]
    staging: StagingMode
    peak_bytes: int
    peak_position: int
    time: StepTime

    @property
    def streamed_bytes(self) -> int:
        return sum(p.span.nbytes for p in self.placements)

    @property
    def staging_bytes(self) -> int:
        """Of the static staging arena, where there is one."""
        return arena_offsets(self.placements)[1] if self.staging == "arena" and self.placements else 0

    def decisions(self, problem: Problem) -> Decisions:
        names = problem.names
        return Decisions(
            tuple(Stream(p.span.weights, names[p.prefetch], names[p.span.first], names[p.span.last]) for p in self.placements),
            self.staging,
        )


@dataclass(frozen=True, eq=False)
class Solver:
    """Solves one problem for any number of budgets; what does not depend on the budget is computed once."""

    problem: Problem

    @cached_property
    def minimum(self) -> Schedule:
        """The schedule of least memory: every visit its own bundle, copied when it is needed, not before."""
        return min(self.tightest, self.resident, key=lambda s: s.peak_bytes)

    @cached_property
    def tightest(self) -> Schedule:
        """Everything that may be streamed is, each visit by itself."""
        spans = make_bundles(self.problem, 0, 0)
        return self._evaluate(tuple(Placement(s, s.first) for s in spans), "allocator")

    @cached_property
    def resident(self) -> Schedule:
        """Everything stays on the device: the unplanned way."""
        return self._evaluate((), "arena")

    def solve(self, budget_bytes: int) -> Schedule:
        """The fastest schedule within the budget; requires `budget_bytes >= minimum.peak_bytes`."""
        assert budget_bytes >= self.minimum.peak_bytes
        best = self.resident if self.resident.peak_bytes <= budget_bytes else self.minimum
        for spans, least in sorted(self._selections, key=lambda item: item[1]):
            if least >= best.time.step_seconds:
                break
            for placements in self._arenas(spans, budget_bytes):
                best = self._better(best, placements, "arena", budget_bytes)
            for limit in self._limits(budget_bytes):
                early = prefetch_into_headroom(spans, self.problem.activation_bytes, self._resident_bytes(spans), limit)
                if early is None or self._seconds(early) > best.time.step_seconds:
                    break  # a smaller limit is no faster
                schedule = self._evaluate(early, "allocator")
                if schedule.peak_bytes <= budget_bytes:
                    best = min(best, schedule, key=_rank)
                    break
        return best

    def pass_through(self, budget_bytes: int) -> Schedule:
        """The fastest schedule that keeps nothing between calls: all that is worth a copy is streamed in every one.

        Requires `budget_bytes >= minimum.peak_bytes`.
        """
        assert budget_bytes >= self.minimum.peak_bytes
        best = self.minimum
        for target, tiny in GRANULARITIES:
            spans = make_bundles(self.problem, target, tiny)
            for limit in self._limits(budget_bytes) if spans else ():
                early = prefetch_into_headroom(spans, self.problem.activation_bytes, self._resident_bytes(spans), limit)
                if early is None or (best.placements and self._seconds(early) >= best.time.step_seconds):
                    break  # a smaller limit is no faster
                schedule = self._evaluate(early, "allocator")
                if schedule.peak_bytes <= budget_bytes:
                    best = min(best, schedule, key=_rank) if best.placements else schedule
                    break
        return best

    def _better(self, best: Schedule, placements: tuple[Placement, ...], staging: StagingMode, budget_bytes: int) -> Schedule:
        """The better of two schedules. The simulator is cheap and the memory model is not: it is asked second."""
        if self._seconds(placements) > best.time.step_seconds:
            return best
        schedule = self._evaluate(placements, staging)
        return min(best, schedule, key=_rank) if schedule.peak_bytes <= budget_bytes else best

    @cached_property
    def _selections(self) -> list[tuple[tuple[BundleSpan, ...], float]]:
        """Every choice of streamed bundles, with the least seconds that it can take."""
        problem, chosen = self.problem, {}
        for target, tiny in GRANULARITIES:
            spans = make_bundles(problem, target, tiny)
            for rate in RATES:
                selection = spread(problem, spans, rate)
                least = problem.machine.link_latency_seconds * len(selection)
                least += sum(s.nbytes for s in selection) / problem.machine.link_bandwidth
                if selection:
                    chosen[selection] = max(problem.compute_seconds, least)
        return list(chosen.items())

    def _arenas(self, spans: tuple[BundleSpan, ...], budget_bytes: int) -> Iterator[tuple[Placement, ...]]:
        """Placements of a selection in static arenas of several sizes, as long as they may fit."""
        problem = self.problem
        largest = max(s.nbytes for s in spans)
        floor = self._resident_bytes(spans) + int(problem.activation_bytes.max()) + problem.memory.fixed_bytes
        for slots in ARENA_SLOTS:
            placements = prefetch_into_arena(spans, slots * largest)
            if floor + int(staged_bytes(placements, len(problem.seconds)).max()) > budget_bytes:
                break
            yield placements

    def _limits(self, budget_bytes: int) -> Iterator[int]:
        """Limits of live bytes to schedule into, the largest first.

        The budget itself where live bytes are all there is. Where the allocator reserves more, from a grid that is the same for
        every budget: a larger one has all the limits of a smaller one, and is never slower.
        """
        fixed = self.problem.memory.fixed_bytes
        if self.problem.memory.device != "cuda":
            yield budget_bytes - fixed
            return
        limit = float(self.resident.peak_bytes)
        while limit > fixed:
            if limit <= budget_bytes:
                yield int(limit) - fixed
            limit /= LIMIT_STEP

    def _seconds(self, placements: tuple[Placement, ...]) -> float:
        return simulate(self.problem.seconds, placements, self.problem.machine).step_seconds

    def _resident_bytes(self, spans: Sequence[BundleSpan]) -> int:
        streamed = {w for s in spans for w in s.weights}
        return self.problem.total_weight_bytes - self.problem.arena_bytes(streamed)

    def weights_at(self, schedule: Schedule) -> np.ndarray:
        """Bytes of weights on the device at every operator, resident and staged; int64[n]."""
        resident = self._resident_bytes([p.span for p in schedule.placements])
        if schedule.staging == "arena":
            arena = arena_offsets(schedule.placements)[1] if schedule.placements else 0
            return np.full(len(self.problem.seconds), resident + arena, dtype=np.int64)
        return resident + staged_bytes(schedule.placements, len(self.problem.seconds))

    def evaluate(self, placements: tuple[Placement, ...], staging: StagingMode) -> Schedule:
        """What the memory model and the simulator say of a schedule that was decided elsewhere."""
        return self._evaluate(placements, staging)

    def _evaluate(self, placements: tuple[Placement, ...], staging: StagingMode, time: StepTime | None = None) -> Schedule:
        problem, memory = self.problem, self.problem.memory
        resident = self._resident_bytes([p.span for p in placements])
        staged = staged_bytes(placements, len(problem.seconds))
        arena = arena_offsets(placements)[1] if staging == "arena" and placements else 0
        total = problem.activation_bytes + resident + (arena if staging == "arena" else staged)
        position = int(np.argmax(total))
        if memory.device != "cuda":
            peak = int(total[position])
        elif staging == "arena":
            peak = self._reserved_activations + memory.reserved_alone(resident) + memory.reserved_alone(arena)
        else:
            peak = memory.reserved_alone(resident) + memory.reserved_bytes(self._events(placements))
        time = time or simulate(problem.seconds, placements, problem.machine)
        return Schedule(placements, staging, peak + memory.fixed_bytes, position, time)

    @cached_property
    def _reserved_activations(self) -> int:
        return self.problem.memory.reserved_bytes(self._events(()))

    def _events(self, own: tuple[Placement, ...]) -> Iterator[AllocationEvent]:
        """What the device's allocator is asked for in program order, besides the arenas; `own` bundles come from it too."""
        live = self.problem.liveness
        keys: dict[int, int] = {}
        fresh = iter(range(1, 1 << 62))
        for nbytes in live.input_storages:
            yield next(fresh), nbytes
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for index, placed in enumerate(own):
            starts.setdefault(placed.prefetch, []).append(index)
            ends.setdefault(placed.span.last, []).append(index)
        bundles: dict[int, int] = {}
        for i, cost in enumerate(live.costs):
            for index in starts.get(i, ()):
                bundles[index] = next(fresh)
                yield bundles[index], own[index].span.nbytes
            for storage, nbytes in live.born[i]:
                keys[storage] = next(fresh)
                yield keys[storage], nbytes
            if cost.workspace_bytes:
                workspace = next(fresh)
                yield workspace, cost.workspace_bytes
                yield -workspace, 0
            for storage in live.dies[i]:
                yield -keys.pop(storage), 0
            for index in ends.get(i, ()):
                yield -bundles.pop(index), 0


def _rank(schedule: Schedule) -> tuple[float, int, int]:
    """Faster first; then fewer bytes over the link, then less memory."""
    return schedule.time.step_seconds, schedule.streamed_bytes, schedule.peak_bytes
