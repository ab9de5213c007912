"""One budget over several parts: what is kept fits, the minimum is exact, and more room is never worse."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.machine import Machine
from planner.solve.decide import Solver
from planner.solve.share import NOTHING, PartInPlace, SharedBudget
from tests.planner.toys import Mlp, planned, x

CPU = Machine.preset("cpu")


@cache
def solver(hidden: int) -> Solver:
    return planned(Mlp(hidden), x())._solver


RUNNING = st.sampled_from([frozenset({""}), frozenset({"", "a"}), frozenset({"", "a", "a.b"})])
MOMENTS = st.dictionaries(RUNNING, st.integers(0, 20_000), min_size=1)


@st.composite
def problems(draw: st.DrawFn) -> SharedBudget:
    hidden = draw(st.lists(st.sampled_from([4, 16, 48, 96]), max_size=4))
    parts = {f"p{i}": PartInPlace(solver(h), draw(MOMENTS), draw(st.integers(1, 3))) for i, h in enumerate(hidden)}
    weights = draw(st.dictionaries(st.sampled_from(["", "a", "a.b"]), st.integers(1, 9_000)))
    return SharedBudget(CPU, parts, draw(MOMENTS), weights, draw(st.booleans()))


def peak(problem: SharedBudget, budget_bytes: int) -> int:
    shares = problem.solve(budget_bytes)
    return problem.peak_bytes(shares, {key: share.schedule.peak_bytes for key, share in shares.parts.items()})


@given(problems(), st.floats(0, 1.5))
def test_what_is_decided_fits(problem: SharedBudget, share: float) -> None:
    least, most = problem.minimum_bytes, problem.unplanned_bytes
    budget = least + int(share * max(0, most - least))
    assert peak(problem, budget) <= budget
    for part in problem.solve(budget).parts.values():
        assert part.schedule.peak_bytes <= part.budget_bytes


@given(problems())
def test_everything_is_kept_where_there_is_room(problem: SharedBudget) -> None:
    shares = problem.solve(10**9)
    assert all(share.kept and not share.schedule.placements for share in shares.parts.values())
    assert shares.opaque == frozenset(problem.opaque_bytes)


@given(problems(), st.lists(st.floats(0, 1.2), min_size=2, max_size=4))
def test_more_room_is_never_slower(problem: SharedBudget, shares: list[float]) -> None:
    least, most = problem.minimum_bytes, problem.unplanned_bytes
    found = [problem.solve(least + int(share * max(0, most - least))) for share in sorted(shares)]
    seconds = [problem.time(one).step_seconds for one in found]
    assert all(a >= b for a, b in pairwise(seconds))


def test_modules_bring_their_weights_while_they_run() -> None:
    moments = {frozenset({""}): 100, frozenset({"", "a"}): 90}
    problem = SharedBudget(CPU, {}, moments, {"": 5, "a": 40})
    assert problem.python_need(NOTHING) == max(100 + 5, 90 + 45)
    assert problem.python_need(frozenset({"a"})) == max(100 + 5, 90 + 5) + 40
    assert problem.minimum_bytes == 135
    assert problem.unplanned_bytes == 145


def test_nothing_leaves_where_nothing_may() -> None:
    moments = {frozenset({""}): 10}
    problem = SharedBudget(CPU, {"p": PartInPlace(solver(48), moments, 1)}, moments, {"": 7}, keep_all=True)
    with pytest.raises(AssertionError):
        problem.solve(problem.minimum_bytes - 1)
    assert problem.solve(problem.minimum_bytes).parts["p"].kept
