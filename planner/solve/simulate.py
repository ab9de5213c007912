"""The event simulator: what the engines of a machine do with an emitted program.

One compute engine and one first-in-first-out copy engine. A copy starts when the one before it is done and compute has come
to its prefetch; a bundle's memory is its own from its prefetch to its evict, whole; compute waits at an onload until its bundle
has arrived. Where weights live on disk there is a third, which reads in order. What it reads of a bundle comes in pieces: each
is read once the ring has room, whatever compute does, and its copy starts no sooner than it is read. Exactly that is what the
runtime does on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from passes.loop import loop_of
from passes.program import Program
from planner.machine import Machine
from planner.schedule import Placement
from planner.solve.homes import HostPlan
from runtime import ops
from runtime.executable import Pace, ReadPace
from runtime.layout import Read, align
from runtime.timeline import BANDS, Cause, Copy, DiskRead, Eviction, Stall, Timeline

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
    """A program as the engines see it: seconds of every operator, the steps between them in program order, bytes by bundle.

    `reads` come from disk, in order; `own_bytes` are what of each bundle does not. `ahead`: the next call's begin in this one.
    """

    seconds: np.ndarray
    steps: tuple[Step, ...]
    nbytes: tuple[int, ...]
    own_bytes: tuple[int, ...]
    reads: tuple[Read, ...] = ()
    ahead: bool = False

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
        layout, host = program.layout, program.layout.host
        nbytes = tuple(bundle.nbytes for bundle in layout.bundles)
        if host is None or not host.reads:
            return cls(np.array(durations), tuple(steps), nbytes, nbytes)
        held = set(host.held)
        own = tuple(sum(align(s.nbytes, layout.alignment) for s in b.slots if s.weight in held) for b in layout.bundles)
        return cls(np.array(durations), tuple(steps), nbytes, own, host.reads, host.ahead)

    @classmethod
    def placed(
        cls,
        seconds: np.ndarray,
        placements: Sequence[Placement],
        banded: Sequence[int] = (),
        host: HostPlan | None = None,
        ahead: bool = False,
    ) -> EngineProgram:
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
        steps, nbytes = tuple(step for _, step in keyed), tuple(p.span.nbytes for p in placements)
        if host is None or not host.read_bytes:
            return cls(seconds, steps, nbytes, nbytes)
        return cls(seconds, steps, nbytes, host.own_bytes, host.reads(placements), ahead)

    def pace(self, machine: Machine) -> Pace:
        """Seconds of compute before each step and behind the last one, and of every copy."""
        elapsed = np.concatenate([[0.0], np.cumsum(self.seconds)])
        marks = [0, *(step.position for step in self.steps), len(self.seconds)]
        compute = tuple(float(x) for x in np.diff(elapsed[marks]))
        copies = tuple(
            (machine.copy_seconds(own) if own else 0.0, nbytes) for own, nbytes in zip(self.own_bytes, self.nbytes, strict=True)
        )
        reads = tuple(
            ReadPace(r.bundle, r.nbytes, r.after, r.nbytes / machine.disk_bandwidth, machine.copy_seconds(r.nbytes))
            for r in self.reads
        )
        return Pace(compute, copies, reads, self.ahead)


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
    reads = tuple(DiskRead(bundle, nbytes, *times) for (bundle, nbytes, *_), times in zip(pace.reads, run.reads, strict=True))
    return Timeline(run.seconds, copies, tuple(Stall(*stall) for stall in run.stalls), tuple(run.evictions), reads)


def step_time(program: EngineProgram, machine: Machine, calls: int = 1) -> StepTime:
    """As `simulate`, the totals only."""
    pace = program.pace(machine)
    run = _steady(program.steps, pace, calls)
    stalled = sum(stop - start for _, start, stop, _ in run.stalls)
    copying = sum(pace.copies[bundle][0] for bundle, *_ in run.copies) + sum(read.copy_seconds for read in pace.reads)
    return StepTime(run.seconds, stalled, copying)


@dataclass(frozen=True)
class Beside:
    """What is different in a call that another program's follows.

    `skipped`: bundles that nobody needs again, whose prefetch is left out. `seconds`: of copies for whoever follows, by the
    number of prefetches behind which each is issued.
    """

    skipped: frozenset[int] = frozenset()
    seconds: Mapping[int, float] = field(default_factory=dict)


_NOTHING = Beside()


def phase_seconds(program: EngineProgram, machine: Machine, carried: Sequence[int], calls: int) -> float:
    """Of so many calls on end: the first copies what it expects from one before it, the last fetches nothing for another."""
    pace, free, under_way = program.pace(machine), 0.0, dict[int, tuple[float, Cause]]()
    for bundle in carried:
        free += pace.copies[bundle][0]
        under_way[bundle] = free, "link"
    run, total, simulated = Run.start(free, under_way), 0.0, min(calls, _MAX_CALLS)
    for number in range(simulated):
        last = number == simulated - 1
        if last:
            total += (calls - simulated) * run.seconds
        run = call_once(program.steps, pace, run, Beside(frozenset(carried)) if last else _NOTHING)
        total += run.seconds
    return total


@dataclass
class Run:
    """One call. `under_way`: bundles that no onload has waited for, with their arrival and what their copy had waited for.

    `links`: at its beginning and behind every prefetch the time, and until when the copy engine is busy with what came before.
    `beside_done`: when the last of the copies for whoever follows is over.
    """

    seconds: float
    engine_free: float
    under_way: dict[int, tuple[float, Cause]]
    copies: list[tuple[int, float, float, float]]
    stalls: list[tuple[int, float, float, Cause]]
    evictions: list[Eviction]
    reads: list[tuple[float, float]]
    sent: list[float]  # when the copy of each read was over
    links: list[tuple[float, float]]
    beside_done: float = 0.0

    @classmethod
    def start(cls, engine_free: float, under_way: dict[int, tuple[float, Cause]]) -> Run:
        """In place of a call before, which ends when the next one begins: what that one finds."""
        return cls(0.0, engine_free, under_way, [], [], [], [], [], [])

    def state(self) -> list[float]:
        """What the next call finds, in seconds from its beginning."""
        late = [arrival - self.seconds for _, (arrival, _) in sorted(self.under_way.items())]
        disk = [stop - self.seconds for _, stop in self.reads[-1:]] + [sent - self.seconds for sent in self.sent]
        return [max(0.0, x) for x in (self.engine_free - self.seconds, *late)] + disk


def _steady(steps: Sequence[Step], pace: Pace, calls: int) -> Run:
    runs = [call_once(steps, pace, None)]
    for _ in range(min(calls, _MAX_CALLS) - 1):
        if not runs[-1].under_way and not (pace.reads and pace.ahead):
            break
        before = runs[-1].state()
        runs.append(call_once(steps, pace, runs[-1]))
        if np.allclose(before, runs[-1].state(), rtol=0, atol=_STEADY * runs[-1].seconds):
            return runs[-1]
    if len(runs) < _MAX_CALLS:
        return runs[-1]
    return max(runs[len(runs) // 2 :], key=lambda run: run.seconds)  # a cycle: nothing is said to be faster than it may be


def call_once(steps: Sequence[Step], pace: Pace, before: Run | None, beside: Beside = _NOTHING) -> Run:
    """One call, which finds what the one `before` has left."""
    now = free = 0.0
    under_way: dict[int, tuple[float, Cause]] = {}
    disk = _Disk(pace, before)
    if before is not None:
        free = before.engine_free - before.seconds
        under_way = {bundle: (at - before.seconds, cause) for bundle, (at, cause) in before.under_way.items()}
    copies: list[tuple[int, float, float, float]] = []
    stalls: list[tuple[int, float, float, Cause]] = []
    evictions: list[Eviction] = []
    others = _Others(beside.seconds)
    free = others.issue(now, free)
    for step, compute in zip(steps, pace.compute, strict=False):
        now += compute
        bundle = step.bundle
        if step.kind is Kind.PREFETCH and bundle not in beside.skipped:
            start = free if free > now else now
            cause: Cause = "space" if now > 0 and now >= free else "link"
            free = start + pace.copies[bundle][0]
            if bundle in disk.pieces:
                start, free, late = disk.send(bundle, start, free)
                cause = "disk" if late else cause
            copies.append((bundle, now, start, free))
            under_way[bundle] = free, cause
        elif step.kind is Kind.ONLOAD:
            arrival, cause = under_way.pop(bundle, (now, "link"))
            if arrival > now:
                stalls.append((bundle, now, arrival, cause))
                now = arrival
        elif step.kind is Kind.EVICT:
            evictions.append(Eviction(bundle, now))
        elif step.kind is Kind.BANDS_END:
            free = max(free, now)
        elif step.kind is Kind.BANDS_BEGIN and free > now:
            stalls.append((BANDS, now, free, "link"))
            now = free
        if step.kind is Kind.PREFETCH:
            free = others.issue(now, free)
    end = now + pace.compute[-1]
    return Run(end, free, under_way, copies, stalls, evictions, disk.reads, disk.sent, others.links, others.done)


class _Others:
    """Copies for other programs in one call: `links` is as in `Run`, `done` when the last of them is over."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._seconds = seconds
        self.links: list[tuple[float, float]] = []
        self.done = 0.0

    def issue(self, now: float, free: float) -> float:
        """Behind so many prefetches as there were calls of this, less one; gives until when the copy engine is busy."""
        self.links.append((now, free))
        seconds = self._seconds.get(len(self.links) - 1)
        if seconds is None:
            return free
        self.done = max(free, now) + seconds
        return self.done


