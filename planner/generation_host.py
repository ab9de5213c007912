"""The host's budget of a generation: one choice of homes for the programs of its phases, which read the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passes.check_host import check_hosts
from planner.shared_host import all_in_memory_bytes, has_to_spill, hosted_bytes, shares_with_homes
from planner.solve.decisions import Decisions
from planner.solve.host_split import HostSplit
from planner.solve.phases import Member, MemberShare, Stay

if TYPE_CHECKING:
    from planner.generation_problem import GenerationProblem
    from planner.plan import Plan


def shares_of(plans: Mapping[str, Plan]) -> dict[str, MemberShare]:
    """What each phase has of the device, and of the host's memory where that has a budget and not all weights fit."""
    stay: Stay = "phase" if len(plans) > 1 else "always"
    return {n: MemberShare(p.solver, p.schedule, stay, p.budget_bytes, host=p.host) for n, p in plans.items()}


def with_homes(problem: GenerationProblem, plans: dict[str, Plan]) -> dict[str, Plan]:
    """The plans with homes for their weights, where not all of them fit the host's memory.

    Raises:
        InfeasibleBudget: memory or disk has too little.
    """
    from planner.plan import Plan

    host, shares = problem.host, shares_of(plans)
    if host is None or not has_to_spill(host, hosted_bytes(shares)):
        return plans
    members = {
        phase.name: Member(
            phase.name, plans[phase.name].tilings, problem.outside_bytes(phase.name), problem.moment(phase).calls, (number,)
        )
        for number, phase in enumerate(problem.phases)
    }
    split = HostSplit(host, problem.options.machine, members, shares, in_turn=True)
    found: dict[str, Plan] = {}
    for search in (True, False):  # what was searched for may leave more on the device between two phases than there is room
        homes = shares_with_homes(split, problem.options.budget, search=search)
        for phase in problem.phases:
            share = homes[phase.name]
            options = problem.options_of(phase, share.budget_bytes, share.host)
            decisions = share.schedule.decisions(share.solver.problem)
            found[phase.name] = Plan(phase.module, options, plans[phase.name].tilings, decisions)
        if max(problem.peaks(found).values()) <= problem.options.budget.device_bytes:
            break
    return found


def given_phases(problem: GenerationProblem, given: Mapping[str, Any]) -> dict[str, Plan]:
    """The plans that a file says, by phase.

    Raises:
        PlanFileError: the decisions need more than their budget.
    """
    from planner.plan import Plan

    plans = {}
    for phase in problem.phases:
        said, host = given[phase.name], problem.host
        own = None
        if host is not None and host.held is not None:
            own = dataclasses.replace(host, budget_bytes=int(said["host_bytes"]))
        options = problem.options_of(phase, int(said["budget_bytes"]), own)
        plans[phase.name] = Plan(phase.module, options, problem.tilings[phase.name], Decisions.from_json(said))
    return plans


def proved_bytes(problem: GenerationProblem, plans: Mapping[str, Plan]) -> int | None:
    """What the phases take of the host's memory at most; None where that has no budget.

    Raises:
        CheckError: it is more than the budget, or the homes of two phases do not go together.
    """
    host = problem.host
    if host is None:
        return None
    if all(plan.host is None for plan in plans.values()):
        return all_in_memory_bytes(host, shares_of(plans))
    return check_hosts({name: plan.emitted for name, plan in plans.items()}, host.budget_bytes, in_turn=True)
