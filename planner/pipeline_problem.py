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
from planner.pipeline_calls import Captured, Captures
from planner.pipeline_captured import ProgramOfCall
from planner.pipeline_parts import PartsOfCall
from planner.prepare import casting_for, tilings_of
from planner.pretend_device import Held
from planner.sizes import format_bytes
from planner.solve.casting import NO_CASTS
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
            # What the Python around parts reads is there as it is.
            casting = NO_CASTS if made.part else casting_for(self.root, made.program, own)
            tilings = tilings_of(made.program, own, casting)
            # Programs share the device: none is given a segment of its own.
            base = dataclasses.replace(tilings.base, pool=False)
            self._tilings[key] = dataclasses.replace(tilings, base=base)
        return self._tilings[key]


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """`programs` by member; `order`: for each of their calls in a run its member and phase.

    `outside_bytes`, `between_bytes`: for each of them what Python holds beside the program, and from the one before until then.
    `parted`: calls of components whose own Python runs, by their keys, with the members that are their `parts`, and the bytes
    that there are `within` them at most while nothing but that Python runs. `steps`: for each step of `run` the key of its
    member or of such a call, and its phase.
    """

    run: DryRun
    programs: Mapping[str, ProgramOfCall]
    order: tuple[tuple[str, int], ...]
    budget: PhasedBudget
    outside_bytes: tuple[int, ...]
    between_bytes: tuple[int, ...]
    memory: MemoryModel
    parted: Mapping[str, PartsOfCall]
    parts: Mapping[str, Mapping[str, str]]
    within_bytes: Mapping[str, int]
    steps: tuple[tuple[str, int], ...]

    @property
    def opaque(self) -> frozenset[str]:
        """The names of the weights that components' own Python reads."""
        return frozenset(name for call in self.parted.values() for names in call.opaque.values() for name in names)


def member_options(options: Options, made: ProgramOfCall, repeats: int = 1) -> MemberOptions:
    """What was declared for the pipeline, as of one member."""
    fields = {each.name: getattr(options, each.name) for each in dataclasses.fields(Options)}
    own = {"method": made.method, "args": made.args, "kwargs": made.kwargs, "repeats": repeats}
    return MemberOptions(**{**fields, **own}, prefix=made.path)


def problem_of(run: DryRun, options: Options, analyses: Analyses, *, spills: bool = False) -> PipelineProblem:
    """Captures and analyses what a dry run has recorded. `spills`: some weights come from disk, no call fetches for the next.

    Raises:
        PlannerError: a call cannot be captured or analysed, or a pattern of `keep` fits nothing.
    """
    made, order = analyses.captures.of_run(run, options)
    called = _Called.of(made)
    names = [n for each in called.programs.values() for w in each.program.weights.values() for n in (w.name, *w.aliases)]
    names += [name for each in called.parted.values() for weights in each.opaque.values() for name in weights]
    check_patterns(options.keep, names)
    phase_of = [number for number, phase in enumerate(run.phases) for _ in range(phase.times * len(phase.cycle))]
    memory = MemoryModel.of(options.device.partition(":")[0], options.machine.capability)
    sizes = _Sizes(run, memory, sum(each.exploration.left for each in called.parted.values()))
    before = [sizes.before(i) for i in range(len(order))]
    between, python = sizes.between(before, phase_of, len(run.phases))
    turns: list[_Turn] = []
    for i, (number, phase) in enumerate(zip(order, phase_of, strict=True)):
        own = sizes.turns(called, number, i, phase, before[i])
        turns += own
        between[phase] = max(between[phase], *(turn.between_bytes for turn in own[1:]), sizes.after(called, number, i))
    phases = [tuple(dict.fromkeys(turn.key for turn in turns if turn.phase == n)) for n in range(len(run.phases))]
    members = {}
    for key, program in called.programs.items():
        mine = [turn for turn in turns if turn.key == key]
        within = tuple(dict.fromkeys(turn.phase for turn in mine))
        alone = not spills and not program.part and len(within) == 1 and len(phases[within[0]]) == 1
        tilings = analyses.tilings(program, options, len(mine) if alone else 1)
        members[key] = Member(key, tilings, max(turn.outside_bytes for turn in mine), len(mine), within)
    budget = PhasedBudget(options.machine, members, phases, between, python, keep_all=not options.offload, spills=spills)
    return PipelineProblem(
        run,
        called.programs,
        tuple((turn.key, turn.phase) for turn in turns),
        budget,
        tuple(turn.outside_bytes for turn in turns),
        tuple(turn.between_bytes for turn in turns),
        memory,
        called.parted,
        called.parts,
        {
            key: max(sizes.after(called, number, i) for i, n in enumerate(order) if n == number)
            for number, key in enumerate(called.keys)
            if key in called.parted
        },
        tuple((called.keys[number], phase) for number, phase in zip(order, phase_of, strict=True)),
    )


