"""The problem of a plan of a generation: its phases, what Python holds beside each, and the plan of each within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from passes.calibrate import calibrating
from passes.probe import Prober
from planner.host_budget import host_memory, module_tensors
from planner.memory import MemoryModel
from planner.options import Options, check_patterns
from planner.prepare import casting_for, tilings_of
from planner.progress import working
from planner.sizes import format_bytes
from planner.solve.decide import Schedule
from planner.solve.homes import HostMemory, ModuleTensor
from planner.solve.tilings import Tilings
from runtime.errors import InfeasibleBudget, PlannerError
from runtime.layout import Layout, align

if TYPE_CHECKING:
    from planner.frontends.transformers_rehearsal import Moment, Phase, Phases, Rehearsal
    from planner.plan import Plan


@dataclass(frozen=True, eq=False)
class GenerationProblem:
    """The phases of a `generate` call, each analysed: all that does not depend on the budget. `padded`: as was asked."""

    model: nn.Module
    options: Options
    known: Phases
    rehearsal: Rehearsal
    tilings: Mapping[str, Tilings]
    padded: bool | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.rehearsal.phases

    @property
    def tokens(self) -> int:
        """How many tokens are generated for each sequence if nothing ends it."""
        return sum(moment.calls for moment in self.rehearsal.moments.values())

    def moment(self, phase: Phase) -> Moment:
        return self.rehearsal.moments[phase.name]

    @property
    def alignment(self) -> int:
        """Of weights, and of the tensors of the cache."""
        return MemoryModel.of(self.options.device.partition(":")[0], self.options.machine.capability).weight_alignment

    def outside_bytes(self, name: str) -> int:
        """What is on the device besides the program of a phase and its inputs, while it runs."""
        return self.rehearsal.moments[name].outside_bytes + self._unread_bytes[name]

    def python_bytes(self, name: str) -> int:
        """What is on the device besides what a phase has loaded, until the next one runs."""
        return self.rehearsal.moments[name].python_bytes + self._unread_bytes[name]

    @cached_property
    def _unread_bytes(self) -> dict[str, int]:
        """Of the cache, what the program of each phase does not touch."""
        found, prefix = {}, self.rehearsal.shape.prefix
        for phase in self.phases:
            read = {weight.name for weight in phase.program.weights.values()}
            unread = [t.nbytes for n, t in phase.module.named_buffers() if n.startswith(prefix) and n not in read]
            found[phase.name] = sum(align(nbytes, self.alignment) for nbytes in unread)
        return found

    @cached_property
    def least(self) -> dict[str, int]:
        """The least budget in which each phase runs."""
        return {phase.name: _least(self, phase.name, self.tilings[phase.name]) for phase in self.phases}

    @property
    def minimum_bytes(self) -> int:
        return max(self.least.values())

    @cached_property
    def host(self) -> HostMemory | None:
        """What was declared of the host for all phases together; None where nothing was."""
        return host_memory(self.model, self.options)

    @cached_property
    def _tensors(self) -> tuple[ModuleTensor, ...]:
        """The model's own: the cache has no home on the host."""
        return module_tensors(self.model, None if self.options.folder is None else self.options.folder.weights)

    def options_of(self, phase: Phase, room: int, host: HostMemory | None = None) -> Options:
        """Those of a phase that has so many bytes to itself, and `host` of the host's memory where not all weights fit."""
        budget = dataclasses.replace(
            self.options.budget, device_bytes=room, host_bytes=None if host is None else host.budget_bytes
        )
        calls = self.moment(phase).calls
        repeats = calls if phase.name.startswith("decode") else 1
        own = dataclasses.replace(self.options, budget=budget, method=phase.name, args=(), kwargs=phase.kwargs, repeats=repeats)
        return dataclasses.replace(own, tensors=self._tensors, held=None if host is None else host.held)

    def peaks(self, plans: Mapping[str, Plan], which: str = "reserved_bytes") -> dict[str, int]:
        """The most bytes in the programs by their phases, and in Python after each as "after ..."."""
        peaks = {}
        for name, plan in plans.items():
            peaks[name] = self.outside_bytes(name) + int(getattr(plan, which))
            peaks[f"after {name}"] = self.python_bytes(name) + held_bytes(plan.layout)
        return peaks

    def for_machine(self, options: Options) -> GenerationProblem:
        """The same for the machine and device of the options."""
        return dataclasses.replace(self, options=options, tilings=_tilings(self.model, options, self.rehearsal))

    def infeasible(self) -> InfeasibleBudget:
        asked = self.options.budget.device_bytes
        name = max(self.least, key=lambda each: self.least[each])
        solver = self.tilings[name].minimum
        node = solver.problem.liveness.nodes[solver.minimum.peak_position].name
        shape, moment = self.rehearsal.shape, self.rehearsal.moments[name]
        return InfeasibleBudget(
            f"budget {format_bytes(asked)} ({asked} B); the least possible is {format_bytes(self.minimum_bytes)} "
            f"({self.minimum_bytes} B), at {node} of {name} (cache {format_bytes(shape.nbytes)} for "
            f"{shape.batch} x {shape.length} tokens, Python's tensors {format_bytes(moment.outside_bytes)}); "
            "what would help: a shorter prompt, a smaller max_new_tokens, a smaller batch, or prefill_chunk_size=128",
            budget_bytes=asked,
            minimum_bytes=self.minimum_bytes,
            node=node,
        )


