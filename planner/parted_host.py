"""The host's budget of a model in parts: one choice of homes for the parts' programs. What Python reads is in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from passes.check_host import check_hosts
from planner.options import Options
from planner.parted_problem import PartedProblem
from planner.shared_host import all_in_memory_bytes, has_to_spill, shares_with_homes
from planner.solve.decisions import Decisions
from planner.solve.homes import HostMemory
from planner.solve.host_split import HostSplit
from planner.solve.phases import Member, MemberShare
from planner.solve.share import Shares
from planner.solve.tilings import Tilings
from runtime.errors import PlanFileError

if TYPE_CHECKING:
    from planner.plan import Plan


@dataclass(frozen=True, eq=False)
class PartedShares:
    """What every part gets. `host`: what was declared; `memory`: what each has of it, empty where all weights are there."""

    problem: PartedProblem
    shares: Shares
    host: HostMemory | None = None
    memory: Mapping[str, HostMemory] = field(default_factory=dict)

    @property
    def members(self) -> dict[str, MemberShare]:
        return _members(self.problem, self.shares, self.memory)

    @property
    def held(self) -> Mapping[str, int] | None:
        """The weights in the host's memory, with their bytes; None where all are."""
        return next((memory.held for memory in self.memory.values()), None)

    def loaded_read_bytes(self, key: str) -> int:
        """From disk before each call of a part; nothing where its arenas stay."""
        return 0 if self.shares.parts[key].kept else self.members[key].loaded_read_bytes

    @property
    def load_seconds(self) -> float:
        """How much longer what is loaded before calls takes from disk than from memory."""
        shared, found = self.problem.shared, 0.0
        for key, member in self.members.items():
            if not self.shares.parts[key].kept:
                own = shared.machine.load_seconds(member.loaded_bytes, member.loaded_read_bytes)
                found += shared.parts[key].calls * max(0.0, own - shared.machine.copy_seconds(member.loaded_bytes))
        return found

    def prove(self, parts: Mapping[str, Plan]) -> int | None:
        """What is taken of the host's memory at most; None where that has no budget.

        Raises:
            CheckError, PlanFileError: it is more than the budget, or what Python reads is on disk.
        """
        if self.host is None:
            return None
        if not self.memory:
            return all_in_memory_bytes(self.host, self.members)
        lacking = min(opaque_of(self.problem) - (self.held or {}).keys(), default=None)
        if lacking is not None:
            raise PlanFileError(f"I3: Python reads {lacking}, which is on disk; plan the model again")
        return check_hosts({key: part.emitted for key, part in parts.items()}, self.host.budget_bytes)


def opaque_of(problem: PartedProblem) -> frozenset[str]:
    """The names of the weights that the module's own Python reads."""
    return frozenset(name for names in problem.exploration.weights.values() for name in names)


def _members(problem: PartedProblem, shares: Shares, memory: Mapping[str, HostMemory]) -> dict[str, MemberShare]:
    return {
        key: MemberShare(
            problem.solvers[key],
            share.schedule,
            "always" if share.kept else "call",
            share.budget_bytes,
            host=memory.get(key),
        )
        for key, share in shares.parts.items()
    }


def decide(problem: PartedProblem, options: Options, host: HostMemory | None) -> PartedShares:
    """The shares within the device's budget, with homes for their weights where not all of them fit the host's memory.

    Raises:
        InfeasibleBudget: memory or disk has too little.
    """
    budget = options.budget.device_bytes
    shares = problem.shared.solve(budget)
    if host is None or not shares.parts or not has_to_spill(host):
        return PartedShares(problem, shares, host)
    members = {
        key: Member(key, Tilings(solver), 0, problem.exploration.calls[key], (0,)) for key, solver in problem.solvers.items()
    }
    split = HostSplit(host, options.machine, members, _members(problem, shares, {}), needed=opaque_of(problem))
    found = shares
    memory: dict[str, HostMemory] = {}
    for search in (True, False):  # what was searched for may keep more between calls than there is room
        homes = shares_with_homes(split, options.budget, search=search)
        parts = {key: dataclasses.replace(shares.parts[key], schedule=share.schedule) for key, share in homes.items()}
        memory = {key: share.host for key, share in homes.items() if share.host is not None}
        found = dataclasses.replace(shares, parts=parts)
        if problem.shared.peak_bytes(found, {key: share.schedule.peak_bytes for key, share in parts.items()}) <= budget:
            break
    return PartedShares(problem, found, host, memory)


def given(problem: PartedProblem, shares: Shares, decisions: Mapping[str, Any], host: HostMemory | None) -> PartedShares:
    """The shares that a file says, with the homes that it says.

    Raises:
        PlanFileError: it does not say them of all parts.
    """
    if host is None or host.held is None:
        return PartedShares(problem, shares, host)
    parts, memory = {}, {}
    for key, share in shares.parts.items():
        own = Decisions.from_json(decisions["parts"][key])
        if own.homes is None:
            raise PlanFileError(f"the plan says of other parts what is in the host's memory, and not of {key}; plan it again")
        memory[key] = dataclasses.replace(host, budget_bytes=int(decisions["parts"][key]["host_bytes"]))
        spans = [placed.span for placed in share.schedule.placements]
        homes = memory[key].of(problem.solvers[key].problem).given(spans, own.homes)
        parts[key] = dataclasses.replace(share, schedule=share.schedule.with_host(problem.solvers[key], homes))
    return PartedShares(problem, dataclasses.replace(shares, parts=parts), host, memory)
