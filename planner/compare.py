"""`p.compare()`: the plan beside what today's switches would do, and beside itself in the memory that each of them takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from planner.baselines import baselines
from planner.progress import working
from planner.sizes import format_bytes, format_seconds
from planner.solve.tilings import Tilings
from runtime.errors import PlannerError

if TYPE_CHECKING:
    from planner.plan import Plan

OURS = "vramplan"


@dataclass(frozen=True)
class Row:
    """One policy, simulated. Bytes are those that the device's allocator reserves at most, seconds those of one call.

    Attributes:
        bound_seconds: the physical bound within the policy's own peak: what nothing that takes this memory can beat.
        fits: whether the peak is within the budget that was asked for.
        ours_seconds: of this planner with that peak as the budget; None where it is below the least possible.
        note: what the policy came to on this program.
    """

    policy: str
    peak_bytes: int
    step_seconds: float
    bound_seconds: float
    fits: bool
    ours_seconds: float | None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Seconds over the bound."""
        return self.step_seconds / self.bound_seconds if self.bound_seconds else 1.0

    @property
    def speedup(self) -> float | None:
        """How many times faster this planner is in the same memory."""
        return None if not self.ours_seconds else self.step_seconds / self.ours_seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "speedup": self.speedup}


@dataclass(frozen=True)
class Comparison:
    """All policies for one program, machine and budget; the first row is the plan itself.

    `minimum_bytes`: the least that this planner can do with. `repeats`: how many calls follow each other.
    """

    program: str
    device: str
    machine: str
    budget_bytes: int
    minimum_bytes: int
    repeats: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with ratio and speedup of each row."""
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}

    def __str__(self) -> str:
        """A table of at most 100 columns."""
        calls = "1 call" if self.repeats == 1 else f"{self.repeats} calls"
        width = max(len(row.policy) for row in self.rows)
        lines = [
            f"{self.program} on {self.device}, planned for {self.machine}: budget {format_bytes(self.budget_bytes)}, {calls}",
            "All rows are simulated on the machine model; the baselines were not run, and nothing was measured.",
            "x bound: the step over the least that is physically possible within the row's own peak.",
            f"ours there: the step of {OURS} with the row's peak as its budget, and how much faster that is.",
            "",
            f"{'policy':<{width}}  {'peak':>8}  fits  {'step':>8}  {'x bound':>7}  {'ours there':>10}  {'faster':>7}",
        ]
        lines += [self._line(row, width) for row in self.rows]
        notes = [f"{row.policy}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def _line(self, row: Row, width: int) -> str:
        there, faster = "", ""
        if row.ours_seconds is None:
            there = "below ours"
        elif row.policy != OURS:
            there, faster = format_seconds(row.ours_seconds), f"{row.speedup or 1.0:.2f} x"
        cells = (
            f"{row.policy:<{width}}", f"{format_bytes(row.peak_bytes):>8}", f"{'yes' if row.fits else 'no':<4}",
            f"{format_seconds(row.step_seconds):>8}", f"{row.ratio:>7.2f}", f"{there:>10}", f"{faster:>7}",
        )  # fmt: skip
        return "  ".join(cells).rstrip()


def compare_policies(plan: Plan) -> Comparison:
    """Simulates all policies for the plan's program, and solves it again for the peak of each; nothing is emitted for that.

    Raises:
        PlannerError: the plan is one in parts; its parts can be compared.
    """
    tilings, budget, host = _tilings(plan), plan.budget_bytes, plan.host
    solver, least = tilings.base, plan.minimum_bytes
    bound = plan.bound_at(plan.reserved_bytes).seconds
    own = Row(OURS, plan.reserved_bytes, plan.step_seconds, bound, True, plan.step_seconds)
    rows = [own]
    with working(f"simulating what other policies would do with {plan.title}"):
        ours: dict[int, float] = {}
        for found in baselines(solver, plan.target, budget):
            peak = found.peak_bytes
            if peak >= least and peak not in ours:
                ours[peak] = tilings.solve(peak, host)[1].time.step_seconds
            rows.append(
                Row(found.policy, peak, found.step_seconds, found.bound_seconds, peak <= budget, ours.get(peak), found.note)
            )
    return Comparison(plan.title, plan.device, plan.machine.name, budget, least, solver.repeats, tuple(rows))


def _tilings(plan: Plan) -> Tilings:
    from planner.parted import PartedPlan

    if isinstance(plan, PartedPlan):
        some = next(iter(plan.parts), "")
        raise PlannerError(
            f"{plan.title} is planned in parts, and switches of today move whole modules: compare one of its parts, "
            f"p.parts[{some!r}].compare()"
        )
    return plan._tilings