class _Disk:
    """The disk in one call: reads follow each other, each as soon as the ring has room for it."""

    def __init__(self, pace: Pace, before: Run | None) -> None:
        self._pace = pace
        self.pieces = pieces_of(pace)
        self.reads: list[tuple[float, float]] = []
        self.sent: list[float] = []
        # Without reads ahead the disk begins with the call, but not before the last one has given the ring back.
        since = 0.0 if before is None else before.seconds
        self._before = [sent - since for sent in before.sent] if before is not None else []
        self._free = before.reads[-1][1] - since if before is not None and before.reads and pace.ahead else 0.0

    def send(self, bundle: int, start: float, free: float) -> tuple[float, float, bool]:
        """The pieces of a bundle, behind what the copy engine does until `free`.

        Gives when its copy begins, which was to be at `start`, when it is over, and whether it had to wait for the disk.
        """
        late, begun = False, free > start
        for number in self.pieces[bundle]:
            read = self._pace.reads[number]
            room = self.sent[read.after] if read.after >= 0 else self._before[read.after] if self._before else self._free
            began = max(self._free, room)
            self._free = began + read.disk_seconds
            self.reads.append((began, self._free))
            if self._free > free:
                free, late = self._free, True
            start, begun = (start, True) if begun else (free, True)
            free += read.copy_seconds
            self.sent.append(free)
        return start, free, late


def pieces_of(pace: Pace) -> dict[int, list[int]]:
    """The numbers of the reads of every bundle that has any."""
    pieces: dict[int, list[int]] = {}
    for number, read in enumerate(pace.reads):
        pieces.setdefault(read.bundle, []).append(number)
    return pieces
