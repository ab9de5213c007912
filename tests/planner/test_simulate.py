"""The event simulator against one that steps through every operator and every copy of call after call; and its invariants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.machine import Machine
from planner.schedule import Placement
from planner.solve.bundles import BundleSpan
from planner.solve.simulate import EngineProgram, simulate, step_time
from runtime.devices.virtual_clock import VirtualClock
from runtime.timeline import Timeline
from tests.planner.problems import MACHINE, Case, cases, seam_cases

CALLS = 40


def stepped(seconds: np.ndarray, placements: Sequence[Placement], machine: Machine) -> list[tuple[float, float]]:
    """Call by call, operator by operator: issue its copies, wait for its bundles, run. Per call how long it took and waited."""
    now = link = 0.0
    # What the first call is to find was copied before it began.
    arrival = {index: 0.0 for index, placed in enumerate(placements) if placed.carried}
    calls = []
    for _ in range(CALLS):
        began, waited = now, 0.0
        for position, duration in enumerate(seconds):
            for carried in (False, True):
                for index, placed in enumerate(placements):
                    if placed.prefetch == position and placed.carried == carried:
                        link = max(link, now) + machine.copy_seconds(placed.span.nbytes)
                        if not carried:
                            arrival[index] = link
                        else:
                            arrival[-1 - index] = link
            for index, placed in enumerate(placements):
                if placed.span.first == position and arrival[index] > now:
                    waited += arrival[index] - now
                    now = arrival[index]
            now += duration
        arrival |= {-1 - index: at for index, at in arrival.items() if index < 0}
        calls.append((now - began, waited))
    return calls


def simulated(case: Case, machine: Machine = MACHINE, calls: int = CALLS) -> Timeline:
    return simulate(EngineProgram.placed(case.seconds, case.placements), machine, calls)


@given(cases())
def test_equals_a_stepping_simulator(case: Case) -> None:
    got = simulated(case, calls=1)
    end, waited = stepped(case.seconds, case.placements, MACHINE)[0]
    assert got.step_seconds == pytest.approx(end, rel=1e-9)
    assert got.stall_seconds == pytest.approx(waited, rel=1e-9, abs=1e-12)
    assert got.copy_seconds == pytest.approx(sum(MACHINE.copy_seconds(p.span.nbytes) for p in case.placements))


@given(seam_cases())
def test_the_steady_state_over_the_seam(case: Case) -> None:
    got = simulated(case)
    calls = stepped(case.seconds, case.placements, MACHINE)
    mean = sum(seconds for seconds, _ in calls[CALLS // 2 :]) / (CALLS - CALLS // 2)
    assert got.step_seconds == pytest.approx(mean, rel=1e-6)
    assert simulated(case, calls=1).step_seconds == pytest.approx(calls[0][0], rel=1e-9)


@given(seam_cases(), st.integers(1, 4))
def test_totals_are_those_of_the_timeline(case: Case, calls: int) -> None:
    found, totals = simulated(case, calls=calls), step_time(EngineProgram.placed(case.seconds, case.placements), MACHINE, calls)
    assert totals.step_seconds == found.step_seconds
    assert totals.stall_seconds == pytest.approx(found.stall_seconds)
    assert totals.copy_seconds == pytest.approx(found.copy_seconds)


@given(seam_cases())
def test_invariants(case: Case) -> None:
    found = simulated(case)
    # No engine does two things at once, and copies keep their order.
    for a, b in pairwise(found.copies):
        assert a.stop <= b.start
    for a, b in pairwise(found.stalls):
        assert a.stop <= b.start
    # The step is what operators take and what compute waits.
    assert found.step_seconds == pytest.approx(case.seconds.sum() + found.stall_seconds)
    # Every wait has a cause: the copy that arrives when it ends, of this call or of the one before.
    arrivals = [copy.stop for copy in found.copies] + [copy.stop - found.step_seconds for copy in found.copies]
    for stall in found.stalls:
        assert stall.start < stall.stop
        assert any(stall.stop == pytest.approx(arrival, abs=1e-6) for arrival in arrivals)
        assert stall.cause in ("link", "space")
    # No copy begins before its memory is free: compute has come to its prefetch.
    assert all(copy.start >= copy.issued for copy in found.copies)
    assert len(found.copies) == len(found.evictions) == len(case.placements)


@given(seam_cases())
def test_never_below_the_physical_limit(case: Case) -> None:
    got = simulated(case)
    assert got.step_seconds >= case.seconds.sum() * (1 - 1e-9)
    assert got.step_seconds >= got.copy_seconds * (1 - 1e-6)


@given(seam_cases(), st.floats(1.0, 10.0))
def test_a_faster_link_is_never_slower(case: Case, factor: float) -> None:
    fast = replace(MACHINE, link_bandwidth=MACHINE.link_bandwidth * factor)
    assert simulated(case, fast).step_seconds <= simulated(case).step_seconds * (1 + 1e-9)


@given(seam_cases())
def test_an_infinite_link_never_stalls(case: Case) -> None:
    fast = replace(MACHINE, link_bandwidth=1e30, link_latency_seconds=0.0)
    assert simulated(case, fast).stall_seconds == pytest.approx(0, abs=1e-12)


@given(seam_cases())
def test_a_virtual_clock_that_is_driven_says_the_same(case: Case) -> None:
    program = EngineProgram.placed(case.seconds, case.placements)
    clock = VirtualClock(program.pace(MACHINE))
    act = (clock.evict, clock.copy, clock.wait)
    timelines = []
    for _ in range(3):
        clock.begin()
        for step in program.steps:
            act[step.kind](step.bundle)
        timelines.append(clock.end())
    assert timelines[0] == simulate(program, MACHINE, 1)
    if timelines[1].step_seconds == timelines[2].step_seconds:
        steady = simulate(program, MACHINE, CALLS)
        assert timelines[2].step_seconds == pytest.approx(steady.step_seconds)
        assert len(timelines[2].order()) == len(steady.order())


def test_by_hand() -> None:
    machine = replace(MACHINE, link_bandwidth=1.0, link_latency_seconds=0.5)
    seconds = np.array([1.0, 1.0, 1.0])
    a, b = BundleSpan(("a",), 1, 1, 1), BundleSpan(("b",), 2, 2, 2)

    def run(*placements: Placement, calls: int = 1) -> Timeline:
        return simulate(EngineProgram.placed(seconds, placements), machine, calls)

    # a: 0 to 1.5, waited for at 1; b: 1.5 to 4, waited for at 2.5; then one more operator.
    got = run(Placement(a, 0), Placement(b, 0))
    assert (got.step_seconds, got.stall_seconds, got.copy_seconds) == (5.0, 2.0, 4.0)
    assert [(s.bundle, s.cause) for s in got.stalls] == [(0, "link"), (1, "link")]
    got = run(Placement(a, 1), Placement(b, 2))
    assert (got.step_seconds, got.stall_seconds) == (7.0, 4.0)
    assert [(s.bundle, s.cause) for s in got.stalls] == [(0, "space"), (1, "space")]
    assert got.order() == [("copy", 0), ("arrival", 0), ("evict", 0), ("copy", 1), ("arrival", 1), ("evict", 1)]
    assert run().step_seconds == 3.0
    # Over the seam `a` comes while the last operator runs: 1 of its 1.5 seconds is hidden, and a second by the first operator.
    got = run(Placement(a, 2), Placement(b, 1), calls=9)
    assert got.step_seconds == pytest.approx(4.5)
