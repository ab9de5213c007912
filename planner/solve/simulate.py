"""The event simulator: what the engines of a machine do with an emitted program.

One compute engine and one first-in-first-out copy engine. A copy starts when the one before it is done and compute has come
to its prefetch; a bundle's memory is its own from its prefetch to its evict, whole; compute waits at an onload until its bundle
has arrived. Exactly that is what the runtime does on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from passes.loop import loop_of
from passes.program import Program
from planner.machine import Machine
from planner.schedule import Placement
from runtime import ops
from runtime.executable import Pace
from runtime.timeline import BANDS, Cause, Copy, Eviction, Stall, Timeline

# A program that prefetches over the seam has come to its steady state when two calls differ by no more than this share.
_STEADY = 1e-12
# Calls after which a program is in its steady state, or goes round in a cycle of states.
_MAX_CALLS = 24


class Kind(IntEnum):
    """What a program does with a bundle; at one position in this order. Between the other two a loop has the link alone."""

    BANDS_END = -1
    EVICT = 0
    PREFETCH = 1
    ONLOAD = 2
    BANDS_BEGIN = 3


class Step(NamedTuple):
    """Before operator `position` (behind the last one: their number) a bundle is prefetched, onloaded or evicted."""

    position: int
    kind: Kind
    bundle: int


@dataclass(frozen=True, eq=False)
class EngineProgram:
    """A program as the engines see it: seconds of every operator, the steps between them in program order, bytes by bundle."""

    seconds: np.ndarray
    steps: tuple[Step, ...]
    nbytes: tuple[int, ...]

    @classmethod
    def emitted(cls, program: Program, seconds: Mapping[str, float]) -> EngineProgram:
        """From an emitted program: its graph and its layout. `seconds` by operator's name; others take none."""
        assert program.layout is not None
        durations: list[float] = []
        steps: list[Step] = []
        kinds = {ops.evict: Kind.EVICT, ops.prefetch: Kind.PREFETCH, ops.onload: Kind.ONLOAD}
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            loop = loop_of(node)
            if loop is not None and loop.banded:
                steps.append(Step(len(durations), Kind.BANDS_BEGIN, BANDS))
                durations.append(seconds[node.name])
                steps.append(Step(len(durations), Kind.BANDS_END, BANDS))
            elif node.target in kinds:
                steps.append(Step(len(durations), kinds[node.target], node.args[0]))
            elif node.name in seconds:
                durations.append(seconds[node.name])
        return cls(np.array(durations), tuple(steps), tuple(bundle.nbytes for bundle in program.layout.bundles))

    @classmethod
    def placed(cls, seconds: np.ndarray, placements: Sequence[Placement], banded: Sequence[int] = ()) -> EngineProgram:
        """What will be emitted for these placements; steps at one position that take no time may come in another order."""
        keyed: list[tuple[tuple[int, int, bool, int], Step]] = []
        for index, placed in enumerate(placements):
            span = placed.span
            own = ((placed.prefetch, Kind.PREFETCH), (span.first, Kind.ONLOAD), (span.last + 1, Kind.EVICT))
            keyed += [((at, int(kind), placed.carried, index), Step(at, kind, index)) for at, kind in own]
        for at in banded:
            keyed.append(((at, int(Kind.BANDS_BEGIN), False, -1), Step(at, Kind.BANDS_BEGIN, BANDS)))
            keyed.append(((at + 1, int(Kind.BANDS_END), False, -1), Step(at + 1, Kind.BANDS_END, BANDS)))
        keyed.sort(key=lambda item: item[0])
        return cls(seconds, tuple(step for _, step in keyed), tuple(p.span.nbytes for p in placements))

    def pace(self, machine: Machine) -> Pace:
        """Seconds of compute before each step and behind the last one, and of every copy."""
        elapsed = np.concatenate([[0.0], np.cumsum(self.seconds)])
        marks = [0, *(step.position for step in self.steps), len(self.seconds)]
        compute = tuple(float(x) for x in np.diff(elapsed[marks]))
        return Pace(compute, tuple((machine.copy_seconds(nbytes), nbytes) for nbytes in self.nbytes))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one call; `stall_seconds` is how long compute waited for copies."""

    step_seconds: float
    stall_seconds: float
    copy_seconds: float


def simulate(program: EngineProgram, machine: Machine, calls: int = 1) -> Timeline:
    """The timeline of one call; where bundles come over the seam, of a call in the steady state of `calls` calls."""
    pace = program.pace(machine)
    run = _steady(program.steps, pace, calls)
    copies = tuple(Copy(bundle, program.nbytes[bundle], *times) for bundle, *times in run.copies)
    return Timeline(run.seconds, copies, tuple(Stall(*stall) for stall in run.stalls), tuple(run.evictions))


def step_time(program: EngineProgram, machine: Machine, calls: int = 1) -> StepTime:
    """As `simulate`, the totals only."""
    pace = program.pace(machine)
    run = _steady(program.steps, pace, calls)
    stalled = sum(stop - start for _, start, stop, _ in run.stalls)
    return StepTime(run.seconds, stalled, sum(pace.copies[bundle][0] for bundle, *_ in run.copies))


@dataclass
class _Run:
    """One call. `under_way`: bundles that no onload has waited for, with their arrival and what their copy had waited for."""

    seconds: float
    engine_free: float
    under_way: dict[int, tuple[float, Cause]]
    copies: list[tuple[int, float, float, float]]
    stalls: list[tuple[int, float, float, Cause]]
    evictions: list[Eviction]

    def state(self) -> list[float]:
        """What the next call finds, in seconds from its beginning."""
        late = [arrival - self.seconds for _, (arrival, _) in sorted(self.under_way.items())]
        return [max(0.0, x) for x in (self.engine_free - self.seconds, *late)]


def _steady(steps: Sequence[Step], pace: Pace, calls: int) -> _Run:
    runs = [_call(steps, pace, None)]
    for _ in range(min(calls, _MAX_CALLS) - 1):
        if not runs[-1].under_way:
            break
        before = runs[-1].state()
        runs.append(_call(steps, pace, runs[-1]))
        if np.allclose(before, runs[-1].state(), rtol=0, atol=_STEADY * runs[-1].seconds):
            return runs[-1]
    if len(runs) < _MAX_CALLS:
        return runs[-1]
    return max(runs[len(runs) // 2 :], key=lambda run: run.seconds)  # a cycle: nothing is said to be faster than it may be


def _call(steps: Sequence[Step], pace: Pace, before: _Run | None) -> _Run:
    now = free = 0.0
    under_way: dict[int, tuple[float, Cause]] = {}
    if before is not None:
        free = before.engine_free - before.seconds
        under_way = {bundle: (at - before.seconds, cause) for bundle, (at, cause) in before.under_way.items()}
    copies: list[tuple[int, float, float, float]] = []
    stalls: list[tuple[int, float, float, Cause]] = []
    evictions: list[Eviction] = []
    for step, compute in zip(steps, pace.compute, strict=False):
        now += compute
        bundle = step.bundle
        if step.kind is Kind.PREFETCH:
            start = free if free > now else now
            copies.append((bundle, now, start, start + pace.copies[bundle][0]))
            under_way[bundle] = start + pace.copies[bundle][0], "space" if now > 0 and now >= free else "link"
            free = start + pace.copies[bundle][0]
        elif step.kind is Kind.ONLOAD:
            arrival, cause = under_way.pop(bundle, (now, "link"))
            if arrival > now:
                stalls.append((bundle, now, arrival, cause))
                now = arrival
        elif step.kind is Kind.EVICT:
            evictions.append(Eviction(bundle, now))
        elif step.kind is Kind.BANDS_END:
            free = max(free, now)
        elif free > now:
            stalls.append((BANDS, now, free, "link"))
            now = free
    return _Run(now + pace.compute[-1], free, under_way, copies, stalls, evictions)
