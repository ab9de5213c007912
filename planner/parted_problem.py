"""The problem of a plan in parts: what was explored of a module, and a solver for each of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from passes.calibrate import calibrating
from passes.probe import Prober
from planner.explore import Exploration, explore
from planner.memory import MemoryModel
from planner.names import Names
from planner.options import Options, check_patterns
from planner.pipeline import placements_of
from planner.progress import working
from planner.refuse import refuse_shared_state
from planner.sizes import format_bytes
from planner.solve.decide import Solver
from planner.solve.decisions import Decisions
from planner.solve.problem import build_problem
from planner.solve.share import Moments, PartInPlace, Share, SharedBudget, Shares
from runtime.errors import InfeasibleBudget, PlanFileError
from runtime.layout import align
from runtime.signature import bind_call


@dataclasses.dataclass(frozen=True, eq=False)
class PartedProblem:
    """What was explored of a module, with a solver for each part: all that does not depend on the budget."""

    exploration: Exploration
    solvers: Mapping[str, Solver]
    shared: SharedBudget


def prepare_parts(model: nn.Module, options: Options, reason: str) -> PartedProblem:
    """Explores the module, which cannot be captured whole for `reason`, and analyses its parts.

    Raises:
        UnknownSize: bytes of its Python depend on values, and nobody says how many; names the module.
        CaptureError: its Python fails on fakes.
    """
    call = bind_call(getattr(model, options.method), options.args, options.kwargs)
    kind = options.device.partition(":")[0]
    title = f"exploring {type(model).__name__}.{options.method}, which cannot be captured whole"
    with working(title), calibrating(kind) as calibrator:
        # On `accounting` what is dispatched is all there is, and exploring sees that itself.
        prober = Prober(kind, options.machine.capability, calibrator) if kind != "accounting" else None
        found = explore(model, call, options.method, reason=reason, opaque_bytes=options.opaque_bytes, prober=prober)
    for part in found.parts.values():
        refuse_shared_state(model, part.program)
    check_patterns(options.keep, list(Names(model).tensors))
    return problem_of(model, options, found)


def problem_of(model: nn.Module, options: Options, found: Exploration) -> PartedProblem:
    """What was explored, for the machine and device of the options."""
    memory = MemoryModel.of(options.device.partition(":")[0], options.machine.capability)
    profiler = options.profiler  # one, so that its time is for all of them
    solvers = {
        key: Solver(build_problem(part.program, options.machine, memory, options.keeps_resident, profiler), pool=False)
        for key, part in found.parts.items()
    }
    names = Names(model)
    around = {key: _with(moments, found.left) for key, moments in found.outside.items()}
    places = {key: PartInPlace(solver, around[key], found.calls[key]) for key, solver in solvers.items()}
    opaque = {
        path: sum(align(names.nbytes(name), memory.weight_alignment) for name in weights)
        for path, weights in found.weights.items()
        if weights
    }
    python = _with(found.python, found.left)
    return PartedProblem(found, solvers, SharedBudget(options.machine, places, python, opaque, not options.offload))


def _with(moments: Moments, left: int) -> Moments:
    """With what the call before has left on the module."""
    return {running: nbytes + left for running, nbytes in moments.items()}


def given_shares(problem: PartedProblem, decisions: Mapping[str, Any]) -> Shares:
    """The shares that a file says.

    Raises:
        PlanFileError: it lacks a part, or has one more.
    """
    given, opaque = decisions["parts"], frozenset(decisions["opaque"])
    if set(given) != set(problem.solvers) or not opaque <= problem.shared.opaque_bytes.keys():
        raise PlanFileError("the plan has other parts than this model; plan the model again")
    shares = {}
    for key, solver in problem.solvers.items():
        own = Decisions.from_json(given[key])
        schedule = solver.evaluate(placements_of(solver.problem, own), own.staging)
        shares[key] = Share(schedule, bool(given[key]["kept"]), int(given[key]["budget_bytes"]))
    return Shares(shares, opaque)


def infeasible_parts(target: nn.Module, options: Options, problem: PartedProblem) -> InfeasibleBudget:
    shared, found, asked = problem.shared, problem.exploration, options.budget.device_bytes
    key, least = shared.tightest(), shared.minimum_bytes
    if key is None:
        place = found.python_at or type(target).__name__
        made_of = "its Python, which runs as it is, and the weights it reads"
    else:
        place, own = key, shared.parts[key].solver.minimum.peak_bytes
        made_of = f"the part itself {format_bytes(own)} + around it {format_bytes(least - own)}"
    return InfeasibleBudget(
        f"budget {format_bytes(asked)} ({asked} B); the least possible is {format_bytes(least)} ({least} B), at {place} "
        f"({made_of}); what would help: smaller inputs (batch, tokens, height), or a model that can be captured whole",
        budget_bytes=asked,
        minimum_bytes=least,
        node=place,
    )
