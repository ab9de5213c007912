"""The closed-form simulator against one that steps through every operator and every copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from planner.machine import Machine
from planner.schedule import Placement
from planner.solve.bundles import BundleSpan
from planner.solve.simulate import simulate
from tests.planner.problems import MACHINE, Case, cases


def stepped(seconds: np.ndarray, placements: list[Placement], machine: Machine) -> tuple[float, float]:
    """Operator by operator: issue its copies, wait for its bundles, run. Returns the end and how long it waited."""
    now = link = waited = 0.0
    arrival: dict[int, float] = {}
    for position, duration in enumerate(seconds):
        for index, placed in enumerate(placements):
            if placed.prefetch == position:
                link = max(link, now) + machine.link_latency_seconds + placed.span.nbytes / machine.link_bandwidth
                arrival[index] = link
        for index, placed in enumerate(placements):
            if placed.span.first == position and arrival[index] > now:
                waited += arrival[index] - now
                now = arrival[index]
        now += duration
    return now, waited


@given(cases())
def test_equals_a_stepping_simulator(case: Case) -> None:
    placements = list(case.placements)
    got = simulate(case.seconds, placements, MACHINE)
    end, waited = stepped(case.seconds, placements, MACHINE)
    assert got.step_seconds == pytest.approx(end, rel=1e-9)
    assert got.stall_seconds == pytest.approx(waited, rel=1e-9, abs=1e-12)
    assert got.copy_seconds == pytest.approx(sum(MACHINE.copy_seconds(p.span.nbytes) for p in placements))


@given(cases())
def test_never_below_the_physical_limit(case: Case) -> None:
    got = simulate(case.seconds, case.placements, MACHINE)
    last = max((p.span.last for p in case.placements), default=0)
    assert got.step_seconds >= case.seconds.sum() * (1 - 1e-12)
    assert got.step_seconds >= got.copy_seconds * (1 - 1e-12) or last == 0 or not case.placements


@given(cases())
def test_an_infinite_link_never_stalls(case: Case) -> None:
    fast = replace(MACHINE, link_bandwidth=1e30, link_latency_seconds=0.0)
    assert simulate(case.seconds, case.placements, fast).stall_seconds == pytest.approx(0, abs=1e-12)


def test_by_hand() -> None:
    machine = replace(MACHINE, link_bandwidth=1.0, link_latency_seconds=0.5)
    seconds = np.array([1.0, 1.0, 1.0])
    a, b = BundleSpan(("a",), 1, 1, 1), BundleSpan(("b",), 2, 2, 2)
    # a: 0 to 1.5, waited for at 1; b: 1.5 to 4, waited for at 2.5; then one more operator.
    got = simulate(seconds, (Placement(a, 0), Placement(b, 0)), machine)
    assert (got.step_seconds, got.stall_seconds, got.copy_seconds) == (5.0, 2.0, 4.0)
    got = simulate(seconds, (Placement(a, 1), Placement(b, 2)), machine)
    assert (got.step_seconds, got.stall_seconds) == (7.0, 4.0)
    assert simulate(seconds, (), machine).step_seconds == 3.0
