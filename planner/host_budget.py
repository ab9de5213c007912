"""The budget of the host: what the module's weights are there, and what to say where memory or disk do not suffice."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from planner.options import Options
from planner.sizes import format_bytes
from planner.solve.decide import Schedule
from planner.solve.decisions import Decisions
from planner.solve.homes import HostMemory, ModuleTensor
from planner.solve.problem import Problem
from runtime.errors import InfeasibleBudget, PlanFileError
from runtime.origins import named_tensors, view_of


def host_memory(target: nn.Module, options: Options) -> HostMemory | None:
    """What was declared of the host, with the module's tensors; None where nothing was."""
    budget = options.budget
    if budget.host_bytes is None:
        return None
    return HostMemory(budget.host_bytes, budget.disk_bytes, module_tensors(target, options), options.held)


def module_tensors(target: nn.Module, options: Options) -> tuple[ModuleTensor, ...]:
    """Every parameter and buffer once."""
    names: dict[int, list[str]] = {}
    tensors = named_tensors(target)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    weights = None if options.folder is None else options.folder.weights
    found = []
    for own in names.values():
        view = view_of(own[0], tensors[own[0]])
        places = [] if weights is None else [weights.place(name) for name in own]
        in_file = any(place is not None and place.is_laid_out_as(view) for place in places)
        found.append(ModuleTensor(frozenset(own), view.nbytes, in_file))
    return tuple(found)


def given_homes(schedule: Schedule, problem: Problem, host: HostMemory | None, decisions: Decisions) -> Schedule:
    """With the homes that were decided, where the host's memory has a budget.

    Raises:
        PlanFileError: there are none.
    """
    if host is None:
        return schedule
    if decisions.homes is None:
        raise PlanFileError("the budget has host memory, and the decisions do not say what is there; plan the model again")
    return replace(schedule, host=host.of(problem).given([p.span for p in schedule.placements], decisions.homes))


def refuse_full_disk(host: HostMemory, problem: Problem, schedule: Schedule) -> None:
    """Raises InfeasibleBudget where what would be written to disk is more than was declared for that."""
    if schedule.host is None or host.disk_bytes is None or schedule.host.scratch_bytes <= host.disk_bytes:
        return
    least = schedule.host.scratch_bytes
    raise InfeasibleBudget(
        f"disk budget {format_bytes(host.disk_bytes)} ({host.disk_bytes} B); the least possible beside "
        f"{format_bytes(host.budget_bytes)} of host memory is {format_bytes(least)} ({least} B) of disk, for the weights that "
        f"are not in memory. Write budget={{..., 'disk': {least}}}, or give 'cpu' more",
        budget_bytes=host.disk_bytes,
        minimum_bytes=least,
        node=problem.liveness.nodes[0].name,
        memory="disk",
    )
