"""`p.frontier()`: the step against the budget, from the least that is possible to everything resident."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.bounds import physical_bound
from planner.compare import Row, compare_policies
from planner.progress import working
from planner.sizes import format_bytes, format_seconds, parse_size
from planner.solve.decide import Schedule, Solver
from planner.solve.problem import Problem
from planner.solve.share import Shares
from runtime.errors import PlannerError

if TYPE_CHECKING:
    from planner.parted import PartedPlan
    from planner.plan import Plan

POINTS = 12
# How many budgets the physical bound is computed for.
_BOUND_POINTS = 200


@dataclass(frozen=True)
class Point:
    """One budget. `reserved_bytes`, `step_seconds` and `streamed_bytes` are None where it is below the least possible.

    `bound_seconds`: the physical bound within the budget. `streamed_bytes`: copied to the device in every call.
    """

    budget_bytes: int
    reserved_bytes: int | None
    step_seconds: float | None
    bound_seconds: float
    streamed_bytes: int | None

    @property
    def feasible(self) -> bool:
        return self.step_seconds is not None

    @property
    def ratio(self) -> float | None:
        """Seconds over the bound."""
        if self.step_seconds is None:
            return None
        return self.step_seconds / self.bound_seconds if self.bound_seconds else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Frontier:
    """What every budget buys: predicted, on one machine model.

    Attributes:
        minimum_bytes: the least feasible budget. resident_bytes: from this one on everything stays on the device.
        budget_bytes: the plan's own budget; None where none was asked for.
        rows: by budget, the smallest first. Seconds never increase.
        bound: the physical bound as a curve, (budget in bytes, seconds).
        baselines: what other policies take and how fast they are (`compare=True`); the first is the plan itself.
    """

    program: str
    device: str
    machine: str
    repeats: int
    minimum_bytes: int
    resident_bytes: int
    budget_bytes: int | None
    rows: tuple[Point, ...]
    bound: tuple[tuple[int, float], ...]
    baselines: tuple[Row, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; rows with their ratio to the bound."""
        rows, others = [row.to_json() for row in self.rows], [row.to_json() for row in self.baselines]
        return {**asdict(self), "rows": rows, "baselines": others}

    def plot(self, path: str | Path) -> None:
        """Writes the curve as an image (png, svg or pdf, by the name's ending), atomically.

        Raises:
            PlannerError: the image cannot be written there, or not in that format.
        """
        from planner.frontier_plot import write_frontier  # matplotlib takes a second to import

        write_frontier(self, Path(path))

    def __str__(self) -> str:
        """A table of at most 100 columns; `*` marks the plan's own budget."""
        calls = "1 call" if self.repeats == 1 else f"{self.repeats} calls"
        lines = [
            f"{self.program} on {self.device}, planned for {self.machine}, {calls}; predicted",
            f"  the least budget is {format_bytes(self.minimum_bytes)}; "
            f"everything stays on the device from {format_bytes(self.resident_bytes)} on",
            "",
            f"  {'budget':>8}  {'reserved':>8}  {'streamed':>8}  {'step':>8}  {'bound':>8}  {'x bound':>7}",
        ]
        lines += [self._line(row) for row in self.rows]
        if self.baselines:
            width = max(len(row.policy) for row in self.baselines)
            lines += ["", "  other policies, simulated on the same machine model and not measured"]
            lines += [
                f"  {row.policy:<{width}}  {format_bytes(row.peak_bytes):>8}  {format_seconds(row.step_seconds):>8}"
                for row in self.baselines[1:]
            ]
        return "\n".join(lines)

    def _line(self, row: Point) -> str:
        mark = "*" if row.budget_bytes == self.budget_bytes else " "
        budget = f"{mark} {format_bytes(row.budget_bytes):>8}"
        if row.reserved_bytes is None or row.streamed_bytes is None or row.step_seconds is None or row.ratio is None:
            missing = format_bytes(self.minimum_bytes - row.budget_bytes)
            return f"{budget}  infeasible: {missing} below the least, {self.minimum_bytes} B"
        cells = (
            budget, f"{format_bytes(row.reserved_bytes):>8}", f"{format_bytes(row.streamed_bytes):>8}",
            f"{format_seconds(row.step_seconds):>8}", f"{format_seconds(row.bound_seconds):>8}", f"{row.ratio:>7.2f}",
        )  # fmt: skip
        return "  ".join(cells)


