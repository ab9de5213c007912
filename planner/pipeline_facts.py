"""`PipelineFacts`: what is known of a plan of a pipeline. Bytes are on the device, seconds those of one call of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from planner.asked import Asked
from planner.bounds import Bound, PipelineBound, physical_bound
from planner.dry_run_calls import DryRun
from planner.pipeline_problem import PipelineProblem
from planner.pipeline_run import PipelineRun
from planner.plan import Plan
from planner.solve.early import Early
from planner.solve.homes import HostMemory
from planner.solve.phases import Member, MemberShare
from planner.solve.run import RunTime
from planner.solve.simulate import StepTime
from runtime.pipeline_programs import Stay


class PipelineFacts(Asked):
    """See `PipelinePlan`."""

    run: DryRun
    parts: dict[str, Plan]
    stays: dict[str, Stay]
    early: tuple[Early, ...]
    spills: bool
    _pipe: Any
    _problem: PipelineProblem
    _shares: Mapping[str, MemberShare]
    _calls: PipelineRun
    _host: HostMemory | None

    # What was asked.

    @property
    def target(self) -> Any:
        """The pipeline."""
        return self._pipe

    @property
    def title(self) -> str:
        return self.run.name

    # What was found.

    @cached_property
    def peak_bytes(self) -> int:
        """Predicted: the most bytes that are live, tensors of the pipeline's own Python included."""
        return max(self._peaks.values())

    @cached_property
    def _peaks(self) -> dict[str | None, int]:
        return self._calls.peaks(self._own_peaks, self.early)

    @property
    def _own_peaks(self) -> dict[str, int]:
        return {key: part.peak_bytes for key, part in self.parts.items()}

    @cached_property
    def reserved_bytes(self) -> int:
        """Predicted: the most that the device's allocator holds to serve them, which is what the budget bounds."""
        reserved = {key: part.reserved_bytes for key, part in self.parts.items()}
        return max(self._calls.peaks(reserved, self.early, reserved=True).values())

    @property
    def peak_at(self) -> str:
        """The call at which the peak is, with its operator; or the pipeline's own Python."""
        at = max(self._peaks, key=self._peaks.__getitem__)
        if self._peaks[at] > self._calls.peaks(self._own_peaks, ())[at]:
            return "weights that come early" if at is None else f"the last call of {at}, with weights that come early"
        return f"the Python of {self.title}" if at is None else f"{self.parts[at].peak_at} of {at}"

    @property
    def minimum_bytes(self) -> int:
        """The least budget that is feasible."""
        return self._problem.budget.minimum_bytes

    @property
    def unplanned_bytes(self) -> int:
        """Predicted with all components on the device and nothing tiled."""
        return self._problem.budget.unplanned_bytes

    @property
    def weight_bytes(self) -> int:
        """Of all weights that are read."""
        weights: dict[str, int] = {}
        for part in self.parts.values():
            weights |= part.program.bytes_by_name()
        return sum(weights.values())

    @property
    def time(self) -> StepTime:
        """Of all calls, simulated, and of the copies before them; what the pipeline's own Python takes is not known."""
        return self._time.time

    @cached_property
    def _time(self) -> RunTime:
        return self._calls.run.time(self.early)

    @property
    def saved_seconds(self) -> float:
        """How much longer the same plan would take if nothing came early."""
        return self._calls.run.time(()).time.step_seconds - self.step_seconds

    @property
    def step_seconds(self) -> float:
        return self.time.step_seconds

    @property
    def phases(self) -> tuple[tuple[str, ...], ...]:
        """The names of the parts in each phase of the run."""
        return tuple(self._problem.budget.phases)

    def early_bytes(self, early: Early) -> int:
        """Of the weights that come early, as they lie in memory."""
        return self._calls.run.members[early.of].span_bytes(early.weights)

    def seconds_of(self, key: str) -> float:
        """Of all calls of one part, the copies before them included."""
        return self._time.seconds[key]

    def calls_of(self, key: str) -> int:
        """How often it is called in one run."""
        return self._problem.budget.members[key].calls

    @property
    def read_bytes(self) -> int:
        """Of weights, from disk in one run; rows that are looked up are not known."""
        return self._calls.read_bytes

    @property
    def written_bytes(self) -> int:
        """Of weights, to disk by `build()`: what is neither in the host's memory nor in a checkpoint's files."""
        return max((part.homes.scratch_bytes for part in self.parts.values() if part.homes is not None), default=0)

    @property
    def held(self) -> Mapping[str, int] | None:
        """The weights in the host's memory, with their bytes; None where all are."""
        return next((share.host.held for share in self._shares.values() if share.host is not None), None)

    @property
    def members(self) -> Mapping[str, Member]:
        """The parts in their places, before anything is rewritten."""
        return self._problem.budget.members

    @property
    def called(self) -> tuple[str, ...]:
        """The component of each call of the run, in order."""
        return tuple(self._problem.programs[key].component for key, _ in self._problem.order)

    @property
    def opaque(self) -> Mapping[str, str]:
        """The calls of components that cannot be captured whole, with the reason; their own Python runs, and parts in it."""
        return {key: call.reason for key, call in self._problem.parted.items()}

    def held_beside(self, key: str) -> int:
        """Bytes that the pipeline's own Python holds while it runs, beside its arguments."""
        return self._problem.budget.members[key].outside_bytes

    def bytes_at(self, key: str) -> int:
        """Predicted: the most bytes that are live while it runs."""
        return self._peaks[key]

    @cached_property
    def bound(self) -> Bound:
        """As `bound_at` the budget."""
        return self.bound_at(self.budget_bytes)

    def bound_at(self, budget_bytes: int) -> Bound:
        """What no schedule can beat: of every call the arithmetic, or the copies of what cannot stay while it runs.

        Or the reads of what cannot be in the host's memory, if that call had it all.
        """
        host = HostMemory(self._host.budget_bytes) if self._host is not None and self.spills else None
        rooms = {key: budget_bytes - self.held_beside(key) for key in self.parts}
        each = [(self.calls_of(k), physical_bound(part.problem, rooms[k], host)) for k, part in self.parts.items()]
        return PipelineBound(
            sum(calls * own.compute_seconds for calls, own in each),
            sum(calls * own.link_seconds for calls, own in each),
            sum(calls * own.streamed_bytes for calls, own in each),
            sum(calls * own.read_bytes for calls, own in each),
            sum(calls * own.disk_seconds for calls, own in each),
            sum(calls * own.seconds for calls, own in each),
        )

    @property
    def bound_seconds(self) -> float:
        return self.bound.seconds

    @property
    def code(self) -> str:
        """The programs of all parts as Python; what is printed is what runs."""
        return "\n\n".join(f"# {key}, stays for: {self.stays[key]}\n{part.code}" for key, part in self.parts.items())
