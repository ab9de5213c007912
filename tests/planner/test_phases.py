"""One budget over the phases of a pipeline: what is decided fits, the minimum is exact, more room is hardly ever worse."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planner import plan
from planner.machine import Machine
from planner.solve.decide import Solver
from planner.solve.phases import Member, PhasedBudget, arenas_of
from planner.solve.tilings import Tilings
from tests.planner.toys import Mlp, planned, x

CPU = Machine.preset("cpu")


@cache
def solver(hidden: int, repeats: int) -> Solver:
    return Solver(planned(Mlp(hidden), x())._solver.problem, repeats, pool=False)


@st.composite
def problems(draw: st.DrawFn) -> PhasedBudget:
    members, phases = {}, []
    for phase in range(draw(st.integers(1, 3))):
        keys = tuple(f"m{phase}{i}" for i in range(draw(st.sampled_from([1, 1, 2]))))
        calls = draw(st.integers(1, 4))
        for key in keys:
            own = solver(draw(st.sampled_from([4, 16, 48, 96])), calls if len(keys) == 1 else 1)
            members[key] = Member(key, Tilings(own), draw(st.integers(0, 9_000)), calls, (phase,))
        phases.append(keys)
    between = [draw(st.integers(0, 9_000)) for _ in phases]
    return PhasedBudget(CPU, members, phases, between, draw(st.integers(0, 9_000)), keep_all=draw(st.booleans()))


BUDGETS = st.floats(0, 1.3)


def budget_at(problem: PhasedBudget, share: float) -> int:
    least, most = problem.minimum_bytes, problem.unplanned_bytes
    return least + int(share * max(0, most - least))


@given(problems(), BUDGETS)
def test_what_is_decided_fits(problem: PhasedBudget, share: float) -> None:
    budget = budget_at(problem, share)
    shares = problem.solve(budget)
    assert max(problem.peaks(shares).values()) <= budget
    assert shares.keys() == problem.members.keys()
    assert all(one.schedule.peak_bytes <= one.budget_bytes for one in shares.values())


@given(problems())
def test_the_least_is_the_least(problem: PhasedBudget) -> None:
    least = problem.minimum_bytes
    assert problem.least_bytes(least) <= least
    assert problem.least_bytes(least - 1) == least
    assert max(problem.peaks(problem.solve(least)).values()) <= least


@given(problems())
def test_nothing_waits_where_there_is_room(problem: PhasedBudget) -> None:
    shares = problem.solve(10**9)
    arithmetic = sum(m.calls * m.solver.problem.compute_seconds for m in problem.members.values())
    assert problem.time(shares).step_seconds <= arithmetic * 1.006


@given(problems(), st.lists(BUDGETS, min_size=2, max_size=4))
def test_more_room_is_no_slower(problem: PhasedBudget, shares: list[float]) -> None:
    """But for what is not looked for, since it could not save more than a two-hundredth."""
    found = [problem.solve(budget_at(problem, share)) for share in sorted(shares)]
    seconds = [problem.time(one).step_seconds for one in found]
    assert all(b <= a * 1.006 for a, b in pairwise(seconds))


@pytest.mark.parametrize("bandwidth", [1e9, 2e9, 4e9, 1e10])
def test_room_that_is_not_needed_is_not_filled_before_the_first_call(bandwidth: float) -> None:
    """What comes while a call computes is not waited for; at some of these links a larger budget once took longer."""
    preset = Machine.preset("rtx-4090")
    machine = replace(
        preset, link_latency_seconds=1e-7, launch_seconds=1e-6, link_bandwidth=bandwidth, link_seconds=(), name="some link"
    )
    net = nn.Sequential(*(Mlp(256) for _ in range(8))).eval()
    made = Solver(plan(net, "1GB", inputs=(x(),), device="accounting", machine=machine)._solver.problem, 10, pool=False)
    problem = PhasedBudget(machine, {"m": Member("m", Tilings(made), 0, 10, (0,))}, [("m",)], [0], 0)
    budgets = [budget_at(problem, share) for share in (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1)]
    seconds = [problem.time(problem.solve(budget)).step_seconds for budget in budgets]
    assert all(b <= a * 1.006 for a, b in pairwise(seconds))


@given(st.sampled_from([4, 48]), st.integers(2, 4))
def test_members_with_the_same_residents_share_them(hidden: int, count: int) -> None:
    own = solver(hidden, 1)
    members = {f"m{i}": Member(f"m{i}", Tilings(own), 0, 1, (0,)) for i in range(count)}
    problem = PhasedBudget(CPU, members, [tuple(members)], [0], 0)
    shares = problem.solve(own.resident.peak_bytes)
    assert arenas_of(shares.values()) <= own.problem.total_weight_bytes
    assert problem.unplanned_bytes == own.resident.peak_bytes
    assert problem.time(shares).stall_seconds <= problem.machine.copy_seconds(own.problem.total_weight_bytes) * 1.001
