"""`PlanFacts`: what was decided for one target and budget, and every number that is known of it."""

from __future__ import annotations

from functools import cached_property

import sympy
from torch import nn

from passes.dims import dim_symbol
from passes.program import Program
from planner.asked import Asked
from planner.bounds import Bound, physical_bound
from planner.dynamic_plan import check_sizes
from planner.gap import Gap
from planner.host_budget import given_homes, host_memory, refuse_full_disk, refuse_full_disk_on_cpu
from planner.options import Options
from planner.pipeline import emit_program, placements_of
from planner.prepare import infeasible
from planner.profile_ops import counts_of
from planner.sizes import format_bytes
from planner.solve.bands import band_bytes
from planner.solve.decide import Schedule, Solver
from planner.solve.decisions import UNTILED, Decisions
from planner.solve.homes import HostMemory, HostPlan
from planner.solve.problem import Problem
from planner.solve.simulate import EngineProgram, StepTime, simulate
from planner.solve.tilings import Tilings
from runtime.errors import PlanFileError
from runtime.layout import Layout
from runtime.timeline import Timeline


class PlanFacts(Asked):
    """What was asked, decided and found. Bytes are on the device, seconds those of one call."""

    def __init__(self, target: nn.Module, options: Options, tilings: Tilings, decisions: Decisions | None = None) -> None:
        self._target, self._options, self._tilings = target, options, tilings
        self._host = host_memory(target, options)
        if decisions is None:
            if options.budget.device_bytes < tilings.least_bytes(options.budget.device_bytes):
                raise infeasible(tilings, options.budget.device_bytes)
            solver, schedule = tilings.solve(options.budget.device_bytes, self._host)
            decisions = schedule.decisions(solver.problem)
        else:
            solver = tilings.of(decisions.tiling)
            schedule = solver.evaluate(placements_of(solver.problem, decisions), decisions.staging)
            schedule = given_homes(schedule, solver, self._host, decisions)
            if schedule.peak_bytes > options.budget.device_bytes:
                raise PlanFileError(
                    f"the decisions need {format_bytes(schedule.peak_bytes)} here, more than their budget of "
                    f"{format_bytes(options.budget.device_bytes)}; plan the model again"
                )
        if self._host is not None:
            refuse_full_disk(self._host, solver.problem, schedule)
        refuse_full_disk_on_cpu(solver.problem, target, options)
        self.decisions, self._solver = decisions, solver
        if solver.problem.in_symbols is not None:
            check_sizes(solver.problem, decisions, options.budget.device_bytes)
        self.emitted, self.proof = emit_program(
            solver.problem, decisions, options.budget.device_bytes, schedule.pools, self._host, options.repeats
        )
        self._schedule = schedule

    # What was asked.

    @property
    def target(self) -> nn.Module:
        return self._target

    @property
    def host(self) -> HostMemory | None:
        """What was declared of the host's memory; None where it has no budget."""
        return self._host

    @property
    def homes(self) -> HostPlan | None:
        """What of the weights is in the host's memory, and what is read from disk; None where that has no budget."""
        return self._schedule.host

    @property
    def problem(self) -> Problem:
        return self._solver.problem

    @property
    def tilings(self) -> Tilings:
        """The solvers of all ways to rewrite the program, `solver` that of the one that was decided, with its `schedule`."""
        return self._tilings

    @property
    def solver(self) -> Solver:
        return self._solver

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def program(self) -> Program:
        """As captured, before anything was decided."""
        return self._tilings.base.problem.program

    @property
    def layout(self) -> Layout:
        assert self.emitted.layout is not None
        return self.emitted.layout

    # What was found.

    @property
    def peak_bytes(self) -> int:
        """Predicted: the most bytes that are live, each rounded as the device's allocator rounds."""
        return self.proof.peak_bytes

    @property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """The dims that `dynamic=` named, as the symbols of `peak_bytes_expr`; empty for fixed sizes."""
        in_symbols = self.problem.in_symbols
        return {} if in_symbols is None else {name: dim_symbol(name) for name in in_symbols.dims.names}

    @property
    def reserved_bytes(self) -> int:
        """Predicted: the most that the device's allocator holds to serve them, which is what the budget bounds.

        On CUDA whole segments; the peak itself on `accounting`, which rounds nothing.
        """
        return self._schedule.peak_bytes

    @property
    def minimum_bytes(self) -> int:
        """The least budget that is feasible (reserved bytes)."""
        return self._tilings.minimum.minimum.peak_bytes

    @property
    def unplanned_bytes(self) -> int:
        """Predicted reserved bytes with everything resident and nothing tiled."""
        return self._tilings.of(UNTILED).resident.peak_bytes

    @property
    def untiled_seconds(self) -> float:
        """Arithmetic of one call, nothing tiled."""
        return self._tilings.of(UNTILED).problem.compute_seconds

    @cached_property
    def engines(self) -> EngineProgram:
        """The emitted program as the engines of the machine see it."""
        return EngineProgram.emitted(self.emitted, dict(zip(self.problem.names, self.problem.seconds.tolist(), strict=True)))

    @cached_property
    def timeline(self) -> Timeline:
        """The emitted program simulated on `machine`: copies, stalls with their cause, evictions."""
        return simulate(self.engines, self.machine, self._options.repeats)

    @cached_property
    def time(self) -> StepTime:
        """The totals of the timeline."""
        found = self.timeline
        return StepTime(found.step_seconds, found.stall_seconds, found.copy_seconds)

    @property
    def step_seconds(self) -> float:
        return self.time.step_seconds

    @property
    def cast_count(self) -> int:
        """How many weights are stored in a smaller type."""
        return len(self.decisions.tiling.casts)

    @property
    def cast_error(self) -> float:
        """The relative error of the result that the casts cause, estimated (`passes.noise`); 0.0 without casts."""
        return self._tilings.casting.error(self.decisions.tiling.casts)

    @property
    def profiled(self) -> tuple[int, int] | None:
        """Of how many of how many distinct operators the seconds were measured on the device; None without `profile=True`."""
        return counts_of([self.problem.profiled])

    @property
    def repeats(self) -> int:
        """How many calls follow each other; 1 for a plan in parts, which copies nothing over the seam between them."""
        return self._options.repeats

    @cached_property
    def bound(self) -> Bound:
        return self.bound_at(self.budget_bytes)

    def bound_at(self, budget_bytes: int) -> Bound:
        """What no schedule can beat within a budget."""
        return physical_bound(self.problem, budget_bytes, self._host)

    @property
    def bound_seconds(self) -> float:
        return self.bound.seconds

    @cached_property
    def gap(self) -> Gap:
        """How far the plan is from the limit, what sets that, and what more memory would buy."""
        return Gap(self._tilings, self._solver, self._schedule, self.timeline, self.budget_bytes, self._host)

    @property
    def title(self) -> str:
        """What was planned: class and method."""
        return self.program.name

    @property
    def weight_bytes(self) -> int:
        """Of all weights that are read."""
        return sum(w.nbytes for w in self.program.weights.values())

    @property
    def resident_bytes(self) -> int:
        """Of weights that stay on the device, state included, as they are aligned there."""
        return self.layout.resident_bytes + self.layout.state_bytes

    @property
    def streamed_bytes(self) -> int:
        """Of weights that are copied to the device in every call."""
        return self.layout.streamed_bytes

    @cached_property
    def band_bytes(self) -> int:
        """Of values that live on the host: what comes to the device in every call."""
        return band_bytes(self.problem.program)

    @property
    def bundle_count(self) -> int:
        """In how many copies they come."""
        return len(self.layout.bundles)

    @property
    def peak_parts(self) -> dict[str, int]:
        """What the peak is made of, in bytes, at the operator where it is."""
        node = self.proof.peak_node
        workspace = next((int(n.meta.get("workspace_bytes", 0)) for n in self.emitted.graph.nodes if n.name == node), 0)
        resident = self.layout.resident_bytes + self.layout.state_bytes
        fixed = self.problem.memory.fixed_bytes
        names = self.problem.names
        activations = int(self.problem.activation_bytes[names.index(node)]) - workspace if node in names else 0
        staging = self.proof.peak_bytes - resident - fixed - activations - workspace
        if node not in names:  # an input or a copy: whatever is not weights
            staging, activations = self.layout.staging_bytes, staging - self.layout.staging_bytes
        parts = {"resident weights": resident, "staging": staging, "activations": activations, "workspace": workspace}
        return {**parts, "libraries": fixed}
