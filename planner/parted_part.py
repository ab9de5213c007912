"""A part that no explored path has called: planned when a built module in parts calls it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from planner.capture import capture, refuse_leftovers
from planner.memory import MemoryModel
from planner.names import Names
from planner.plan import Plan
from planner.shared_host import one_more, within
from planner.sizes import format_bytes
from planner.solve.decide import Solver
from planner.solve.problem import build_problem
from planner.solve.tilings import Tilings
from runtime.errors import CaptureError, InfeasibleBudget, PlannerError, UnknownSize
from runtime.parted import PartProgram
from runtime.signature import CallSignature

if TYPE_CHECKING:
    from planner.parted import PartedPlan


def replan_part(made: PartedPlan, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PartProgram | None:
    """A call that no explored path has made: planned within what is left beside the arenas and the Python around it.

    None where it cannot be captured: then its Python runs.

    Raises:
        InfeasibleBudget: it does not fit. PlannerError: its Python would have to run, and its weights may be on disk.
    """
    child = made.target.get_submodule(path)
    memory = MemoryModel.of(made.device.partition(":")[0], made.machine.capability)
    try:
        program = Names(made.target).rename(run_passes(capture(child, args, kwargs), CANONICALISE), path)
        refuse_leftovers(program)
        solver = Solver(build_problem(program, made.machine, memory, made.options.keeps_resident), pool=False)
    except (CaptureError, UnknownSize) as error:
        if made.spills:
            raise PlannerError(
                f"{path} is called as no explored path has called it, and cannot be captured so ({error}); some of its weights "
                "may be on disk, where its Python cannot read them. Give 'cpu' of the budget more, or plan with inputs that "
                "make this call"
            ) from error
        return None
    kept = [made.parts[key].layout for key in made.kept]
    arenas = sum(layout.resident_bytes + layout.staging_bytes + layout.state_bytes for layout in kept)
    room = made.budget_bytes - arenas - made.python_bytes
    if room < solver.minimum.peak_bytes:
        raise InfeasibleBudget(
            f"{path} is called as no explored path has called it, which takes at least "
            f"{format_bytes(solver.minimum.peak_bytes)}; {format_bytes(max(room, 0))} are left of the budget of "
            f"{format_bytes(made.budget_bytes)}. Plan with a larger budget, or with inputs that make this call",
            budget_bytes=room,
            minimum_bytes=solver.minimum.peak_bytes,
            node=path,
        )
    schedule, own = solver.pass_through(room), None
    if made.host is not None and made.spills:
        own = one_more(made.host, made.held_now or {})
        homes = own.of(solver.problem).plan([placed.span for placed in schedule.placements])
        schedule = schedule.with_host(solver, homes)
    options = dataclasses.replace(made.options, method="forward", args=args, kwargs=kwargs)
    options = within(options, room, own)
    plan = Plan(child, options, Tilings(solver), schedule.decisions(solver.problem))
    return PartProgram(path, CallSignature.of(args, kwargs)[0], plan.executable, kept=False)
