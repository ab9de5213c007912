"""What a dynamic plan can say of sizes: its peak as an expression, its peak at given sizes, the largest sizes that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
from torch import nn

from passes.base import run_passes
from passes.check_plan import check_plan
from passes.concretise import Concretise
from passes.dims import LEAST_SIZE, Dims, Evaluator, corners, dim_symbol, python_text
from passes.program import Program, storage_bytes
from planner.dynamic import capture_dynamic
from planner.dynamic_bytes import DynamicBytes, spell
from planner.options import Options
from planner.pipeline import annotate_workspace, placements_of
from planner.prepare import tilings_of
from planner.schedule import staged_bytes
from planner.solve.decide import Solver
from planner.solve.decisions import Decisions
from planner.solve.problem import Problem, build_problem
from runtime.dynamic_signature import DimSource, DynamicSignature, Formula
from runtime.errors import PlannerError
from runtime.signature import CallSignature, TensorKey

if TYPE_CHECKING:
    from planner.plan import Plan

# Sizes that no budget ends are not looked for beyond this.
_ENDLESS = 1 << 31
# How far below a size one is looked for that the guards let in (a multiple of 8, say).
_STEPS = 1024


def dims_of(plan: Plan) -> Dims:
    """The dims of a dynamic plan.

    Raises:
        PlannerError: the plan has fixed sizes.
    """
    if plan.problem.in_symbols is None:
        raise PlannerError(
            f"this plan of {plan.program.name} has fixed sizes; name what varies: "
            'plan(..., dynamic={"x": {0: "batch"}}), or torch.export.Dim("batch", max=8) in place of "batch"'
        )
    return plan.problem.in_symbols.dims


def check_sizes(problem: Problem, decisions: Decisions, budget_bytes: int) -> None:
    """Raises PlannerError where a plan that fits at the largest sizes is over the budget at others."""
    assert problem.in_symbols is not None
    points, _ = problem.in_symbols.doubtful
    for sizes in points:
        there = Solver(problem.in_symbols.problem_at(sizes))
        peak = there.evaluate(placements_of(problem, decisions), decisions.staging).peak_bytes
        if peak > budget_bytes:
            raise PlannerError(
                f"the plan for the largest sizes needs {peak} B at {spell(sizes)}, over its budget of {budget_bytes} B; "
                "plan these sizes apart (give the dims smaller ranges), or raise the budget"
            )


def complete(dims: Dims, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes for all dims, the largest where none is given.

    Raises:
        PlannerError: no such dim, or no size.
    """
    for name, n in sizes.items():
        if name not in dims.ranges:
            raise PlannerError(f"there is no dim {name!r}; the plan has {', '.join(map(repr, dims.names))}")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PlannerError(f"{name}={n!r} is no size; write a positive integer")
    return {**dims.largest, **sizes}


def peak_bytes_at(plan: Plan, sizes: Mapping[str, int]) -> int:
    """The predicted peak of the plan's program at sizes, by replaying it; on every device."""
    there = complete(dims_of(plan), sizes)
    in_symbols, emitted = plan.problem.in_symbols, plan.emitted.origin
    assert in_symbols is not None
    assert emitted is not None
    problem = in_symbols.problem_at(there)
    program = Concretise(there, problem.program).apply(emitted)
    annotate_workspace(problem, program.graph)
    memory = problem.memory
    unlimited = 1 << 62
    return check_plan(program, unlimited, rounding_bytes=memory.activation_rounding, fixed_bytes=memory.fixed_bytes).peak_bytes


def peak_bytes_expr(plan: Plan) -> sympy.Expr:
    """The peak of the plan's decisions in the symbols of its dims; see `Plan.peak_bytes_expr`."""
    dims, in_symbols = dims_of(plan), plan.problem.in_symbols
    assert in_symbols is not None
    placements = placements_of(plan.problem, plan.decisions)
    fixed = plan.layout.resident_bytes + plan.layout.state_bytes + plan.layout.staging_bytes + plan.problem.memory.fixed_bytes
    extra = np.full(len(plan.problem.names), fixed, dtype=np.int64)
    if plan.decisions.staging == "allocator":
        extra += staged_bytes(placements, len(extra))
    expr = in_symbols.peak_expr(extra)
    if expr is not None and Evaluator(expr)(dims.largest) == plan.peak_bytes:
        if in_symbols.assumed_everywhere:
            return expr
        return sympy.Piecewise((expr, sympy.And(*in_symbols.assumed)), (_by_replay(plan, dims), True))
    return _by_replay(plan, dims)


