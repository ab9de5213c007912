"""The host's budget of a pipeline's plan: whether all weights fit, and if not, which part of it each program has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from planner.dry_run_calls import DryRun
from planner.host_budget import module_tensors
from planner.options import Options
from planner.pipeline import placements_of
from planner.pipeline_folder import PipelineFolder
from planner.pipeline_problem import Analyses, PipelineProblem, infeasible_pipeline, problem_of
from planner.pipeline_weights import ComponentWeights
from planner.shared_host import has_to_spill, hosted_bytes, shares_with_homes
from planner.solve.decisions import Decisions
from planner.solve.homes import HostMemory
from planner.solve.host_split import HostSplit
from planner.solve.phases import MemberShare, MemberShares
from runtime.errors import PlanFileError


def pipeline_host(root: nn.Module, options: Options, folder: PipelineFolder | None) -> HostMemory | None:
    """What was declared of the host, with the tensors of all components; None where nothing was."""
    budget = options.budget
    if budget.host_bytes is None:
        return None
    models = {} if folder is None else folder.models
    weights = ComponentWeights({name: model.weights for name, model in models.items() if model.weights is not None})
    return HostMemory(budget.host_bytes, budget.disk_bytes, module_tensors(root, weights), options.held)


def decide_shares(
    run: DryRun, options: Options, analyses: Analyses, host: HostMemory | None, given: Mapping[str, Any] | None
) -> tuple[PipelineProblem, MemberShares]:
    """What every member gets of the device, and of the host where not all weights fit there; `given` was decided before.

    Where weights come from disk, nothing is fetched over the seam of two calls: what is read for the next one and not used, as
    in the last of a phase, would be in the way of what is.

    Raises:
        InfeasibleBudget: the device, the host or the disk has too little. PlanFileError: what is given is of another pipeline.
    """
    spills = has_to_spill(host)
    problem, shares = _on_device(run, options, analyses, host, given, spills)
    if host is None or given is not None:
        return problem, shares
    if not spills and has_to_spill(host, hosted_bytes(shares)):
        problem, shares = _on_device(run, options, analyses, host, given, spills=True)
    elif not spills:
        return problem, shares
    split = HostSplit(host, options.machine, problem.budget.members, shares, needed=problem.opaque)
    shares = shares_with_homes(split, options.budget)
    if max(problem.budget.peaks(shares).values()) > options.budget.device_bytes:
        shares = shares_with_homes(split, options.budget, search=False)
    return problem, shares


def _on_device(
    run: DryRun, options: Options, analyses: Analyses, host: HostMemory | None, given: Mapping[str, Any] | None, spills: bool
) -> tuple[PipelineProblem, MemberShares]:
    problem = problem_of(run, options, analyses, spills=spills)
    budget = options.budget.device_bytes
    if budget < problem.budget.least_bytes(budget):
        raise infeasible_pipeline(problem, budget)
    return problem, problem.budget.solve(budget) if given is None else given_shares(problem, given, host)


def given_shares(problem: PipelineProblem, given: Mapping[str, Any], host: HostMemory | None) -> MemberShares:
    """Decisions that were saved, as shares.

    Raises:
        PlanFileError: they are for another pipeline.
    """
    if given.keys() != problem.programs.keys():
        raise PlanFileError("the plan has other calls than this pipeline; plan it again")
    shares = {}
    for key, saved in given.items():
        own = Decisions.from_json(saved)
        solver = problem.budget.members[key].tilings.of(own.tiling)
        schedule = solver.evaluate(placements_of(solver.problem, own), own.staging)
        memory = None
        if host is not None and host.held is not None:
            if own.homes is None:
                raise PlanFileError(
                    f"the plan says of other calls what is in the host's memory, and not of {key}; plan it again"
                )
            memory = dataclasses.replace(host, budget_bytes=int(saved["host_bytes"]))
            homes = memory.of(solver.problem).given([placed.span for placed in schedule.placements], own.homes)
            schedule = schedule.with_host(solver, homes)
        shares[key] = MemberShare(solver, schedule, saved["stay"], int(saved["budget_bytes"]), host=memory)
    return shares
