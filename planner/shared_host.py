"""One budget of the host's memory for several programs: whether all weights fit it, and if not, which part each program has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from planner.budget import Budget
from planner.host_budget import all_bytes, too_little_disk
from planner.options import Options
from planner.sizes import format_bytes
from planner.solve.homes import PAGE_BYTES, HostMemory
from planner.solve.host_split import HostSplit, spare_bytes
from planner.solve.phases import MemberShares
from runtime.errors import InfeasibleBudget, PlanFileError, PlannerError
from runtime.layout import align

Own = TypeVar("Own", bound=Options)


def has_to_spill(host: HostMemory | None, hosted_bytes: int = 0) -> bool:
    """Whether some weights have to be on disk, or are there already. `hosted_bytes`: what values of calls take in memory."""
    return host is not None and (host.held is not None or all_bytes(host.tensors) + hosted_bytes > host.budget_bytes)


def hosted_bytes(shares: MemberShares) -> int:
    """The most that the values of a call take on the host, in whole pages."""
    return align(max((share.solver.problem.hosted[1] for share in shares.values()), default=0), PAGE_BYTES)


def all_in_memory_bytes(host: HostMemory, shares: MemberShares) -> int:
    """What members take that have all weights there.

    Raises:
        PlanFileError: it is more than the budget, which only what a file says can be.
    """
    nbytes = all_bytes(host.tensors) + hosted_bytes(shares)
    if nbytes > host.budget_bytes:
        raise PlanFileError(
            f"I1: the host's memory takes {format_bytes(nbytes)} with all weights, more than its budget of "
            f"{format_bytes(host.budget_bytes)}, and nothing says which are on disk; make the plan again"
        )
    return nbytes


def within(options: Own, room: int, host: HostMemory | None) -> Own:
    """The options of a member that has `room` on the device, and so much of the host's memory, where not all weights fit."""
    if host is None:
        return dataclasses.replace(options, budget=Budget(room))
    budget = Budget(room, host.budget_bytes, host.disk_bytes)
    return dataclasses.replace(options, budget=budget, held=host.held, tensors=host.tensors)


def one_more(host: HostMemory, held: Mapping[str, int]) -> HostMemory:
    """What is kept of the host's memory for one more program, beside those of any plan of what is built."""
    return dataclasses.replace(host, budget_bytes=align(sum(held.values()), PAGE_BYTES) + spare_bytes(host), held=held)


def shares_with_homes(split: HostSplit, budget: Budget, *, search: bool = True) -> MemberShares:
    """The shares with homes for their weights. Without `search` the copies stay as they were decided.

    Raises:
        InfeasibleBudget: memory or disk has too little. PlannerError: what has to be in memory was put on disk before.
    """
    there = split.needed if split.host.held is None else split.host.held.keys()
    lacking = min(split.needed - there, default=None)
    if lacking is not None:
        raise PlannerError(
            f"{lacking} is on disk since p.build(), and Python reads it in this call; p.restore(), and plan with that call"
        )
    if split.least_bytes > split.host.budget_bytes:
        raise _too_little(split, budget)
    shares = split.solve(search=search)
    held = next(iter(shares.values())).host
    assert held is not None
    assert held.held is not None
    written = split.scratch_bytes(held.held)
    if budget.disk_bytes is not None and written > budget.disk_bytes:
        beside = f"beside {format_bytes(split.host.budget_bytes)} of host memory "
        raise too_little_disk(budget.disk_bytes, written, beside, ", or give 'cpu' more")
    return shares


def _too_little(split: HostSplit, budget: Budget) -> InfeasibleBudget:
    host = split.host.budget_bytes
    values = [share.solver.problem.hosted[1] for share in split.shares.values()]
    hosted = max(values) if split.in_turn else sum(values)
    rings = "a ring through which in turn" if split.in_turn else "rings through which"
    made_of = f"{rings} the weights of {len(split.shares)} programs come from disk"
    least, everything = split.least_bytes, all_bytes(split.host.tensors) + hosted_bytes(split.shares)
    if split.host.held is None and everything <= least:
        least, made_of = everything, "all weights"
    elif split.needed:
        made_of += f", and {format_bytes(split.needed_bytes)} of weights that Python reads"
    said = f", and {format_bytes(hosted)} of values on the host" if hosted else ""
    return InfeasibleBudget(
        f"host budget {format_bytes(host)} ({host} B); the least possible beside {format_bytes(budget.device_bytes)} on the "
        f"device is {format_bytes(least)} ({least} B) of host memory: {made_of}{said}. Write budget={{..., 'cpu': {least}}}"
        + (", or give the device more" if hosted else ""),
        budget_bytes=host,
        minimum_bytes=least,
        node="",
        memory="cpu",
    )
