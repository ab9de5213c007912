"""The physical limit: what no schedule can beat on this machine within this budget."""

from __future__ import annotations

from dataclasses import dataclass

from planner.solve.homes import HostMemory
from planner.solve.problem import Problem


@dataclass(frozen=True)
class Bound:
    """`seconds` = max(compute, link, disk): all arithmetic once, and over the link what cannot stay on the device.

    Between two calls at most `budget - max activations` bytes of weights can be on the device while the largest operator
    runs, so at least the rest is copied in every call (design section 6 with K = 0, the weakest and so the safest form). Where
    the host's memory has a budget, what of that rest cannot be there is read from disk in every call.
    """

    compute_seconds: float
    link_seconds: float
    streamed_bytes: int
    read_bytes: int = 0
    disk_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.link_seconds, self.disk_seconds)

    @property
    def limited_by(self) -> str:
        if self.disk_seconds > max(self.compute_seconds, self.link_seconds):
            return "disk"
        return "link" if self.link_seconds > self.compute_seconds else "compute"


@dataclass(frozen=True)
class PipelineBound(Bound):
    """Sums over all calls; `seconds` takes the largest of the three for each."""

    total_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.total_seconds


def physical_bound(problem: Problem, budget_bytes: int, host: HostMemory | None = None) -> Bound:
    """The bound of one call within `budget_bytes` of the device and what `host` says of the host's memory."""
    room = max(0, budget_bytes - problem.most_activation_bytes - problem.memory.fixed_bytes)
    streamed = max(0, problem.total_weight_bytes - room)
    read = 0 if host is None else host.of(problem).least_read_of(streamed)
    link, disk = streamed / problem.machine.link_peak_bandwidth, read / problem.machine.disk_bandwidth
    return Bound(problem.compute_seconds, link, streamed, read, disk)
