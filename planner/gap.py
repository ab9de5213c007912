"""How far a plan is from the limit, what sets the limit, and what more memory would buy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from planner.bounds import Bound, physical_bound
from planner.sizes import format_bytes, format_seconds
from planner.solve.decide import Schedule, Solver
from planner.solve.share import SharedBudget, Shares
from runtime.timeline import Timeline

Resource = Literal["compute", "link", "memory"]
ONE_GB = 10**9
# Shares of the step below which a difference is not worth a word.
_SMALL = 0.01


@dataclass(frozen=True)
class Gap:
    """The gap of one plan.

    Attributes:
        solver, schedule, budget_bytes: of the plan. timeline: its emitted program, simulated.
    """

    solver: Solver
    schedule: Schedule
    timeline: Timeline
    budget_bytes: int

    @property
    def step_seconds(self) -> float:
        """One call, simulated."""
        return self.timeline.step_seconds

    @cached_property
    def physical(self) -> Bound:
        """Arithmetic once, and over the link what cannot stay on the device."""
        return physical_bound(self.solver.problem, self.budget_bytes)

    @cached_property
    def lp_seconds(self) -> float:
        """The linear program's bound: with memory at every operator, arrivals, and the seam between calls."""
        if not self.schedule.placements:
            return self.physical.compute_seconds
        relaxation = self.solver.relaxed(self.budget_bytes)
        return self.physical.seconds if relaxation is None else max(relaxation.seconds, self.physical.seconds)

    @property
    def resource(self) -> Resource:
        """What binds: compute; the link, whose copies take longer; memory, which does not let copies go ahead."""
        if self.lp_seconds <= self.physical.compute_seconds * (1 + _SMALL):
            return "compute"
        return "link" if self.lp_seconds <= self.physical.seconds * (1 + _SMALL) else "memory"

    @cached_property
    def seconds_with_more(self) -> float | None:
        """One call with one more GB; None where everything is on the device already."""
        if not self.schedule.placements:
            return None
        return min(self.solver.solve(self.budget_bytes + ONE_GB).time.step_seconds, self.step_seconds)

    @property
    def why(self) -> str:
        """Why the step is longer than the physical bound; empty where it is not."""
        step, bound = self.step_seconds, self.physical.seconds
        if step <= bound * (1 + _SMALL):
            return ""
        reasons = []
        if self.lp_seconds > bound * (1 + _SMALL):
            reasons.append(
                f"no schedule is faster than {format_seconds(self.lp_seconds)}, since activations leave too little room for "
                "copies ahead where they are largest"
            )
        extra = self.schedule.streamed_bytes - self.physical.streamed_bytes
        largest = max(placed.span.nbytes for placed in self.schedule.placements)
        if extra / self.solver.problem.machine.link_peak_bandwidth > _SMALL / 2 * step:
            reasons.append(
                f"{format_bytes(extra)} more than has to is streamed, for the room that buffers of up to "
                f"{format_bytes(largest)} take as a whole while they are filled and read"
            )
        latency = self.timeline.copy_seconds - self.schedule.streamed_bytes / self.solver.problem.machine.link_peak_bandwidth
        if latency > _SMALL / 2 * step:
            reasons.append(f"{len(self.schedule.placements)} copies cost {format_seconds(latency)} besides their bytes")
        idle = step - self.timeline.copy_seconds
        if bound > self.physical.compute_seconds and idle > _SMALL / 2 * step:
            reasons.append(f"the link is idle for {format_seconds(idle)}, while what it could fill is being read")
        if bound <= self.physical.compute_seconds:
            reasons.append(
                f"compute waits {format_seconds(self.timeline.stall_seconds)} for copies that memory lets begin no sooner"
            )
        return "; ".join(reasons)

    def describe_more(self) -> str:
        """What one more GB would buy."""
        return _more(self.step_seconds, self.seconds_with_more)


@dataclass(frozen=True)
class PartedGap:
    """The gap of a plan in parts: its parts, and the copies between them. What Python takes is in none of it.

    The physical bound is the only one: it holds whatever runs in which order.
    """

    shared: SharedBudget
    shares: Shares
    physical: Bound
    budget_bytes: int

    @property
    def step_seconds(self) -> float:
        """One call, simulated."""
        return self.shared.time(self.shares).step_seconds

    @property
    def lp_seconds(self) -> float:
        """As `physical`: no linear program goes over parts."""
        return self.physical.seconds

    @property
    def resource(self) -> Resource:
        """What binds: compute, or the link."""
        return "link" if self.physical.limited_by == "link" else "compute"

    @cached_property
    def seconds_with_more(self) -> float | None:
        """One call with one more GB; None where nothing is copied already."""
        if self.shared.time(self.shares).copy_seconds == 0:
            return None
        more = self.shared.solve(self.budget_bytes + ONE_GB)
        return min(self.shared.time(more).step_seconds, self.step_seconds)

    def describe_more(self) -> str:
        """What one more GB would buy."""
        return _more(self.step_seconds, self.seconds_with_more)


def _more(step_seconds: float, more: float | None) -> str:
    if more is None:
        return "nothing: everything is on the device"
    saved = 1 - more / step_seconds
    return f"{format_seconds(more)} per step ({saved:.0%} less)" if saved >= 0.005 else "nothing that could be noticed"