def frontier_of(
    plan: Plan, budgets: Iterable[int | str] | None = None, points: int = POINTS, *, compare: bool = False, marked: bool = True
) -> Frontier:
    """Solves the plan's problem for many budgets. Nothing is emitted or checked: that is for the plan of one budget.

    Args:
        budgets: bytes or sizes such as "6GB"; by default `points` of them, evenly from the least to all resident, and the
            plan's own. One that is infeasible becomes a row that says so.
        compare: whether other policies are simulated too.
        marked: whether the plan's own budget means anything.

    Raises:
        PlannerError: fewer than two points, or a budget that is no size.
    """
    low, high = plan.minimum_bytes, max(plan.minimum_bytes, plan.unplanned_bytes)
    own = plan.budget_bytes if marked else None
    asked = _evenly(low, high, points, own) if budgets is None else _parsed(budgets)
    solve = _solver(plan)
    with working(f"solving {plan.title} for {len(asked)} budgets"):
        solved = [(budget, None if budget < low else solve(budget)) for budget in asked]
    problems = list(dict.fromkeys(found.problem for _, found in solved if found is not None and found.problem is not None))

    def bound_at(budget: int, problem: Problem | None = None) -> float:
        """Of a tiling; of all that are used, where none is named: each has bytes of its own that no weight can take."""
        if not problems:
            return plan.bound_at(budget).seconds
        return min(physical_bound(p, budget, plan.host).seconds for p in ([problem] if problem is not None else problems))

    rows = tuple(_point(budget, found, bound_at(budget, found.problem if found else None)) for budget, found in solved)
    curve = np.linspace(min(low, asked[0]), max(high, asked[-1]), _BOUND_POINTS).astype(np.int64).tolist()
    return Frontier(
        plan.title, plan.device, plan.machine.name, plan.repeats, low, high, own, rows,
        tuple((budget, bound_at(budget)) for budget in curve),
        compare_policies(plan).rows if compare else (),
    )  # fmt: skip


@dataclass(frozen=True)
class _Solved:
    """What a budget gives; `problem` is that of the tiling, None for a plan in parts."""

    reserved_bytes: int
    step_seconds: float
    streamed_bytes: int
    problem: Problem | None = None


_Solve = Callable[[int], _Solved]


def _point(budget_bytes: int, found: _Solved | None, bound_seconds: float) -> Point:
    if found is None:
        return Point(budget_bytes, None, None, bound_seconds, None)
    return Point(budget_bytes, found.reserved_bytes, found.step_seconds, bound_seconds, found.streamed_bytes)


def _solver(plan: Plan) -> _Solve:
    from planner.parted import PartedPlan

    if isinstance(plan, PartedPlan):
        return lambda budget: _solve_parts(plan, budget)

    def solve(budget_bytes: int) -> _Solved:
        solver, schedule = plan._tilings.solve(budget_bytes, plan.host)
        return _Solved(schedule.peak_bytes, schedule.time.step_seconds, _copied_bytes(solver, schedule), solver.problem)

    return solve


def _solve_parts(plan: PartedPlan, budget_bytes: int) -> _Solved:
    shared = plan._parted.shared
    shares = shared.solve(budget_bytes)
    reserved = shared.peak_bytes(shares, {key: share.schedule.peak_bytes for key, share in shares.parts.items()})
    return _Solved(reserved, shared.time(shares).step_seconds, _streamed_bytes(plan, shares))


def _streamed_bytes(plan: PartedPlan, shares: Shares) -> int:
    """As `PartedPlan.streamed_bytes`, of schedules that were not emitted."""
    shared = plan._parted.shared
    streamed = sum(n for path, n in shared.opaque_bytes.items() if path not in shares.opaque)
    for key, share in shares.parts.items():
        part = shared.parts[key]
        own = _copied_bytes(part.solver, share.schedule)
        if not share.kept:  # what its schedule keeps comes once in every call
            streams = {w for placed in share.schedule.placements for w in placed.span.weights}
            own += sum(w.nbytes for key, w in part.solver.problem.program.weights.items() if not w.state and key not in streams)
        streamed += part.calls * own
    return streamed


def _copied_bytes(solver: Solver, schedule: Schedule) -> int:
    """Without what aligns them, as `Plan.streamed_bytes`."""
    weights = solver.problem.program.weights
    return sum(weights[w].nbytes for placed in schedule.placements for w in placed.span.weights)


def _evenly(low: int, high: int, points: int, own: int | None) -> list[int]:
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise PlannerError(f"points={points!r}: a frontier has at least its two ends; write points={POINTS}")
    budgets = set(np.linspace(low, high, points).astype(np.int64).tolist()) | {low, high}
    return sorted(budgets | ({own} if own is not None else set()))


def _parsed(budgets: Iterable[int | str]) -> list[int]:
    if isinstance(budgets, (str, int)):
        budgets = [budgets]
    found = sorted({parse_size(budget, "budgets") for budget in budgets})
    if not found:
        raise PlannerError('no budgets; write budgets=["4GB", "6GB"], or leave them out for evenly spaced ones')
    return found