def _by_replay(plan: Plan, dims: Dims) -> sympy.Expr:
    """A function of the dims that replays the program where it is given numbers: exact, but no formula."""

    def value(cls: Any, *sizes: Any) -> sympy.Integer | None:
        if not all(n.is_Integer for n in sizes):
            return None
        return sympy.Integer(peak_bytes_at(plan, dict(zip(dims.names, map(int, sizes), strict=True))))

    replayed: Any = type("peak_bytes", (sympy.Function,), {"eval": classmethod(value)})
    result: sympy.Expr = replayed(*map(dim_symbol, dims.names), evaluate=False)
    return result


def describe_sizes(plan: Plan) -> str:
    """`batch 2 to 8, height 32 to 128 in steps of 4`, and what else the model takes for granted within that."""
    dims = dims_of(plan)
    ranges = {}
    for name, (low, high) in dims.ranges.items():
        unit = dims.multiples.get(name, 1)
        low, high = -(-low // unit) * unit, high // unit * unit
        served = (n for n in range(low, min(high, low + 64 * unit), unit) if dims.holds({**dims.largest, name: n}))
        ranges[name] = next(served, high), high
    texts = []
    for name, (low, high) in ranges.items():
        unit = dims.multiples.get(name, 1)
        texts.append(
            f"{name} {low} to {high}" + (f" in steps of {unit}" if unit > 1 else "") if low < high else f"{name} {low}"
        )
    where = [python_text(guard) for guard in dims.guards if not all(Evaluator(guard)(sizes) for sizes in corners(ranges))]
    return ", ".join(texts) + (f" where {' and '.join(where)}" if where else "")


# The largest that fits.


def largest(plan: Plan, target: nn.Module, options: Options, dim: str, sizes: Mapping[str, int]) -> int:
    """The largest size of `dim` for which a plan within the budget exists; see `Plan.largest`."""
    dims = dims_of(plan)
    there = complete(dims, {dim: dims.largest.get(dim, LEAST_SIZE), **sizes})
    in_symbols = plan.problem.in_symbols
    assert in_symbols is not None
    if dim in sizes:
        raise PlannerError(f"{dim}={sizes[dim]} is what is asked for: write p.largest({dim!r}) without it")
    ones = [name for name, n in sizes.items() if n < LEAST_SIZE]
    if ones:  # a constant to torch.export: another program, in which only the others vary
        in_symbols = _fixed(plan, target, options, {name: sizes[name] for name in ones}, dim)
        there = {name: n for name, n in there.items() if name in in_symbols.dims.ranges}
    return _Search(in_symbols, dim, there, plan.budget_bytes, options).run()


def _fixed(plan: Plan, target: nn.Module, options: Options, ones: Mapping[str, int], dim: str) -> DynamicBytes:
    """The model captured anew with some dims fixed."""
    shapes = options.dynamic
    assert shapes is not None
    args, kwargs = shapes.bound(target, options.method, options.args, options.kwargs)
    args, kwargs = shapes.at(args, kwargs, {**shapes.largest, **ones})
    leaves = tuple({i: a for i, a in axes.items() if a.dim not in ones} for axes in shapes.leaves)
    rest = replace(shapes, ranges={n: ends for n, ends in shapes.ranges.items() if n not in ones}, leaves=leaves)
    origin = capture_dynamic(target, options.method, args, kwargs, rest)
    program = run_passes(origin, (Concretise(rest.largest),))
    problem = build_problem(program, options.machine, plan.problem.memory, options.keeps_resident)
    assert problem.in_symbols is not None
    return problem.in_symbols


class _Search:
    """Bisection over one dim. A size counts as too large where no plan fits or the guards do not let it in."""

    def __init__(self, in_symbols: DynamicBytes, dim: str, sizes: dict[str, int], budget_bytes: int, options: Options) -> None:
        self._bytes, self._dim, self._sizes, self._budget = in_symbols, dim, sizes, budget_bytes
        self._options = options
        self._estimate = in_symbols.minimum_expr()
        self._evaluate = Evaluator(self._estimate) if self._estimate is not None else None

    def run(self) -> int:
        served = self._served(max(LEAST_SIZE, self._bytes.dims.largest[self._dim]), 0)
        low = served if served is not None and self._fits(served) else self._below(served)
        high = 2 * low
        while True:
            candidate = self._served(high, low)
            if candidate is None or not self._fits(candidate):
                break
            low, high = candidate, 2 * candidate
            if low > _ENDLESS:
                raise PlannerError(
                    f"{self._dim!r} does not change what {self._bytes.problem.program.name} needs: any size fits"
                )
        while high - low > 1:
            middle = (low + high) // 2
            candidate = self._served(middle, low)
            if candidate is not None and self._fits(candidate):
                low = candidate
            else:
                high = middle
        return low

    def _below(self, served: int | None) -> int:
        """The least size of all, where not even the captured one fits."""
        first = next((n for n in range(LEAST_SIZE, LEAST_SIZE + _STEPS) if self._holds(n)), None)
        if first is None or not self._fits(first):
            others = spell({name: n for name, n in self._sizes.items() if name != self._dim})
            raise PlannerError(
                f"no size of {self._dim!r} fits {self._budget} B"
                + (f" at {others}" if others else "")
                + "; raise the budget, or "
                "give the other dims smaller sizes"
            )
        return first

    def _at(self, n: int) -> dict[str, int]:
        return {**self._sizes, self._dim: n}

    def _holds(self, n: int) -> bool:
        return self._bytes.dims.holds(self._at(n))

    def _served(self, n: int, above: int) -> int | None:
        """The largest size in (above, n] that the guards let in."""
        return next((m for m in range(n, max(above, n - _STEPS), -1) if self._holds(m)), None)

    def _fits(self, n: int) -> bool:
        if self._evaluate is not None and self._bytes.assumes(self._at(n)):
            whole = bool(self._evaluate(self._at(n)) <= self._budget)
        else:
            whole = Solver(self._bytes.problem_at(self._at(n))).minimum.peak_bytes <= self._budget
        return whole or self._fits_rewritten(n)

    def _fits_rewritten(self, n: int) -> bool:
        """Whether a program of this size alone fits: it may be tiled, and its tables be looked up."""
        program = replace(self._bytes.problem_at(self._at(n)).program, origin=None)
        return tilings_of(program, self._options).least_bytes(self._budget) <= self._budget


# The guard of a call.


def dynamic_signature(program: Program, call: tuple[tuple[Any, ...], dict[str, Any]]) -> DynamicSignature:
    """Which calls a program in symbols serves; `call` is the bound example."""
    dims = program.dims
    assert dims is not None
    example, _ = CallSignature.of(*call)
    nodes = {n.name: n for n in program.graph.nodes}
    keys: list[Any] = []
    sources: dict[str, DimSource] = {}
    for index, (name, axes, key) in enumerate(zip(program.inputs, dims.axes, example.leaves, strict=True)):
        keys.append(_key_formula(nodes[name].meta["val"], dims, key) if axes else key)
        for axis, how in axes.items():
            if how.dim not in sources or how.scale < sources[how.dim].scale:
                sources[how.dim] = DimSource(index, axis, how.scale, how.shift)
    return DynamicSignature(
        tuple(keys), example.in_spec, {name: sources[name] for name in dims.names}, dict(dims.ranges), dims.guard_text
    )


def _key_formula(tensor: torch.Tensor, dims: Dims, example: TensorKey) -> Formula:
    def row(values: Sequence[Any]) -> str:
        return "(" + "".join(f"{python_text(dims.expr(v))}, " for v in values) + ")"

    nbytes = python_text(sympy.expand(dims.expr(storage_bytes(tensor))))
    return Formula(f"TensorKey({row(tensor.shape)}, {row(tensor.stride())}, {tensor.dtype}, 0, {example.group}, {nbytes})")
