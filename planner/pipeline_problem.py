"""The problem of a pipeline's plan: its dry run as phases of members, each with its solvers. Nothing of it knows the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from planner.dry_run_calls import DryRun
from planner.memory import MemoryModel
from planner.options import Options, check_patterns
from planner.pipeline_calls import Captures, ProgramOfCall, argument_bytes
from planner.prepare import casting_for, tilings_of
from planner.pretend_device import Held
from planner.sizes import format_bytes
from planner.solve.phases import Member, PhasedBudget
from planner.solve.tilings import Tilings
from runtime.errors import InfeasibleBudget


@dataclass(frozen=True)
class MemberOptions(Options):
    """Of one member: the paths of its modules begin with that of its component."""

    prefix: str = ""

    def tile_of(self, path: str) -> Any:
        return super().tile_of(f"{self.prefix}.{path}".rstrip("."))


@dataclass(eq=False)
class Analyses:
    """Captured and analysed calls of one pipeline, kept from one dry run to the next."""

    root: nn.Module
    captures: Captures
    _tilings: dict[tuple[int, int], Tilings] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module) -> Analyses:
        return cls(root, Captures(root))

    def tilings(self, made: ProgramOfCall, options: Options, repeats: int) -> Tilings:
        """The solvers of a program that is called `repeats` times on end."""
        key = id(made), repeats  # captures keep it alive
        if key not in self._tilings:
            own = member_options(options, made, repeats)
            tilings = tilings_of(made.program, own, casting_for(self.root, made.program, own))
            # Programs share the device: none is given a segment of its own.
            base = dataclasses.replace(tilings.base, pool=False)
            self._tilings[key] = dataclasses.replace(tilings, base=base)
        return self._tilings[key]


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """`programs` by member; `order`: for each step of `run` its member and phase.

    `outside_bytes`, `between_bytes`: for each step what Python holds beside the program, and from the step before until then.
    """

    run: DryRun
    programs: Mapping[str, ProgramOfCall]
    order: tuple[tuple[str, int], ...]
    budget: PhasedBudget
    outside_bytes: tuple[int, ...]
    between_bytes: tuple[int, ...]
    memory: MemoryModel


def member_options(options: Options, made: ProgramOfCall, repeats: int = 1) -> MemberOptions:
    """What was declared for the pipeline, as of one member."""
    fields = {each.name: getattr(options, each.name) for each in dataclasses.fields(Options)}
    own = {"method": made.method, "args": made.args, "kwargs": made.kwargs, "repeats": repeats}
    return MemberOptions(**{**fields, **own}, prefix=made.path)


def problem_of(run: DryRun, options: Options, analyses: Analyses, *, seams: bool = True) -> PipelineProblem:
    """Captures and analyses what a dry run has recorded. `seams`: calls may fetch for the next one of the same program.

    Raises:
        PlannerError: a call cannot be captured or analysed, or a pattern of `keep` fits nothing.
    """
    made, order = analyses.captures.of_run(run)
    keys = _keys(made)
    names = [name for each in made for w in each.program.weights.values() for name in (w.name, *w.aliases)]
    check_patterns(options.keep, names)
    phase_of = [number for number, phase in enumerate(run.phases) for _ in range(phase.times * len(phase.cycle))]
    called = [(keys[number], phase) for number, phase in zip(order, phase_of, strict=True)]
    phases = [tuple(dict.fromkeys(key for key, phase in called if phase == n)) for n in range(len(run.phases))]
    memory = MemoryModel.of(options.device.partition(":")[0], options.machine.capability)
    sizes = _Sizes(run, memory)
    own = [memory.round_activation(argument_bytes(each)) for each in made]
    outside = tuple(sizes.beside(i, own[number]) for i, number in enumerate(order))
    members = {}
    for number, key in enumerate(keys):
        steps = [i for i, m in enumerate(order) if m == number]
        within = tuple(dict.fromkeys(phase_of[i] for i in steps))
        alone = seams and len(within) == 1 and len(phases[within[0]]) == 1
        tilings = analyses.tilings(made[number], options, len(steps) if alone else 1)
        members[key] = Member(key, tilings, max(outside[i] for i in steps), len(steps), within)
    before = tuple(sizes.before(i) for i in range(len(order)))
    between, python = sizes.between(before, phase_of, len(phases))
    budget = PhasedBudget(options.machine, members, phases, between, python, keep_all=not options.offload)
    return PipelineProblem(run, dict(zip(keys, made, strict=True)), tuple(called), budget, outside, before, memory)


def _keys(made: list[ProgramOfCall]) -> list[str]:
    """`unet.forward`; the second of a name is `unet.forward #2`."""
    seen: dict[str, int] = {}
    keys = []
    for each in made:
        seen[each.program.name] = count = seen.get(each.program.name, 0) + 1
        keys.append(each.program.name if count == 1 else f"{each.program.name} #{count}")
    return keys


@dataclass(frozen=True)
class _Sizes:
    """What the pipeline's Python holds, on a memory that is the host's or not, as its allocator reserves it."""

    run: DryRun
    memory: MemoryModel

    def beside(self, step: int, own_bytes: int) -> int:
        """While that call runs, beside its arguments as the program counts them: `own_bytes`."""
        found = self.run.steps[step]
        more = self._bytes(found.arguments) - own_bytes
        if self.memory.device == "cuda":
            more = max(0, more)  # arguments may be on the host until the component moves them
        return max(0, self._bytes(found.held) + more) + self._weights

    def before(self, step: int) -> int:
        """From the call before to that one."""
        return self._bytes(self.run.steps[step].between) + self._around

    def between(self, before: Sequence[int], phase_of: Sequence[int], count: int) -> tuple[list[int], int]:
        """At most between two calls of each phase, and outside of all of them."""
        inside, outside = [self._around] * count, self._bytes(self.run.last) + self._around
        for i, nbytes in enumerate(before):
            if i and phase_of[i] == phase_of[i - 1]:
                inside[phase_of[i]] = max(inside[phase_of[i]], nbytes)
            else:
                outside = max(outside, nbytes)
        return inside, outside

    @property
    def _around(self) -> int:
        return self.memory.fixed_bytes + self._weights

    @property
    def _weights(self) -> int:
        """Those that Python itself reads, which it has on the device from then on."""
        return self.memory.reserved_alone(self.run.read_bytes)

    def _bytes(self, held: Held) -> int:
        """Where the memory is the host's, so are all tensors."""
        if self.memory.device == "cuda":
            return self.memory.reserved_alone(held.device_bytes)
        return held.device_bytes + held.host_bytes


def infeasible_pipeline(problem: PipelineProblem, asked: int) -> InfeasibleBudget:
    """The error that says the least possible budget, at which call it is needed and for what."""
    shared, key, least = problem.budget, problem.budget.tightest(), problem.budget.minimum_bytes
    if key is None:
        place, made_of = f"the Python of {problem.run.name}", "tensors that it holds between the calls of its components"
    else:
        member = shared.members[key]
        own = member.tilings.minimum.minimum.peak_bytes
        held = f" + tensors of the pipeline {format_bytes(member.outside_bytes)}" if member.outside_bytes else ""
        place, made_of = key, f"the call itself {format_bytes(own)}{held}"
    return InfeasibleBudget(
        f"budget {format_bytes(asked)} ({asked} B); the least possible is {format_bytes(least)} ({least} B), at {place} "
        f"({made_of}); what would help: a smaller height, width or number of images, or components in a smaller dtype",
        budget_bytes=asked,
        minimum_bytes=least,
        node=place,
    )
