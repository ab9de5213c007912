"""One budget of the host's memory for programs that share it, split once and for all before they run.

The homes of weights are chosen for all members together, so that those that read the same agree. Memory has first what is read
most often in a run; of what is read as often and does not fit, what goes to disk is spread over the time. Every member has a
ring of its own and room for its values on the host: also while others run, or, where one is loaded at a time, in its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from planner.machine import Machine
from planner.solve.homes import PAGE_BYTES, HostMemory, home_of, homes_of, least_ring_bytes, rings, spread
from planner.solve.phases import Member, MemberShare, MemberShares
from planner.solve.problem import Problem
from runtime.layout import align

# How often something is read in a run, and when, by the name of its home.
_Uses = tuple[dict[str, int], dict[str, float]]


@dataclass(frozen=True, eq=False)
class HostSplit:
    """The problem: schedules as they were decided for the device alone. `host` is what was declared for all of them.

    Where `host` says what is in memory already, of what is built, that stays there. `in_turn`: one member is loaded at a time.
    `needed`: the names of weights that have to be in memory, since no program reads them there.
    """

    host: HostMemory
    machine: Machine
    members: Mapping[str, Member]
    shares: MemberShares
    in_turn: bool = False
    needed: frozenset[str] = frozenset()

    @cached_property
    def problems(self) -> dict[str, Problem]:
        return {key: share.solver.problem for key, share in self.shares.items()}

    @property
    def least_bytes(self) -> int:
        """The least budget for these schedules: nothing in memory but what has to be."""
        return self._given_bytes + self._beside(self._least)

    def _beside(self, own: Mapping[str, int]) -> int:
        """What rings and values take that have `own` bytes, with what is kept for a call that is planned later."""
        if self.in_turn:
            return max(spare_bytes(self.host), *own.values())
        return spare_bytes(self.host) + sum(own.values())

    def solve(self, *, search: bool = True) -> dict[str, MemberShare]:
        """Schedules with homes, each within memory of its own; requires that the budget is at least the least.

        Without `search` the copies stay as they were decided.
        """
        own = self._usual if self._left(self._usual) >= 0 else self._least
        held = self._chosen(self._left(own)) if self.host.held is None else self.host.held
        held_bytes = align(sum(held.values()), PAGE_BYTES)
        found = {}
        for key, share in self.shares.items():
            memory = replace(self.host, budget_bytes=held_bytes + own[key], held=held)
            found[key] = self._with_homes(key, replace(share, host=memory), search)
        return found

    def scratch_bytes(self, held: Mapping[str, int]) -> int:
        """What is written to disk: what is not `held` and in no file either."""
        in_file = {name for tensor in self.host.tensors if tensor.in_file for name in tensor.names}
        homes: dict[str, int] = {}
        read: set[str] = set()
        for problem in self.problems.values():
            homes |= homes_of(problem)
            weights = (*problem.program.weights.values(), *problem.program.tables.values())
            read |= {name for w in weights if w.stored is None for name in (w.name, *w.aliases)}
        alignment = max(problem.memory.weight_alignment for problem in self.problems.values())
        others = [t for t in self.host.tensors if not t.in_file and not t.names & (read | held.keys())]
        own = sum(nbytes for home, nbytes in homes.items() if home not in held and home not in in_file)
        return own + sum(align(tensor.nbytes, alignment) for tensor in others)

    @property
    def _given_bytes(self) -> int:
        return align(sum((self._needed if self.host.held is None else self.host.held).values()), PAGE_BYTES)

    @property
    def needed_bytes(self) -> int:
        return sum(self._needed.values())

    @cached_property
    def _needed(self) -> dict[str, int]:
        alignment = max(problem.memory.weight_alignment for problem in self.problems.values())
        tensors = {name: align(tensor.nbytes, alignment) for tensor in self.host.tensors for name in tensor.names}
        return {name: tensors[name] for name in sorted(self.needed)}

    @cached_property
    def _alone(self) -> HostMemory:
        """What each would have if all had the same."""
        return HostMemory(self.host.budget_bytes // (1 if self.in_turn else len(self.shares)))

    @cached_property
    def _least(self) -> dict[str, int]:
        """Of each member's ring and values."""
        own = {key: self._alone.of(problem) for key, problem in self.problems.items()}
        return {key: each.hosted_bytes + each.least_ring_bytes for key, each in own.items()}

    @cached_property
    def _usual(self) -> dict[str, int]:
        own = {key: self._alone.of(problem) for key, problem in self.problems.items()}
        return {key: each.hosted_bytes + each.usual_ring_bytes for key, each in own.items()}

    def _left(self, own: Mapping[str, int]) -> int:
        """For weights."""
        return self.host.budget_bytes - self._given_bytes - self._beside(own)

    def _chosen(self, room: int) -> dict[str, int]:
        """The homes in memory, with their bytes: what is read most often first, then tables, then what is read once."""
        reads, at = self._uses()
        nbytes: dict[str, int] = {}
        for problem in self.problems.values():
            nbytes |= homes_of(problem)
        tables = {name for problem in self.problems.values() for name in problem.program.tables}
        held = dict(self._needed)
        left = room // PAGE_BYTES * PAGE_BYTES
        for rank in sorted({(reads[home], home in tables) for home in nbytes}, reverse=True):
            order = [home for home in sorted(at, key=at.__getitem__) if home not in self._needed]
            alike = {home: at[home] for home in order if (reads[home], home in tables) == rank}
            if not alike:
                continue
            excess = sum(nbytes[home] for home in alike) - left
            spilled = spread(alike, nbytes, excess, max(alike.values())) if excess > 0 else set()
            for home in alike:
                if home not in spilled:
                    held[home] = nbytes[home]
                    left -= nbytes[home]
        return held

    def _uses(self) -> _Uses:
        reads: dict[str, int] = {}
        at: dict[str, float] = {}
        before = 0.0
        for key, share in self.shares.items():
            problem = self.problems[key]
            elapsed = problem.elapsed
            streamed = {w: placed.span.last + 1 for placed in share.schedule.placements for w in placed.span.weights}
            for placeholder, weight in problem.program.weights.items():
                if weight.made:
                    continue
                home, times = home_of(weight), self.members[key].calls
                if placeholder not in streamed:
                    times = 0 if weight.state else self._loads(key)
                reads[home] = reads.get(home, 0) + times
                at.setdefault(home, before + float(elapsed[streamed.get(placeholder, 0)]))
            for table in problem.program.tables.values():
                reads.setdefault(home_of(table), 0)
                at.setdefault(home_of(table), before)
            before += float(elapsed[-1])
        return reads, at

    def _loads(self, key: str) -> int:
        """How often its resident weights come in a run."""
        member = self.members[key]
        return {"always": 0, "phase": len(member.phases), "call": member.calls}[self.shares[key].stay]

    def _with_homes(self, key: str, share: MemberShare, search: bool) -> MemberShare:
        """The schedule as it is with its homes, or one that was found for them, where that is faster."""
        assert share.host is not None
        solver, placements = share.solver, share.schedule.placements
        own = share.host.of(solver.problem)
        found = [share.schedule.with_host(solver, homes) for homes in rings(own, [placed.span for placed in placements])]
        if search and share.stay != "call":
            found.append(solver.solve(share.budget_bytes, share.host))
        return min((replace(share, schedule=each) for each in found), key=lambda each: self._seconds(key, each))

    def _seconds(self, key: str, share: MemberShare) -> float:
        load = self.machine.load_seconds(share.loaded_bytes, share.loaded_read_bytes)
        return self.members[key].calls * share.schedule.time.step_seconds + self._loads(key) * load


def spare_bytes(host: HostMemory) -> int:
    """Kept for the ring of a call that was not planned, the same for every plan of the same weights."""
    return least_ring_bytes(sum(tensor.nbytes for tensor in host.tensors))
