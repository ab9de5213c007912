"""The budget of the host: what the module's weights are there, and what to say where memory or disk do not suffice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from planner.options import Options
from planner.sizes import format_bytes
from planner.solve.decide import Schedule, Solver
from planner.solve.decisions import Decisions
from planner.solve.homes import PAGE_BYTES, HostMemory, ModuleTensor, homes_of
from planner.solve.problem import Problem
from runtime.errors import InfeasibleBudget, PlanFileError
from runtime.layout import align
from runtime.origins import named_tensors, view_of
from runtime.weight_file import FileTensor

# Of any device's.
_MOST_ALIGNMENT = 512


class Places(Protocol):
    """Files that have weights."""

    def place(self, name: str) -> FileTensor | None:
        """Where one is, or None where it is in none of them."""
        ...


def host_memory(target: nn.Module, options: Options) -> HostMemory | None:
    """What was declared of the host, with the module's tensors; None where nothing was."""
    budget = options.budget
    if budget.host_bytes is None:
        return None
    tensors = _tensors_of(target, options) if options.tensors is None else options.tensors
    return HostMemory(budget.host_bytes, budget.disk_bytes, tensors, options.held)


def _tensors_of(target: nn.Module, options: Options) -> tuple[ModuleTensor, ...]:
    return module_tensors(target, None if options.folder is None else options.folder.weights)


def module_tensors(target: nn.Module, weights: Places | None) -> tuple[ModuleTensor, ...]:
    """Every parameter and buffer once. `weights`: the files that have them, if any do."""
    names: dict[int, list[str]] = {}
    tensors = named_tensors(target)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found = []
    for own in names.values():
        view = view_of(own[0], tensors[own[0]])
        places = [] if weights is None else [weights.place(name) for name in own]
        in_file = any(place is not None and place.is_laid_out_as(view) for place in places)
        found.append(ModuleTensor(frozenset(own), view.nbytes, in_file))
    return tuple(found)


def given_homes(schedule: Schedule, solver: Solver, host: HostMemory | None, decisions: Decisions) -> Schedule:
    """With the homes that were decided, where the host's memory has a budget.

    Raises:
        PlanFileError: there are none.
    """
    if host is None:
        return schedule
    if decisions.homes is None:
        raise PlanFileError("the budget has host memory, and the decisions do not say what is there; plan the model again")
    homes = host.of(solver.problem).given([p.span for p in schedule.placements], decisions.homes)
    return schedule.with_host(solver, homes)


def refuse_full_disk(host: HostMemory, problem: Problem, schedule: Schedule) -> None:
    """Raises InfeasibleBudget where what would be written to disk is more than was declared for that."""
    if schedule.host is not None and host.disk_bytes is not None and schedule.host.scratch_bytes > host.disk_bytes:
        beside = f"{format_bytes(host.budget_bytes)} of host memory"
        raise too_little_disk(host.disk_bytes, schedule.host.scratch_bytes, f"beside {beside} ", ", or give 'cpu' more")


def refuse_full_disk_on_cpu(problem: Problem, target: nn.Module, options: Options) -> None:
    """As `refuse_full_disk` on the device "cpu", where every weight is on disk."""
    most = options.budget.disk_bytes
    if most is None or options.device != "cpu":
        return
    tensors, alignment = _tensors_of(target, options), problem.memory.weight_alignment
    in_file = {name for tensor in tensors if tensor.in_file for name in tensor.names}
    read = homes_of(problem)
    weights = (*problem.program.weights.values(), *problem.program.tables.values())
    # What is stored otherwise stays where it is: it is not moved.
    known = {name for w in weights for name in ((w.name, *w.aliases) if w.stored is None else (w.stored.weight,))}
    least = sum(nbytes for name, nbytes in read.items() if name not in in_file)
    least += sum(align(t.nbytes, alignment) for t in tensors if not t.in_file and not t.names & known)
    if least > most:
        raise too_little_disk(most, least, "", "")


def too_little_disk(disk_bytes: int, least: int, beside: str, other: str) -> InfeasibleBudget:
    """What to say where that is less than what would be written. `beside` which memory, and what `other` would help."""
    return InfeasibleBudget(
        f"disk budget {format_bytes(disk_bytes)} ({disk_bytes} B); the least possible {beside}is {format_bytes(least)} "
        f"({least} B) of disk, for the weights that are not in memory and in no file yet. Write "
        f"budget={{..., 'disk': {least}}}{other}",
        budget_bytes=disk_bytes,
        minimum_bytes=least,
        node="",
        memory="disk",
    )


def all_bytes(tensors: Iterable[ModuleTensor]) -> int:
    """What all weights take in the host's memory, in whole pages."""
    return align(sum(align(tensor.nbytes, _MOST_ALIGNMENT) for tensor in tensors), PAGE_BYTES)