def programs_of(made: Sequence[Captured]) -> list[ProgramOfCall]:
    """All programs of captured calls, those of parts in the place of their call."""
    return [program for each in made for program in (each.parts.values() if isinstance(each, PartsOfCall) else (each,))]


@dataclass(frozen=True)
class _Called:
    """Captured calls by their keys, in their order: `programs` are members, those of parts in the place of their call.

    `parts`: of every call in parts the keys of its members, by those of the exploration.
    """

    made: Sequence[Captured]
    keys: Sequence[str]
    programs: Mapping[str, ProgramOfCall]
    parted: Mapping[str, PartsOfCall]
    parts: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, made: Sequence[Captured]) -> _Called:
        """`unet.forward`; the second of a name is `unet.forward #2`."""
        seen: dict[str, int] = {}

        def unique(name: str) -> str:
            seen[name] = count = seen.get(name, 0) + 1
            return name if count == 1 else f"{name} #{count}"

        keys, programs, parted, parts = [], {}, {}, {}
        for each in made:
            key = unique(each.key)
            keys.append(key)
            if isinstance(each, ProgramOfCall):
                programs[key] = each
                continue
            parted[key] = each
            parts[key] = {own: unique(part.program.name) for own, part in each.parts.items()}
            programs |= {parts[key][own]: part for own, part in each.parts.items()}
        return cls(made, keys, programs, parted, parts)


@dataclass(frozen=True)
class _Turn:
    """A call of a member: what Python holds beside it, and from the one before until then."""

    key: str
    phase: int
    outside_bytes: int
    between_bytes: int


@dataclass(frozen=True)
class _Sizes:
    """What the pipeline's Python holds, on a memory that is the host's or not, as its allocator reserves it.

    `left`: bytes of tensors that components whose own Python runs hold for good.
    """

    run: DryRun
    memory: MemoryModel
    left: int

    def beside(self, step: int, own_bytes: int) -> int:
        """While that call runs, beside its arguments as the program counts them: `own_bytes`."""
        found = self.run.steps[step]
        more = self._bytes(found.arguments) - own_bytes
        if self.memory.device == "cuda":
            more = max(0, more)  # arguments may be on the host until the component moves them
        return max(0, self._bytes(found.held) + more) + self._weights

    def turns(self, called: _Called, number: int, step: int, phase: int, before: int) -> list[_Turn]:
        """The calls of members in a step; of parts as often as they are called at most, in the order of their first time."""
        made, key = called.made[number], called.keys[number]
        own = self.memory.round_activation(made.argument_bytes)
        if isinstance(made, ProgramOfCall):
            return [_Turn(key, phase, self.beside(step, own), before)]
        held, within = self.beside(step, own), self.after(called, number, step)
        found: list[_Turn] = []
        for part, member in called.parts[key].items():
            around = held + self.memory.reserved_alone(made.around_bytes(part))
            found += [_Turn(member, phase, around, within) for _ in range(made.calls(part))]
        return [dataclasses.replace(found[0], between_bytes=max(before, within)), *found[1:]]

    def after(self, called: _Called, number: int, step: int) -> int:
        """What there is at most while the own Python of a call runs between its parts; nothing where it is one program."""
        made = called.made[number]
        if isinstance(made, ProgramOfCall):
            return 0
        own = self.memory.round_activation(made.argument_bytes)
        return self.beside(step, own) + self.memory.fixed_bytes + self.memory.reserved_alone(made.python_bytes)

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
        """Those that Python itself reads, which it has on the device from then on; and what components have left."""
        return self.memory.reserved_alone(self.run.read_bytes) + self.memory.reserved_alone(self.left)

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
