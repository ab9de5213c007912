"""How far a plan is from the limit, what sets the limit, and what more memory would buy."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from planner.bounds import Bound, physical_bound
from planner.sizes import format_bytes, format_seconds
from planner.solve.decide import Schedule, Solver
from planner.solve.homes import HostMemory
from planner.solve.share import SharedBudget, Shares
from planner.solve.tilings import Tilings
from runtime.timeline import Timeline

Resource = Literal["compute", "link", "disk", "memory"]
ONE_GB = 10**9
# Shares of the step below which a difference is not worth a word.
_SMALL = 0.01
# Bytes, latency and idleness sum up to the difference, so that one of the three is always above this.
_A_REASON = _SMALL / 4


@dataclass(frozen=True, repr=False)
class Gap:
    """The gap of one plan; `print(p.gap)` says what the plan's own text says of it.

    Attributes:
        tilings: of the plan's program. solver, schedule, budget_bytes: of the plan. timeline: its emitted program, simulated.
    """

    tilings: Tilings
    solver: Solver
    schedule: Schedule
    timeline: Timeline
    budget_bytes: int
    host: HostMemory | None = None

    def __str__(self) -> str:
        return _table(self.rows())

    def __repr__(self) -> str:
        return _short(self)

    @property
    def step_seconds(self) -> float:
        """One call, simulated."""
        return self.timeline.step_seconds

    @cached_property
    def physical(self) -> Bound:
        """Arithmetic once, and over the link what cannot stay on the device."""
        return physical_bound(self.solver.problem, self.budget_bytes, self.host)

    @cached_property
    def lp_seconds(self) -> float:
        """The linear program's bound: with memory at every operator, arrivals, and the seam between calls."""
        if not self.schedule.placements:
            return self.physical.compute_seconds
        relaxation = self.solver.relaxed(self.budget_bytes)
        return self.physical.seconds if relaxation is None else max(relaxation.seconds, self.physical.seconds)

    @property
    def resource(self) -> Resource:
        """What binds: compute; link or disk, which take longer; memory, which does not let copies go ahead."""
        if self.lp_seconds <= self.physical.compute_seconds * (1 + _SMALL):
            return "compute"
        if self.lp_seconds > self.physical.seconds * (1 + _SMALL):
            return "memory"
        return "disk" if self.physical.limited_by == "disk" else "link"

    @cached_property
    def seconds_with_more(self) -> float | None:
        """One call with one more GB; None where everything is on the device already."""
        if not self.schedule.placements:
            return None
        return min(self.tilings.solve(self.budget_bytes + ONE_GB, self.host)[1].time.step_seconds, self.step_seconds)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and texts, as `print(plan)` and `print(plan.gap)` show them.

        What more memory buys takes another solution, which takes long where the disk counts: there it is not printed.
        """
        rows = [("limit", self.describe_limit()), ("above it", self.why)]
        if self.schedule.host is None or not self.schedule.host.read_bytes:
            rows.append(("1 GB more", self.describe_more()))
        return [(label, text) for label, text in rows if text]

    def describe_limit(self) -> str:
        """What no schedule can beat, and what sets that."""
        setter = {
            "compute": "set by the compute",
            "link": "set by the link",
            "disk": "set by the disk",
            "memory": "set by the room that operators leave for copies, and by their order",
        }[self.resource]
        if self.step_seconds <= self.lp_seconds * (1 + _SMALL):
            return f"reached: no schedule takes less than {format_seconds(self.lp_seconds)}, {setter}"
        return f"no schedule takes less than {format_seconds(self.lp_seconds)}, {setter} (linear program)"

    @property
    def why(self) -> str:
        """Why the step is longer than the limit; empty where it is not."""
        step, machine = self.step_seconds, self.solver.problem.machine
        if step <= self.lp_seconds * (1 + _SMALL):
            return ""
        reasons = []
        extra = self.schedule.streamed_bytes - self.physical.streamed_bytes
        largest = max(placed.span.nbytes for placed in self.schedule.placements)
        rate, unused = machine.link_peak_bandwidth * step, self._unused_bytes
        if extra > _A_REASON * rate:
            said = f", and the allocator reserves {format_bytes(unused)} more than is live"
            reserved = said if unused > _A_REASON * rate else ""
            reasons.append(
                f"{format_bytes(extra)} are streamed beyond what the bound counts, since buffers (of up to "
                f"{format_bytes(largest)}) hold their room while they are filled and read{reserved}"
            )
        reads = 0 if self.schedule.host is None else self.schedule.host.read_bytes - self.physical.read_bytes
        if reads > _A_REASON * machine.disk_bandwidth * step:
            reasons.append(f"{format_bytes(reads)} are read beyond what the bound counts, since bundles and the ring take room")
        latency = self.schedule.time.copy_seconds - self.schedule.streamed_bytes / machine.link_peak_bandwidth
        if latency > _A_REASON * step:
            copies = len(self.schedule.placements)
            subject = "1 copy takes" if copies == 1 else f"{copies} copies take"
            reasons.append(f"{subject} {format_seconds(latency)} longer than at the link's full speed")
        if self.physical.limited_by == "link" and step - self.timeline.copy_seconds > _A_REASON * step:
            idle = format_seconds(step - self.timeline.copy_seconds)
            reasons.append(f"the link is idle for {idle}, with nothing to copy or no room to copy it to")
        if self.physical.limited_by == "disk":
            waits = max(0.0, step - (reads + self.physical.read_bytes) / machine.disk_bandwidth)
            reasons.append(f"the disk is idle for {format_seconds(waits)}, with no room in the ring to read to")
        if self.physical.limited_by == "compute":
            reasons.append(f"compute waits {format_seconds(self.timeline.stall_seconds)} for copies that cannot begin sooner")
        return "; ".join(reasons)

    @property
    def _unused_bytes(self) -> int:
        """Reserved by the device's allocator and never live all at once."""
        problem = self.solver.problem
        live = int((problem.activation_bytes + self.solver.weights_at(self.schedule)).max())
        return self.schedule.peak_bytes - problem.memory.fixed_bytes - live

    def describe_more(self) -> str:
        """What one more GB would buy."""
        return _more(self.step_seconds, self.seconds_with_more)


@dataclass(frozen=True, repr=False)
class PartedGap:
    """The gap of a plan in parts: its parts, and the copies between them. What Python takes is in none of it.

    The physical bound is the only one: it holds whatever runs in which order.
    """

    shared: SharedBudget
    shares: Shares
    physical: Bound
    budget_bytes: int

    def __str__(self) -> str:
        bound = f"{format_seconds(self.physical.seconds)}, set by the {self.resource}"
        return _table([("limit", f"nothing takes less than {bound}"), ("1 GB more", self.describe_more())])

    def __repr__(self) -> str:
        return _short(self)

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


def _table(rows: list[tuple[str, str]]) -> str:
    """Lines of at most 100 columns."""
    texts = [f"{label:<9} {text}" for label, text in rows]
    return "\n".join(textwrap.fill(text, 100, subsequent_indent=" " * 10, break_on_hyphens=False) for text in texts)


def _short(gap: Gap | PartedGap) -> str:
    """Not the fields: they hold the whole problem."""
    return f"<{type(gap).__name__}: {format_seconds(gap.step_seconds)}, the limit {format_seconds(gap.lp_seconds)}>"


def _more(step_seconds: float, more: float | None) -> str:
    if more is None:
        return "makes no difference: everything is on the device"
    saved = 1 - more / step_seconds
    return f"gives {format_seconds(more)} per step ({saved:.0%} less)" if saved >= 0.005 else "makes no difference"
