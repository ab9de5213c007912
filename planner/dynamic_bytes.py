"""Bytes of a dynamic plan at any sizes: as expressions in the user's dims where operators can be counted in symbols, and by the
concrete analysis everywhere.

The two are compared where both exist (at the largest sizes and at the least), before an expression is believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch

from passes.concretise import Concretise
from passes.dims import Dims, Evaluator, corners, dim_symbol
from passes.growth import Growth
from passes.liveness import analyse_liveness
from passes.probe import Prober
from passes.symbolic import SymbolicProber
from runtime.errors import PlannerError, UnknownSize

if TYPE_CHECKING:
    from planner.solve.problem import Problem

# So many sizes are looked at one by one where nothing can be shown about them.
EXHAUSTIVE = 256
# So many analyses at other sizes are kept.
REMEMBERED = 16


class DynamicBytes:
    """The activation bytes of one captured program, at any sizes that its guards let in. Belongs to a `Problem`."""

    def __init__(self, problem: Problem) -> None:
        origin = problem.program.origin
        assert origin is not None
        assert origin.dims is not None
        self.problem, self.origin = problem, origin
        self.dims: Dims = origin.dims
        self._prober = Prober(problem.memory.device, problem.machine.capability)
        self._problems: dict[tuple[int, ...], Problem] = {tuple(self.dims.largest.values()): problem}

    def problem_at(self, sizes: Mapping[str, int]) -> Problem:
        """The planning problem at other sizes: the same operators and weights, other activation bytes, the seconds of before.

        Raises:
            PlannerError: the guards do not let the sizes in.
        """
        key = tuple(sizes[name] for name in self.dims.names)
        if key not in self._problems:
            if not self.dims.holds(sizes):
                raise PlannerError(
                    f"the program does not serve {spell(sizes)}: it needs {self.dims.guard_text} and sizes of at least 2; "
                    "plan such a call by itself"
                )
            program = Concretise(dict(sizes)).apply(self.origin)
            liveness = analyse_liveness(program, self._prober, self.problem.memory.round_activation)
            while len(self._problems) >= REMEMBERED:
                del self._problems[next(old for old in self._problems if old != tuple(self.dims.largest.values()))]
            self._problems[key] = replace(self.problem, program=program, liveness=liveness)
        return self._problems[key]

    @cached_property
    def profile(self) -> tuple[sympy.Expr, ...] | None:
        """Per operator its activation bytes in the user's symbols; None where no expression is exact.

        None for devices whose allocator rounds or whose operators take declared workspaces (`cuda`), and where an operator's
        bytes in symbols are not those of the concrete analysis.
        """
        return self._counted[0]

    @property
    def assumed(self) -> tuple[sympy.Expr, ...]:
        """What counting in symbols took for granted besides the program's guards: where it holds the profile is exact.

        Kernels choose by size (a convolution by `batch < 16`), and counting follows the branch of the largest sizes.
        """
        return self._counted[1]

    @cached_property
    def assumed_everywhere(self) -> bool:
        """Whether `assumed` holds in the whole range; decided for inequalities of products of sizes, at the corners."""
        inequalities = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
        decided = all(
            isinstance(guard, inequalities) and sympy.degree_list(guard.lhs - guard.rhs) <= (1,) * len(self.dims.names)
            for guard in self.assumed
        )
        return decided and all(self.assumes(sizes) for sizes in corners(self.dims.ranges))

    def assumes(self, sizes: Mapping[str, int]) -> bool:
        """Whether the profile is exact at these sizes."""
        return all(Evaluator(guard)(sizes) for guard in self.assumed)

    @cached_property
    def _counted(self) -> tuple[tuple[sympy.Expr, ...] | None, tuple[sympy.Expr, ...]]:
        """`profile` and `assumed`."""
        if self.problem.memory.device == "cuda":
            return None, ()
        inputs = (node.meta["val"] for node in self.origin.graph.nodes if node.name in self.origin.inputs)
        fake: Any = next(val for val in inputs if isinstance(val, torch.Tensor))
        env = fake.fake_mode.shape_env
        before = len(env.guards)
        try:
            liveness = analyse_liveness(self.origin, SymbolicProber())
        except UnknownSize:
            return None, ()
        taken = dict.fromkeys(self.dims.expr(guard.expr) for guard in env.guards[before:])
        assumed = tuple(guard for guard in taken if guard not in self.dims.guards and not self.growth.always(guard))
        if any({str(s) for s in guard.free_symbols} - set(self.dims.names) for guard in assumed):
            return None, ()
        found = {node.name: nbytes for node, nbytes in zip(liveness.nodes, liveness.bytes_at, strict=True)}
        exprs = _translated(self.dims, [found[name] for name in self.problem.names])
        for sizes in self.references[:2]:
            expected = self.problem_at(sizes).liveness.bytes_at
            if not _agree(exprs, expected, sizes):
                return None, ()
        return exprs, assumed

    @cached_property
    def references(self) -> list[dict[str, int]]:
        """The largest sizes, the least ones, and each dim alone at its least; as near to that as the guards let in."""
        largest, least = self.dims.largest, self.dims.smallest
        wanted = [largest, least, *({**largest, name: least[name]} for name in self.dims.names)]
        found = [self._nearest(sizes) for sizes in wanted]
        return [dict(key) for key in dict.fromkeys(tuple(sizes.items()) for sizes in found if sizes is not None)]

    def _nearest(self, sizes: dict[str, int]) -> dict[str, int] | None:
        """The sizes, rounded up to what is served; None where nothing near is."""
        rounded = {}
        for name, n in sizes.items():
            unit = self.dims.multiples.get(name, 1)
            rounded[name] = min(-(-n // unit) * unit, self.dims.ranges[name][1] // unit * unit)
        for step in range(64):
            moved = {n: min(s + step * self.dims.multiples.get(n, 1), max(s, self.dims.largest[n])) for n, s in rounded.items()}
            if self.dims.holds(moved):
                return moved
        return None

    @cached_property
    def growth(self) -> Growth:
        least = {dim_symbol(name): low for name, low in self.dims.smallest.items()}
        for guard in self.dims.guards:
            if isinstance(guard, sympy.Ge) and guard.lhs in least and guard.rhs.is_Integer:
                least[guard.lhs] = max(least[guard.lhs], int(guard.rhs))
        return Growth(least)

    def peak_expr(self, extra: Sequence[int] | np.ndarray) -> sympy.Expr | None:
        """`max over operators of (activations + extra)`, `extra` in bytes per operator; None without a profile."""
        if self.profile is None:
            return None
        most: dict[sympy.Expr, int] = {}
        for expr, nbytes in zip(self.profile, extra, strict=True):
            most[expr] = max(most.get(expr, 0), int(nbytes))
        kept = self.growth.largest(expr + nbytes for expr, nbytes in most.items())
        return sympy.Max(*kept, evaluate=False) if len(kept) > 1 else kept[0]

    def minimum_expr(self) -> sympy.Expr | None:
        """The least budget in symbols: `Solver.minimum`, whose schedules do not depend on sizes; None without a profile."""
        from planner.solve.decide import Solver  # which imports the problem, which imports this

        solver = Solver(self.problem)
        found = []
        for schedule in dict.fromkeys((solver.tightest, solver.resident)):
            expr = self.peak_expr(solver.weights_at(schedule) + self.problem.memory.fixed_bytes)
            if expr is None or Evaluator(expr)(self.dims.largest) != schedule.peak_bytes:
                return None
            found.append(expr)
        return sympy.Min(*found, evaluate=False) if len(found) > 1 else found[0]

    @cached_property
    def doubtful(self) -> tuple[list[dict[str, int]], str]:
        """The sizes at which a plan that fits at the largest has to be looked at too, and in words why these are enough.

        None where expressions show that bytes grow with every size. Where the allocator rounds (`cuda`) nothing shows that: a
        plan is looked at where it is most likely to surprise, and the runtime enforces the rest.

        Raises:
            PlannerError: nothing shows it, and there are too many sizes to look at each.
        """
        grows = self.profile is not None and all(self.growth.grows(expr) for expr in dict.fromkeys(self.profile))
        if grows and self.assumed_everywhere:
            return [], "bytes grow with every size"
        count = math.prod(high - low + 1 for low, high in self.dims.ranges.values())
        if count <= EXHAUSTIVE:
            points = [sizes for sizes in self._grid() if self.dims.holds(sizes)]
            return points, f"all {len(points)} sizes were looked at"
        if grows:
            where = " and ".join(map(str, self.assumed))
            return self.references, f"bytes grow with every size where {where}, {len(self.references)} sizes were looked at"
        if self.problem.memory.device == "cuda":
            return self.references, f"{len(self.references)} sizes were looked at: the least and largest of each dim"
        ranges = ", ".join(f"{name} from {low} to {high}" for name, (low, high) in self.dims.ranges.items())
        raise PlannerError(
            f"nothing shows that {self.problem.program.name} needs the most memory at its largest sizes ({ranges}), and these "
            "are too many to look at each: leave a dim out of dynamic=, or give it a smaller range"
        )

    def _grid(self) -> Iterator[dict[str, int]]:
        names = self.dims.names
        spans = [range(low, high + 1) for low, high in self.dims.ranges.values()]
        for index in np.ndindex(*(len(span) for span in spans)):
            yield {name: span[i] for name, span, i in zip(names, spans, index, strict=True)}


def _translated(dims: Dims, exprs: Sequence[Any]) -> tuple[sympy.Expr, ...]:
    known: dict[Any, sympy.Expr] = {}
    for expr in exprs:
        if expr not in known:
            known[expr] = dims.expr(expr)
    return tuple(known[expr] for expr in exprs)


def _agree(exprs: Sequence[sympy.Expr], expected: Sequence[int], sizes: Mapping[str, int]) -> bool:
    known = {expr: Evaluator(expr)(sizes) for expr in dict.fromkeys(exprs)}
    return all(known[expr] == nbytes for expr, nbytes in zip(exprs, expected, strict=True))


def spell(sizes: Mapping[str, int]) -> str:
    """`batch=2, height=64`."""
    return ", ".join(f"{name}={n}" for name, n in sizes.items())
