"""From a pipeline's plan to the pipeline that runs it: where weights come from, and what is planned while it runs."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any, Literal

import torch

from planner.pipeline_captured import ProgramOfCall
from planner.pipeline_problem import member_options
from planner.plan import Plan
from planner.progress import transferring
from planner.shared_host import one_more, within
from planner.sizes import format_bytes
from planner.solve.homes import HostMemory
from planner.solve.phases import arenas_of
from planner.weights import Lookup
from runtime.devices import open_device
from runtime.errors import CaptureError, InfeasibleBudget, PlannerError, UnknownSize
from runtime.origins import has_no_bytes, named_tensors
from runtime.pipeline import PipelineRunner
from runtime.pipeline_programs import PipelineProgram, Planners

if TYPE_CHECKING:
    from planner.pipeline_plan import PipelinePlan

log = logging.getLogger("vramplan")


def build_runner(plan: PipelinePlan, lookup: Lookup | None, concurrent: Literal["wait", "raise"]) -> PipelineRunner:
    """Takes the pipeline over; whatever goes wrong, it is as before."""
    planners = Planners(
        again=lambda call: plan.of_call(call).programs(),
        one=functools.partial(_plan_one, plan),
        part=functools.partial(_plan_part, plan),
        anew=functools.partial(_plan_anew, plan, concurrent),
    )
    runner = PipelineRunner(
        plan._analyses.root,
        plan.target,
        open_device(plan.device, plan.budget.disk_bytes),
        plan.budget_bytes,
        plan.machine.link_peak_bandwidth,
        planners,
        concurrent,
    )
    with transferring(f"moving the weights of {plan.title} into the host arena") as runner.moved:
        runner.attach_pipeline(plan.options.kwargs, plan.programs(), lookup)
    return runner


def _plan_one(plan: PipelinePlan, path: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineProgram:
    """A single call of a component that no run of the pipeline makes so, within what is left beside what stays.

    Raises:
        InfeasibleBudget: it does not fit. PlannerError: it cannot be captured.
    """
    analyses, shared = plan._analyses, plan._problem.budget
    try:
        made = analyses.captures.of(path, method, args, kwargs)
    except CaptureError as error:
        raise PlannerError(
            f"{path}.{method} is called as the pipeline does not call it, and so it cannot be captured whole ({error}); spell "
            "the call as the pipeline does, or call it before p.build()"
        ) from error
    kept = arenas_of(share for share in plan._shares.values() if share.stay == "always")
    held = max([shared.python_bytes, *(member.outside_bytes for member in shared.members.values())])
    room = plan.budget_bytes - kept - held - shared.state_bytes
    return _single(plan, made, room, f"{path}.{method} is called as the pipeline does not call it", "call it before p.build()")


def _single(plan: PipelinePlan, made: ProgramOfCall, room: int, what: str, instead: str) -> PipelineProgram:
    """The program of a call that comes once and goes, within so much of the device and what is kept for it of the host.

    Raises:
        InfeasibleBudget: one of them has too little; says `what` happens, and what to do `instead` of a larger budget.
    """
    tilings = plan._analyses.tilings(made, plan.options, 1)
    least = tilings.least_bytes(room)
    if room < least:
        raise InfeasibleBudget(
            f"{what}, which takes at least {format_bytes(least)}; {format_bytes(max(room, 0))} are left of the budget of "
            f"{format_bytes(plan.budget_bytes)}. Plan with a larger budget, or {instead}",
            budget_bytes=room,
            minimum_bytes=least,
            node=made.path,
        )
    key, host = f"{made.path}.{made.method}", _beside(plan)
    try:
        solver, schedule = tilings.solve(room, host)
    except InfeasibleBudget as error:
        raise _no_room_on_the_host(plan, key, error) from None
    options = within(member_options(plan.options, made), room, host)
    own = Plan(plan._analyses.root.get_submodule(made.path), options, tilings, schedule.decisions(solver.problem))
    return PipelineProgram(key, made.path, made.method, made.signature, own.executable, "call", settings=made.settings)


def _plan_part(plan: PipelinePlan, key: str, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineProgram:
    """A call that a component's own Python makes and no explored path has made: beside that Python alone, with no arenas.

    Raises:
        InfeasibleBudget: it does not fit. PlannerError: it cannot be captured.
    """
    analyses, problem = plan._analyses, plan._problem
    try:
        made = analyses.captures.of_part(path, args, kwargs)
    except (CaptureError, UnknownSize) as error:
        raise PlannerError(
            f"{path} is called as no explored path of {key} has called it, and cannot be captured so ({error}); plan the "
            "pipeline with a call that takes this path, or p.restore() and call it without a plan"
        ) from error
    room = plan.budget_bytes - problem.within_bytes[key] - problem.budget.state_bytes
    what = f"{path} is called as no explored path of {key} has called it"
    return _single(plan, made, room, what, "with a call that takes this path")


def _beside(plan: PipelinePlan) -> HostMemory | None:
    """What is kept of the host's memory for one more program, beside those of any plan; None where all weights are there."""
    host = next((share.host for share in plan._shares.values() if share.host is not None), None)
    if host is None:
        return None
    return one_more(host, plan.held_now or {})


def _no_room_on_the_host(plan: PipelinePlan, call: str, error: InfeasibleBudget) -> InfeasibleBudget:
    budget = plan.budget.host_bytes or 0
    least = budget + error.minimum_bytes - error.budget_bytes
    return InfeasibleBudget(
        f"{call} is called as the pipeline does not call it, for which the host's budget of {format_bytes(budget)} would "
        f"have to be {format_bytes(least)}. Plan with budget={{..., 'cpu': {least}}}, or call it before p.build()",
        budget_bytes=budget,
        minimum_bytes=least,
        node=call,
        memory="cpu",
    )


def _plan_anew(
    plan: PipelinePlan, concurrent: Literal["wait", "raise"], changed: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Something about a component is different, such as an adapter that was loaded: everything is planned and built again.

    Raises:
        PlannerError: that cannot be; the pipeline is then as it was before it was planned, the change included.
    """
    from planner.pipeline_plan import PipelinePlan

    log.info("%s: %s; planning and building again", plan.title, changed)
    pipe, runner = plan.target, plan.runner
    assert runner is not None
    call = plan.call_of(args, kwargs)
    runner.close()
    lines = f"p = plan(pipe, budget={plan.budget_bytes}, call=dict(...))\npipe = p.build()"
    missing = next((name for name, t in named_tensors(plan._analyses.root).items() if has_no_bytes(t)), None)
    if missing is not None:
        raise PlannerError(
            f"{changed}, and the components were built from weights given to build(): {missing!r} has no values without them. "
            f"Load the weights into the pipeline first, change it then, and plan it:\n{lines}"
        )
    try:
        fresh = PipelinePlan.of(pipe, dataclasses.replace(plan.options, kwargs=call, held=None))
        with torch.inference_mode(False):
            plan._become(fresh, concurrent)
    except PlannerError as error:
        raise PlannerError(
            f"{changed}, and the pipeline cannot be planned so: {error}. It runs without a plan now. Change it, or plan it "
            f"with a larger budget:\n{lines}"
        ) from error
    return pipe(*args, **kwargs)
