"""The physical limit: what no schedule can beat on this machine within this budget."""

from __future__ import annotations

from dataclasses import dataclass

from planner.solve.problem import Problem


@dataclass(frozen=True)
class Bound:
    """`seconds` = max(compute, link): all arithmetic once, and over the link what cannot stay on the device.

    Between two calls at most `budget - max activations` bytes of weights can be on the device while the largest operator
    runs, so at least the rest is copied in every call (design section 6 with K = 0, the weakest and so the safest form).
    """

    compute_seconds: float
    link_seconds: float
    streamed_bytes: int

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.link_seconds)

    @property
    def limited_by(self) -> str:
        return "link" if self.link_seconds > self.compute_seconds else "compute"


def physical_bound(problem: Problem, budget_bytes: int) -> Bound:
    """The bound of one call within `budget_bytes`."""
    room = max(0, budget_bytes - int(problem.activation_bytes.max()) - problem.memory.fixed_bytes)
    streamed = max(0, problem.total_weight_bytes - room)
    return Bound(problem.compute_seconds, streamed / problem.machine.link_peak_bandwidth, streamed)