def held_bytes(layout: Layout) -> int:
    """What a loaded program holds on the device between its calls."""
    between = sum(bundle.nbytes for bundle in layout.bundles if bundle.carried and bundle.offset is None)
    return layout.resident_bytes + layout.state_bytes + layout.staging_bytes + between


def _held(solver: Any, schedule: Schedule) -> int:
    resident: int = solver.resident_bytes([placed.span for placed in schedule.placements])
    return resident + schedule.staging_bytes


def prepare_generation(
    model: nn.Module, options: Options, known: Phases | None = None, padded: bool | None = None
) -> GenerationProblem:
    """Rehearses the call of the options and analyses its phases; those that are `known` are not captured again.

    Raises:
        PlannerError: a model or a call that is not planned. CaptureError: a phase cannot be captured.
    """
    from planner.frontends.transformers_rehearsal import Phases, refuse_no_phase

    if options.dynamic is not None:
        raise PlannerError(
            "dynamic= is for one program; a generation has several, and plans another length of the prompt anew by itself: "
            "leave dynamic= out"
        )
    kind = options.device.partition(":")[0]
    memory = MemoryModel.of(kind, options.machine.capability)
    with working(f"rehearsing {type(model).__name__}.generate"), calibrating(kind) as calibrator:
        prober = Prober(kind, options.machine.capability, calibrator) if kind != "accounting" else None
        known = Phases(model, memory) if known is None else known
        known.prober = prober
        try:
            rehearsal = known.rehearse(options.args, options.kwargs, padded=padded)
        finally:
            known.prober = None
    refuse_no_phase(rehearsal)
    names = [n for p in rehearsal.phases for w in p.program.weights.values() for n in (w.name, *w.aliases)]
    check_patterns(options.keep, names)
    return GenerationProblem(model, options, known, rehearsal, _tilings(model, options, rehearsal), padded)


def _tilings(model: nn.Module, options: Options, rehearsal: Rehearsal) -> dict[str, Tilings]:
    found = {}
    for phase in rehearsal.phases:
        calls = rehearsal.moments[phase.name].calls
        own = dataclasses.replace(options, repeats=calls if phase.name.startswith("decode") else 1)
        casting = casting_for(phase.module, phase.program, own)
        found[phase.name] = tilings_of(phase.program, own, casting, pool=False)
    return found


def plan_phases(problem: GenerationProblem) -> dict[str, Plan]:
    """The fastest plan of each phase for which everything fits the budget.

    Raises:
        InfeasibleBudget: the budget is too small for one of them.
    """
    if problem.options.budget.device_bytes < problem.minimum_bytes:
        raise problem.infeasible()
    plans = {phase.name: _plan_phase(problem, phase, problem.tilings[phase.name]) for phase in problem.phases}
    casts = max((plan.decisions.tiling.casts for plan in plans.values()), key=len)
    for phase in problem.phases:
        if set(plans[phase.name].decisions.tiling.casts) == set(casts):
            continue
        alike = dataclasses.replace(problem.tilings[phase.name], casts=casts)  # all phases see the same weights
        if _least(problem, phase.name, alike) <= problem.options.budget.device_bytes:
            plans[phase.name] = _plan_phase(problem, phase, alike)
    return plans


def _least(problem: GenerationProblem, name: str, tilings: Tilings) -> int:
    """The least budget in which a phase runs."""
    solver = tilings.minimum
    least = solver.minimum
    return max(problem.outside_bytes(name) + least.peak_bytes, problem.python_bytes(name) + _held(solver, least))


def _plan_phase(problem: GenerationProblem, phase: Phase, tilings: Tilings) -> Plan:
    """Within what is left beside what Python holds; requires that something is."""
    from planner.plan import Plan

    budget, python = problem.options.budget.device_bytes, problem.python_bytes(phase.name)
    least = tilings.minimum.minimum.peak_bytes
    room = budget - problem.outside_bytes(phase.name)
    for _ in range(2):
        plan = Plan(phase.module, problem.options_of(phase, room), tilings)
        over = python + held_bytes(plan.layout) - budget
        if over <= 0:
            return plan
        room = max(room - over, least)
    if budget - python >= least:  # what is held is part of a phase's own peak
        return Plan(phase.module, problem.options_of(phase, budget - python), tilings)
    solver = tilings.minimum
    return Plan(phase.module, problem.options_of(phase, room), tilings, solver.minimum.decisions(solver.problem))
