"""Untiled or tiled, and how finely: the program in several tilings, each solved for the budget, and the fastest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from passes.program import Program, module_path, operator_name, tensors_of
from passes.tile_rules.base import rule_of
from planner.sizes import format_bytes
from planner.solve.decide import Schedule, Solver
from planner.solve.decisions import UNTILED, Tiling
from planner.solve.levels import NONE, Freedom, Levels, tile_program
from planner.solve.problem import Problem
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


@dataclass(frozen=True, eq=False)
class Tilings:
    """The solvers of one canonical program: `base` of the program as it is, others of its tilings.

    `build` analyses a rewritten program; None where it may not be rewritten. `freedom`: what may be done to it. `in_place`: the
    last rewriting of all that are solved, after which less is live; regions are sought in programs without it.
    """

    base: Solver
    build: Callable[[Program, Tiling], Problem] | None = None
    freedom: Freedom = NONE
    in_place: Callable[[Program], Program] = lambda program: program

    @cached_property
    def minimum(self) -> Solver:
        """The solver with the schedule of least memory."""
        options = list(self._coarse())
        if self._levels is not None:
            options += [self.of(tiling) for _, tiling in deque(self._levels, maxlen=1)]
        return min(options, key=lambda solver: solver.minimum.peak_bytes)

    def least_bytes(self, budget_bytes: int) -> int:
        """The least feasible budget where it is above `budget_bytes`; else some feasible one, without looking further."""
        for solver in self._candidates(budget_bytes):
            if solver.minimum.peak_bytes <= budget_bytes:
                return solver.minimum.peak_bytes
        return self.minimum.minimum.peak_bytes

    def solve(self, budget_bytes: int, host_bytes: int | None = None) -> tuple[Solver, Schedule]:
        """The fastest schedule of all tilings; requires `budget_bytes >= minimum.minimum.peak_bytes`.

        `host_bytes`: what streamed weights, and values that live on the host, may take of page-locked memory there.

        Raises:
            InfeasibleBudget: the values that live on the host do not fit there.
        """
        best: tuple[Solver, Schedule] | None = None
        perfect: float | None = None
        for solver in self._candidates(budget_bytes):
            left = _left(solver, host_bytes)
            least = solver.problem.compute_seconds
            perfect = _PERFECT * least if perfect is None else perfect
            if best is not None and least > _HOPELESS * best[1].time.step_seconds:
                break
            if solver.minimum.peak_bytes > budget_bytes or (left is not None and left < 0):
                continue
            if best is not None and _cannot_beat(solver, best[1], budget_bytes):
                continue
            schedule = solver.solve(budget_bytes, left)
            if best is None or schedule.time.step_seconds < best[1].time.step_seconds:
                best = solver, schedule
            step = best[1].time.step_seconds
            if step <= perfect or step <= self._worthwhile(budget_bytes):  # the second analyses another program
                break
        if best is None:
            left = _left(self.minimum, host_bytes)
            if left is not None and left < 0:
                raise self._too_much_on_the_host(budget_bytes, left)
            best = self.minimum, self.minimum.solve(budget_bytes, left)
        return best

    def _too_much_on_the_host(self, budget_bytes: int, left: int) -> InfeasibleBudget:
        least = self.minimum
        node = least.problem.liveness.nodes[least.minimum.peak_position].name
        hosted = format_bytes(least.problem.hosted[1])
        return InfeasibleBudget(
            f"budget {format_bytes(budget_bytes)}: it is kept only with {hosted} of values on the host, {format_bytes(-left)} "
            "more than the budget there; raise one of the two",
            budget_bytes=budget_bytes,
            minimum_bytes=least.minimum.peak_bytes,
            node=node,
        )

    @cached_property
    def what_stops(self) -> str:
        """The operator without a rule that keeps the least peak from being lower; empty where it is something else."""
        if self._levels is None:
            return ""
        least = self.minimum
        captured = {node.name: node.target for node in self.base.problem.liveness.nodes}
        node = least.problem.liveness.nodes[least.minimum.peak_position]
        for near in (node, *node.all_input_nodes, *node.users):
            reason = _refusal(near)
            if reason and captured.get(near.name) == near.target:  # not what rewriting put there
                where = f" in {module_path(near)}" if module_path(near) else ""
                return f"{near.name}{where} runs whole: {operator_name(near.target)} {reason}"
        return ""

    def _worthwhile(self, budget_bytes: int) -> float:
        """Seconds from which on tilings are looked for in a large program: more than what they could save at most.

        No tiling beats the untiled arithmetic, nor the copies of what weights take beyond the whole budget. In a small program
        all are looked at.
        """
        *_, problem = (solver.problem for solver in self._coarse())
        if len(problem.names) <= _LARGE:
            return 0.0
        over = problem.total_weight_bytes + problem.memory.fixed_bytes - budget_bytes
        return _LITTLE * max(problem.compute_seconds, over / problem.machine.link_peak_bandwidth)

    def _candidates(self, budget_bytes: int) -> Iterator[Solver]:
        """As it is, with tables on the host, then tiled finer and finer."""
        yield from self._coarse()
        seen = {UNTILED}
        for cap, tiling in self._levels or ():
            if cap * _BELOW <= budget_bytes and tiling not in seen:
                seen.add(tiling)
                yield self.of(tiling)

    def _coarse(self) -> Iterator[Solver]:
        """The program with what has to be tiled in tiles; else as it is, and with tables looked up on the host."""
        if self._levels is not None and self._levels.forced is not None:
            yield self.of(self._levels.forced)
            return
        yield self.of(UNTILED)
        if self.freedom.tables and self.build is not None:
            yield self.of(self.freedom.looked_up)

    @cached_property
    def _levels(self) -> Levels | None:
        """None where nothing may be tiled."""
        if self.build is None or not self.freedom.tiles:
            return None
        return Levels(self.base.problem, self.build, self.freedom)

    def of(self, tiling: Tiling) -> Solver:
        """The solver of a given tiling.

        Raises:
            PlanFileError, Untileable: as `tile_program`.
        """
        if self.build is None:
            assert not tiling
            return self.base
        if tiling not in self._solvers:
            program = self.base.problem.program
            tiled = tile_program(program, tiling) if tiling else program
            final = self.in_place(tiled)
            changed = final is not program
            made = Solver(self.build(final, tiling), self.base.repeats, self.base.pool) if changed else self.base
            self._solvers[tiling] = made
        return self._solvers[tiling]

    @cached_property
    def _solvers(self) -> dict[Tiling, Solver]:
        return {}


def _left(solver: Solver, host_bytes: int | None) -> int | None:
    """What streamed weights may take of the host's memory beside the values that live there; below 0 where those do not fit."""
    return None if host_bytes is None else host_bytes - solver.problem.hosted[1]


def _cannot_beat(solver: Solver, best: Schedule, budget_bytes: int) -> bool:
    """Whether no schedule of this solver is faster: its arithmetic alone is not, or the linear program's bound."""
    if solver.problem.compute_seconds >= best.time.step_seconds:
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
