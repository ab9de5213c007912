"""Untiled or tiled, and how finely: the program in several tilings, each solved for the budget, and the fastest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from passes.cast_weights import Cast
from passes.program import Program, module_path, operator_name, tensors_of
from passes.tile_rules.base import rule_of
from planner.bounds import physical_bound
from planner.conv_layouts import Layouts
from planner.sizes import format_bytes
from planner.solve.casting import NO_CASTS, Casting
from planner.solve.decide import Schedule, Solver
from planner.solve.decisions import UNTILED, Tiling
from planner.solve.homes import HostMemory
from planner.solve.levels import NONE, Freedom, Levels
from planner.solve.problem import Problem
from planner.solve.rewriting import Rewriting
from planner.solve.search import NEAR
from planner.solve.unrolling import Slicing, slicing_of
from runtime.errors import InfeasibleBudget

# What a tiling needs in the end may be less than its cap by this share.
_BELOW = 0.75
# A tiling whose arithmetic alone takes so many times the best step found ends the search: lower caps only add to it.
_HOPELESS = 1.05
# A step that takes no more than this beyond the arithmetic of the coarsest tiling is not improved.
_PERFECT = 1.001
# In a program of more operators tilings are looked for only where they could save more than this share of a step.
_LARGE = 1000
_LITTLE = 1.1
# Steps that take no more than so many times the shortest are as good.
_ENOUGH = 1.01
# As many casts are tried as save so many times what is copied while operators wait for copies.
_SHARES = (1.5, 3.0)

Found = tuple[Solver, Schedule]


@dataclass(frozen=True, eq=False)
class Branch:
    """The tilings that go on from one rewriting of the canonical program, whose problem is `start`.

    `of` gives the solver of a tiling, `build` analyses a rewritten program.
    """

    rewriting: Rewriting
    start: Problem
    of: Callable[[Tiling], Solver]
    build: Callable[[Program, Tiling], Problem] | None
    freedom: Freedom

    @property
    def base(self) -> Solver:
        """Nothing in tiles."""
        return self.of(self.start.tiling)

    @cached_property
    def minimum(self) -> Solver:
        """The solver with the schedule of least memory."""
        options = list(self.coarse())
        if self.levels is not None:
            options += [self.of(tiling) for _, tiling in deque(self.levels, maxlen=1)]
        return min(options, key=lambda solver: solver.minimum.peak_bytes)

    def least_bytes(self, budget_bytes: int) -> int:
        """The least feasible budget where it is above `budget_bytes`; else some feasible one, without looking further."""
        for solver in self.candidates(budget_bytes):
            if solver.minimum.peak_bytes <= budget_bytes:
                return solver.minimum.peak_bytes
        return self.minimum.minimum.peak_bytes

    def solve(self, budget_bytes: int, host: HostMemory | None, known: Found | None = None) -> Found | None:
        """The fastest schedule of these tilings, None where none fits the host or is faster than what is `known`.

        Requires `budget_bytes >= minimum.minimum.peak_bytes`.
        """
        best = known
        perfect: float | None = None
        for solver in self.candidates(budget_bytes):
            least = solver.problem.compute_seconds
            perfect = _PERFECT * least if perfect is None else perfect
            if best is not None and least > _HOPELESS * best[1].time.step_seconds:
                break
            if solver.minimum.peak_bytes > budget_bytes or not _fits(solver, host):
                continue
            if best is not None and _cannot_beat(solver, best[1], budget_bytes, host):
                continue
            schedule = solver.solve(budget_bytes, host)
            if best is None or schedule.time.step_seconds < best[1].time.step_seconds:
                best = solver, schedule
            step = best[1].time.step_seconds
            if step <= perfect or step <= self._worthwhile(budget_bytes, host):  # the second analyses another program
                break
        if best is not None:
            return best if best is not known else None
        return (self.minimum, self.minimum.solve(budget_bytes, host)) if _fits(self.minimum, host) else None

    def _worthwhile(self, budget_bytes: int, host: HostMemory | None) -> float:
        """Seconds from which on tilings are looked for in a large program: more than what they could save at most.

        No tiling beats the untiled arithmetic, nor the copies of what weights take beyond the whole budget, nor the reads of
        what of that is beyond the host's. In a small program all are looked at.
        """
        *_, problem = (solver.problem for solver in self.coarse())
        if len(problem.names) <= _LARGE:
            return 0.0
        over = problem.total_weight_bytes + problem.memory.fixed_bytes - budget_bytes
        least = max(problem.compute_seconds, over / problem.machine.link_peak_bandwidth)
        beyond = over - host.budget_bytes if host is not None and not host.of(problem).holds_all else 0
        return _LITTLE * max(least, beyond / problem.machine.disk_bandwidth)

    def candidates(self, budget_bytes: int) -> Iterator[Solver]:
        """As it is, with tables on the host, then tiled finer and finer."""
        yield from self.coarse()
        seen = {self.start.tiling}
        for cap, tiling in self.levels or ():
            if cap * _BELOW <= budget_bytes and tiling not in seen:
                seen.add(tiling)
                yield self.of(tiling)

    def coarse(self) -> Iterator[Solver]:
        """The program with what has to be tiled in tiles; else as it is, and with tables looked up on the host."""
        if self.levels is not None and self.levels.forced is not None:
            yield self.of(self.levels.forced)
            return
        yield self.base
        if self.freedom.tables and self.build is not None:
            yield self.of(replace(self.start.tiling, lookups=self.freedom.tables))

    @cached_property
    def levels(self) -> Levels | None:
        """None where nothing may be tiled."""
        if self.build is None or not self.freedom.tiles:
            return None
        return Levels(self.rewriting, self.start, self.build, self.freedom)


@dataclass(frozen=True, eq=False)
class Tilings:
    """The solvers of one canonical program: `base` of the program as it is, others of its rewritings.

    `build` analyses a rewritten program; None where it may not be rewritten. `freedom`: what may be done to it. `casting`:
    which weights may be stored in a smaller type. `layout`: what may run in channels-last. `attention`: the softmaxes that can
    be fused with the products around them. `in_place`: the last rewriting of all that are solved, after which less is live;
    regions are sought in programs without it. `casts`: what is cast whatever that gives, None where it is to be chosen.
    """

    base: Solver
    build: Callable[[Program, Tiling], Problem] | None = None
    freedom: Freedom = NONE
    casting: Casting = NO_CASTS
    layout: Layouts | None = None
    attention: tuple[str, ...] = ()
    in_place: Callable[[Program, tuple[str, ...]], Program] = lambda program, apart: program
    casts: tuple[Cast, ...] | None = None

    @cached_property
    def minimum(self) -> Solver:
        """The solver with the schedule of least memory."""
        return min((branch.minimum for branch in self._extremes), key=lambda solver: solver.minimum.peak_bytes)

    def least_bytes(self, budget_bytes: int) -> int:
        """The least feasible budget where it is above `budget_bytes`; else some feasible one, without looking further."""
        found = []
        for branch in self._extremes:
            found.append(branch.least_bytes(budget_bytes))
            if found[-1] <= budget_bytes:
                break
        return min(found)

    def solve(self, budget_bytes: int, host: HostMemory | None = None) -> Found:
        """The fastest schedule of all tilings; requires `budget_bytes >= minimum.minimum.peak_bytes`.

        Of casts no more are taken than make it so, but for a hundredth of the time. `host`: where the host's memory
        has a budget, for weights, values that live there, and a ring for what comes from disk.

        Raises:
            InfeasibleBudget: the host's budget is too small.
        """
        found: list[Found] = []
        for branch in self._in_turn(budget_bytes, found):
            if branch.least_bytes(budget_bytes) <= budget_bytes:
                solved = branch.solve(budget_bytes, host, _fastest(found) if branch.start.tiling.unrolled else None)
                found += [solved] if solved is not None else []
        if not found:
            assert host is not None
            raise self._too_much_on_the_host(budget_bytes, host)
        enough = _ENOUGH * min(schedule.time.step_seconds for _, schedule in found)
        kept = [(solver, schedule) for solver, schedule in found if schedule.time.step_seconds <= enough]
        return min(kept, key=lambda each: (*_changes(each[0].problem.tiling), each[1].time.step_seconds))

    def _in_turn(self, budget_bytes: int, found: Sequence[Found]) -> Iterator[Branch]:
        """As it is and with fused attention, with casts of the faster one; then the fastest of these in channels-last.

        Each only where it could be faster than what was found before.
        """
        yield from self._cast_in_turn(budget_bytes, found)
        yield from self._unrolled_in_turn(budget_bytes, found)
        fastest = _fastest(found)
        if self.layout is None or fastest is None:
            return
        tiling, step = fastest[0].problem.tiling, fastest[1].time.step_seconds
        start = Tiling(casts=tiling.casts, attention=tiling.attention, unrolled=tiling.unrolled)
        own = self.branch(start).base.problem
        copies = (own.total_weight_bytes + own.memory.fixed_bytes - budget_bytes) / own.machine.link_peak_bandwidth
        if max(step - self.layout.most_seconds, copies) * _ENOUGH >= step or not self.layout.regions:
            return
        whole = replace(start, channels_last=self.layout.regions, unrolled=())
        shorter = self.branch(self._as_unrolled(whole, tiling))
        if shorter.base.problem.compute_seconds * _ENOUGH < own.compute_seconds:
            yield shorter

    def _cast_in_turn(self, budget_bytes: int, found: Sequence[Found]) -> Iterator[Branch]:
        """Without casts; with about as many as end the wait for copies; with all of them. Until the step is the arithmetic."""
        given = Tiling(casts=self.casts or ())
        plain = self.branch(given)
        yield plain
        if self.attention:
            fused = self.branch(replace(given, attention=self.attention))
            yield fused
            fastest = _fastest(found)
            plain = fused if fastest is None or fastest[0].problem.tiling.attention else plain
        if not self.casting.casts or self.casts is not None:
            return
        problem = plain.base.problem
        over = problem.total_weight_bytes + problem.most_activation_bytes - budget_bytes
        late = over / problem.machine.link_peak_bandwidth - problem.compute_seconds
        if found:
            late = min(each.time.step_seconds for _, each in found) - problem.compute_seconds
        counts = [self.casting.count_for(share * late * problem.machine.link_peak_bandwidth) for share in _SHARES]
        for count in dict.fromkeys((*counts, len(self.casting.casts))):
            if found and min(each.time.step_seconds for _, each in found) <= _ENOUGH * problem.compute_seconds:
                return
            yield self.branch(replace(plain.start.tiling, casts=self.casting.casts[:count]))

    def _unrolled_in_turn(self, budget_bytes: int, found: Sequence[Found]) -> Iterator[Branch]:
        """The fastest with samples one after another, where that could be faster; all of them where nothing else fits.

        No step takes less than whole operators do, nor than copies of what does not fit.
        """
        fastest = _fastest(found)
        if fastest is None:
            for start in self._starts:
                yield from self._in_slices(start, budget_bytes)
            return
        tiling = fastest[0].problem.tiling
        start = Tiling(casts=tiling.casts, attention=tiling.attention)
        problem = self.branch(start).start
        over = problem.total_weight_bytes + problem.memory.fixed_bytes - budget_bytes
        least = max(problem.compute_seconds, over / problem.machine.link_peak_bandwidth)
        if fastest[1].time.step_seconds > _ENOUGH * least:
            yield from self._in_slices(start, budget_bytes)

    def _in_slices(self, start: Tiling, budget_bytes: int) -> Iterator[Branch]:
        """In as few slices as fit without tiles, then in fewer, with tiles; sample by sample where none fit so."""
        wider: Branch | None = None
        for tiling in (slices := self._unrolled(start)):
            branch = self.branch(tiling)
            fits = branch.base.minimum.peak_bytes <= budget_bytes
            if fits or tiling is slices[-1]:
                yield branch
                if fits and wider is not None:
                    yield wider
                return
            wider = branch

    @cached_property
    def _starts(self) -> tuple[Tiling, ...]:
        """Of the rewritings that all else goes on from: none, fused attention, all casts."""
        given = Tiling(casts=self.casts or ())
        starts = [given, replace(given, attention=self.attention)]
        if self.casts is None:
            starts.append(Tiling(attention=self.attention, casts=self.casting.casts))
        return tuple(dict.fromkeys(starts))

    @cached_property
    def _extremes(self) -> list[Branch]:
        """What needs the least memory is among them: all that can be started from, and each of them sample by sample."""
        one_by_one = [tiling for start in self._starts for tiling in self._unrolled(start)[-1:]]
        return [self.branch(start) for start in (*self._starts, *one_by_one)]

    def _unrolled(self, start: Tiling) -> list[Tiling]:
        """A rewriting in more and more slices of samples; none where that cannot be."""
        slicing = self._slicing(start)
        return [replace(start, unrolled=(tile,)) for tile in slicing.tiles()] if slicing is not None else []

    def _as_unrolled(self, start: Tiling, like: Tiling) -> Tiling:
        """A rewriting in as many slices as another one has, by its own names; as it is where that cannot be."""
        count = like.unrolled[0].count if like.unrolled else 1
        return next((each for each in self._unrolled(start) if each.unrolled[0].count == count), start)

    def _slicing(self, start: Tiling) -> Slicing | None:
        """Which stretch of the program can run sample by sample, as far as it is rewritten before that."""
        named = Tiling(attention=start.attention, channels_last=start.channels_last)
        if named not in self._slicings:
            allowed = self.build is not None and self.freedom.tiles
            program = self._rewriting.of(named) if allowed else None
            self._slicings[named] = slicing_of(program, self.freedom.constraint) if program is not None else None
        return self._slicings[named]

    @cached_property
    def _slicings(self) -> dict[Tiling, Slicing | None]:
        return {}

    def branch(self, start: Tiling) -> Branch:
        """The tilings that go on from a rewriting."""
        if start not in self._branches:
            problem = self.base.problem
            if start:
                assert self.build is not None
                problem = self.build(self._rewriting.of(start), start)
            self._branches[start] = Branch(self._rewriting, problem, self.of, self.build, self.freedom)
        return self._branches[start]

    @cached_property
    def _branches(self) -> dict[Tiling, Branch]:
        return {}

    def _too_much_on_the_host(self, budget_bytes: int, host: HostMemory) -> InfeasibleBudget:
        """Of all that fit the device, what needs the least of the host."""
        branches = [branch for branch in self._extremes if branch.least_bytes(budget_bytes) <= budget_bytes]
        solvers = [solver for branch in branches for solver in (*branch.candidates(budget_bytes), branch.minimum)]
        fitting = [solver for solver in solvers if solver.minimum.peak_bytes <= budget_bytes]
        problem = min((solver.problem for solver in fitting), key=lambda problem: host.of(problem).least_bytes)
        least, hosted = host.of(problem).least_bytes, host.of(problem).hosted_bytes
        said = f"{format_bytes(hosted)} of values on the host and " if hosted else ""
        return InfeasibleBudget(
            f"host budget {format_bytes(host.budget_bytes)} ({host.budget_bytes} B); the least possible beside "
            f"{format_bytes(budget_bytes)} on the device is {format_bytes(least)} ({least} B) of host memory: {said}"
            f"{format_bytes(least - hosted)} for weights, or the ring through which they come from disk. Write "
            f"budget={{..., 'cpu': {least}}}" + ("" if not hosted else ", or give the device more"),
            budget_bytes=host.budget_bytes,
            minimum_bytes=least,
            node=problem.liveness.nodes[0].name,
            memory="cpu",
        )

    @cached_property
    def what_stops(self) -> str:
        """What keeps the least peak from being lower: an operator without a rule, samples that are too many; else empty."""
        if self.branch(UNTILED).levels is None:
            return ""
        least, slicing = self.minimum, self._slicing(UNTILED)
        captured = {node.name: node.target for node in self.base.problem.liveness.nodes}
        node = least.problem.liveness.nodes[least.minimum.peak_position]
        for near in (node, *node.all_input_nodes, *node.users):
            reason = _refusal(near)
            if reason and captured.get(near.name.partition("_of_")[0]) == near.target:  # not what rewriting put there
                where = f" in {module_path(near)}" if module_path(near) else ""
                return f"{near.name}{where} runs whole: {operator_name(near.target)} {reason}"
        mostly = 2 * least.problem.activation_bytes[least.minimum.peak_position] > least.minimum.peak_bytes
        return slicing.too_long if slicing is not None and mostly else ""

    def of(self, tiling: Tiling) -> Solver:
        """The solver of a given tiling.

        Raises:
            PlanFileError, Untileable: as `Rewriting.of`.
        """
        if self.build is None:
            assert not tiling
            return self.base
        if tiling not in self._solvers:
            program = self.base.problem.program
            tiled = self._rewriting.of(tiling)
            final = self.in_place(tiled, tiling.apart)
            changed = final is not program
            made = Solver(self.build(final, tiling), self.base.repeats, self.base.pool) if changed else self.base
            self._solvers[tiling] = made
        return self._solvers[tiling]

    @cached_property
    def _rewriting(self) -> Rewriting:
        return Rewriting(self.base.problem.program)

    def forget(self) -> int:
        """Lets go of programs that were looked at on the way to a decision; they are made again where they are asked for.

        Gives how many operators these have.
        """
        operators = sum(len(solver.problem.names) for solver in self._solvers.values())
        for name in ("_extremes", "_slicings", "_branches", "_rewriting", "_solvers"):
            vars(self).pop(name, None)
        return operators

    @cached_property
    def _solvers(self) -> dict[Tiling, Solver]:
        return {}


def _fastest(found: Sequence[Found]) -> Found | None:
    return min(found, key=lambda each: each[1].time.step_seconds, default=None)


def _changes(tiling: Tiling) -> tuple[int, bool, bool, bool]:
    """What is done besides tiles and copies, the less the better of what is as fast."""
    return len(tiling.casts), bool(tiling.channels_last), bool(tiling.attention), bool(tiling.unrolled)


def _fits(solver: Solver, host: HostMemory | None) -> bool:
    """Whether what has to be in the host's memory fits its budget."""
    return host is None or host.of(solver.problem).fits


def _cannot_beat(solver: Solver, best: Schedule, budget_bytes: int, host: HostMemory | None) -> bool:
    """Whether no schedule of this solver is faster: its arithmetic alone is not, its reads, or the linear program's bound."""
    if solver.problem.compute_seconds >= best.time.step_seconds:
        return True
    if physical_bound(solver.problem, budget_bytes, host).disk_seconds * NEAR >= best.time.step_seconds:
        return True
    if solver.resident.peak_bytes <= budget_bytes:
        return False
    relaxation = solver.relaxed(budget_bytes)
    return relaxation is not None and relaxation.seconds >= best.time.step_seconds


def _refusal(node: fx.Node) -> str:
    """Why an operator can be cut along none of its dimensions, where it has no rule at all."""
    if not isinstance(node.target, torch._ops.OpOverload) or not any(t.numel() > 1 for t in tensors_of(node)):
        return ""
    if node.target._schema.is_mutable:
        return "writes to its argument"
    return "" if rule_of(node.target) is not None else "has no tile rule"
