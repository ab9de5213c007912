"""One budget over the phases of a pipeline: what stays on the device between its calls, what goes, what comes when.

A member (one call of a component, as a program) stays *always*, *phase* by phase (from its first call in one to the last), or
for one *call*: then its weights come in every call and go after it. The pipeline's own Python holds tensors beside all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from passes.program import Weight
from planner.machine import Machine
from planner.solve.decide import Schedule, Solver
from planner.solve.homes import HostMemory, home_of
from planner.solve.share import arena_bytes, state_bytes_of
from planner.solve.simulate import StepTime
from planner.solve.tilings import Tilings

Stay = Literal["always", "phase", "call"]
# Keeping a member for good is looked at where the copies it saves are more than this share of the time.
_WORTH = 0.005
# Rooms are tried that hold what cannot come while a call computes, and such shares of the weights more.
_ABOVE = (0.1, 0.2, 0.3)


@dataclass(frozen=True, eq=False)
class Member:
    """A call of a component in its place. `outside_bytes`: what Python holds beside the program; `calls`: of one run."""

    key: str
    tilings: Tilings
    outside_bytes: int
    calls: int
    phases: tuple[int, ...]

    @property
    def solver(self) -> Solver:
        """As it is, nothing rewritten."""
        return self.tilings.base

    @property
    def weight_bytes(self) -> int:
        return self.solver.problem.total_weight_bytes - state_bytes_of(self.solver)


@dataclass(frozen=True)
class MemberShare:
    """What one member gets: the solver of its tiling, its schedule, how long it stays, within which budget it was scheduled.

    `split_bytes`: how much more its resident weights take where some of them come early, into memory of their own. `host`: what
    it has of the host's memory, where that has a budget and not all weights fit.
    """

    solver: Solver
    schedule: Schedule
    stay: Stay
    budget_bytes: int
    split_bytes: int = 0
    host: HostMemory | None = None

    @cached_property
    def arena_bytes(self) -> int:
        """What is on the device between its calls, while it stays: arenas, and bundles that the next call finds there."""
        if self.stay == "call":
            return 0
        carried = sum(p.span.nbytes for p in self.schedule.placements if p.carried and self.schedule.staging == "allocator")
        return arena_bytes(self.solver, self.schedule) + carried + self.split_bytes

    @property
    def loaded_bytes(self) -> int:
        """What is copied before its first operator can run."""
        return sum(nbytes for _, nbytes in self.resident)

    @property
    def loaded_read_bytes(self) -> int:
        """Of that, what comes from disk."""
        if self.host is None:
            return 0
        held = self.host.held or {}
        return sum(weight.nbytes for weight, _ in self.resident if home_of(weight) not in held)

    @property
    def streamed_read_bytes(self) -> int:
        """From disk in one call, of what is streamed."""
        return 0 if self.schedule.host is None else self.schedule.host.read_bytes

    @cached_property
    def resident(self) -> tuple[tuple[Weight, int], ...]:
        """The weights in its resident arena, in their order; members that have the same share one."""
        streamed = {w for placed in self.schedule.placements for w in placed.span.weights}
        problem = self.solver.problem
        order = dict.fromkeys((*(visit.weight for visit in problem.visits), *problem.weight_bytes))
        weights = [(problem.program.weights[key], problem.weight_bytes[key]) for key in order if key not in streamed]
        return tuple((weight, nbytes) for weight, nbytes in weights if not weight.state)

    @property
    def resident_bytes(self) -> int:
        """Of that arena, as the device's allocator rounds it."""
        return self.solver.problem.memory.reserved_alone(self.loaded_bytes)


MemberShares = Mapping[str, MemberShare]


def arenas_of(shares: Iterable[MemberShare]) -> int:
    """What members that stay have on the device together."""
    own, shared = 0, dict[object, int]()
    for share in shares:
        if share.stay != "call":
            shared[share.resident] = share.resident_bytes
            own += share.arena_bytes - share.resident_bytes
    return own + sum(shared.values())


@dataclass(frozen=True, eq=False)
class PhasedBudget:
    """The problem.

    `phases`: the keys of the members of each, in order. `between_bytes`: what Python holds at most between two calls of one
    phase, for each; `python_bytes`: outside of them. `keep_all`: nothing may leave the device. `spills`: some weights come
    from disk, once where they stay and in every call where they are streamed.
    """

    machine: Machine
    members: Mapping[str, Member]
    phases: Sequence[tuple[str, ...]]
    between_bytes: Sequence[int]
    python_bytes: int
    keep_all: bool = False
    spills: bool = False
    _solved: dict[tuple[str, int], tuple[Solver, Schedule] | None] = field(default_factory=dict)
    _timed: dict[tuple[int, str], tuple[Schedule, float]] = field(default_factory=dict)

    # Bytes.

    @cached_property
    def minimum_bytes(self) -> int:
        """The least budget that is feasible: every member for a call, unless all must stay."""
        if self.keep_all:
            return max(self.peaks(self._resident_shares(self.members, "always")).values())
        return max([self.python_bytes + self.state_bytes, *self.between_bytes, *map(self._least, self.members)])

    def least_bytes(self, budget_bytes: int) -> int:
        """The least feasible budget where it is above `budget_bytes`; else some feasible one, without looking further."""
        if self.keep_all:
            return self.minimum_bytes
        least = [self.python_bytes + self.state_bytes, *self.between_bytes]
        for key, member in self.members.items():
            around = self._least_around(key)
            least.append(around + member.tilings.least_bytes(budget_bytes - around))
        return max(least) if max(least) <= budget_bytes else self.minimum_bytes

    @cached_property
    def unplanned_bytes(self) -> int:
        """With all weights on the device and nothing tiled: those of members that share them once."""
        weights: dict[str, int] = {}
        for member in self.members.values():
            problem = member.solver.problem
            weights |= problem.program.bytes_by_name(problem.weight_bytes)
        needs = [m.outside_bytes + m.solver.problem.most_activation_bytes for m in self.members.values()]
        return sum(weights.values()) + max([self.python_bytes, *self.between_bytes, *needs])

    @cached_property
    def state_bytes(self) -> int:
        """Of what programs write, which is always on the device; that of several members once."""
        state: dict[str, int] = {}
        for member in self.members.values():
            problem = member.solver.problem
            state |= {w.name: problem.weight_bytes[k] for k, w in problem.program.weights.items() if w.state}
        return sum(state.values())

    def tightest(self) -> str | None:
        """The member that sets the minimum; None where the pipeline's Python does."""
        least = {key: self._least(key) for key in self.members}
        key = max(least, key=least.__getitem__, default=None)
        return key if key is not None and least[key] == self.minimum_bytes else None

    def peaks(self, shares: MemberShares, peaks: Mapping[str, int] | None = None) -> dict[str | None, int]:
        """The most bytes at the calls of each member that has a share, and outside of all calls (None).

        `peaks`: what each member takes itself, with its arenas and state; by default what was solved for.
        """
        found: dict[str | None, int] = {
            None: self.python_bytes + self.state_bytes + arenas_of(self._there((), shares).values())
        }
        for phase, between in zip(self.phases, self.between_bytes, strict=True):
            found[None] = max(found[None], between + self.state_bytes + arenas_of(self._there(phase, shares).values()))
        for key, share in shares.items():
            own = share.schedule.peak_bytes if peaks is None else peaks[key]
            found[key] = own + share.split_bytes + self._around(key, shares)
        return found

    def _around(self, key: str, shares: MemberShares) -> int:
        """What is on the device at the calls of a member besides itself."""
        near = {other for phase in self.phases if key in phase for other in phase}
        there = self._there(near, shares)
        return self._least_around(key) + arenas_of(there.values()) - shares[key].arena_bytes

    def _there(self, phase: Iterable[str], shares: MemberShares) -> dict[str, MemberShare]:
        """Those whose arenas are on the device in a phase, or, where it has no members, outside of all."""
        near = frozenset(phase)
        return {k: s for k, s in shares.items() if s.stay == "always" or (s.stay == "phase" and k in near)}

    def _least(self, key: str) -> int:
        return self._least_around(key) + self.members[key].tilings.minimum.minimum.peak_bytes

    def _least_around(self, key: str) -> int:
        """What is on the device at the calls of a member where nothing else stays there."""
        return self._outside(key) + self.state_bytes

    # Seconds.

    def time(self, shares: MemberShares) -> StepTime:
        """Of one run: its calls, simulated, and the copies before them; what Python itself takes is not known."""
        step = stall = copying = 0.0
        loads = self.load_seconds(shares)
        for key, share in shares.items():
            calls, load, seconds = self.members[key].calls, loads[key], self._call_seconds(key, share)
            step += seconds + load
            stall += seconds - calls * share.solver.problem.compute_seconds + load
            copying += calls * share.schedule.time.copy_seconds + load
        return StepTime(step, stall, copying)

    def _call_seconds(self, key: str, share: MemberShare) -> float:
        """Of all calls of a member, each as it is in a run."""
        known = id(share.schedule), key  # which the entry keeps alive
        if known not in self._timed:
            self._timed[known] = share.schedule, share.solver.phase_seconds(share.schedule, self.members[key].calls)
        return self._timed[known][1]

    def load_seconds(self, shares: MemberShares) -> dict[str, float]:
        """Of the copies before calls of each member, in one run; what it shares with another one before it is there."""
        found, known = {}, set[object]()
        for key, share in shares.items():
            member = self.members[key]
            times = {"always": 0, "phase": len(member.phases), "call": member.calls}[share.stay]
            if share.stay == "phase" and (share.resident, member.phases) in known:
                times = 0
            known.add((share.resident, member.phases))
            found[key] = times * self.machine.copy_seconds(share.loaded_bytes) if share.loaded_bytes else 0.0
        return found

    # Choosing.

    def solve(self, budget_bytes: int) -> MemberShares:
        """The fastest of the choices; requires `budget_bytes >= minimum_bytes`."""
        best: MemberShares | None = None
        for always in self._kept_for_good():
            shares = self._shares(always, budget_bytes, best)
            if shares is None:
                continue
            if best is None or self.time(shares).step_seconds < self.time(best).step_seconds:
                best = shares
        assert best is not None
        return best

    def _kept_for_good(self) -> Iterator[tuple[str, ...]]:
        """Members that stay always: nobody first, since that is always possible; then everybody, then the small ones."""
        if self.keep_all:
            yield tuple(self.members)
            return
        yield ()
        order = sorted(self.members, key=lambda key: self.members[key].weight_bytes)
        for count in (len(order), *range(1, len(order))):
            yield tuple(order[:count])

    def _shares(self, always: tuple[str, ...], budget_bytes: int, best: MemberShares | None) -> MemberShares | None:
        """Schedules with these kept for good; None where they do not fit, or cannot be worth it."""
        shares = self._resident_shares(always, "always")
        taken = arenas_of(shares.values())
        if best is not None:
            loads = self.load_seconds(best)
            saved = sum(loads[key] + self._waits(key, best[key]) for key in always)
            if saved <= _WORTH * self.time(best).step_seconds:
                return None
        if max(self.peaks(shares).values()) > budget_bytes:
            return None
        rest = [tuple(key for key in phase if key not in always) for phase in self.phases]
        for phase, between in zip(rest, self.between_bytes, strict=True):
            fresh = tuple(key for key in phase if key not in shares)
            if fresh:
                found = self._phase(fresh, between, budget_bytes - taken - self.state_bytes)
                if found is None:
                    return None
                shares |= found
        return shares if max(self.peaks(shares).values()) <= budget_bytes else None

    def _waits(self, key: str, share: MemberShare) -> float:
        return self._call_seconds(key, share) - self.members[key].calls * share.solver.problem.compute_seconds

    def _phase(self, keys: tuple[str, ...], between_bytes: int, budget_bytes: int) -> dict[str, MemberShare] | None:
        """The fastest way to run the members of a phase within a budget, their state aside."""
        best: dict[str, MemberShare] | None = None
        order = sorted(keys, key=lambda key: self.members[key].weight_bytes)
        for count in range(len(order), -2, -1):
            found = self._staying(order, count, between_bytes, budget_bytes)
            if found is not None and (best is None or self._seconds(found) < self._seconds(best)):
                best = found
            if found is not None and count >= len(order) and self._waiting(found) <= _WORTH * self._seconds(found):
                break  # everything stays
        return best

    def _staying(self, order: list[str], count: int, between_bytes: int, budget_bytes: int) -> dict[str, MemberShare] | None:
        """The first `count` members stay whole for the phase, the next with what is left of the room, the rest for a call.

        With -1 all are there for a call.
        """
        whole = self._resident_shares(order[: max(count, 0)], "phase")
        taken = arenas_of(whole.values())
        shares = dict(whole)
        for key in order[count + 1 :] if count >= 0 else order:
            share = self._for_a_call(key, budget_bytes - taken - self._outside(key))
            if share is None:
                return None
            shares[key] = share
        if 0 <= count < len(order):
            key = order[count]
            others = max([between_bytes, *(self._outside(k) + s.schedule.peak_bytes for k, s in shares.items())])
            share = self._for_a_phase(key, budget_bytes - taken, others)
            if share is None:
                return None
            shares[key] = share
        arenas = arenas_of(shares.values())
        inside = [self._outside(k) + arenas - s.arena_bytes + s.schedule.peak_bytes for k, s in shares.items()]
        return shares if max([between_bytes + arenas, *inside]) <= budget_bytes else None

    def _outside(self, key: str) -> int:
        """What is beside a member's program, which has its own state in its peak."""
        return self.members[key].outside_bytes - state_bytes_of(self.members[key].solver)

    def _for_a_phase(self, key: str, budget_bytes: int, others_bytes: int) -> MemberShare | None:
        """A schedule whose arenas leave room for what happens between its calls.

        They are smaller than the room of a schedule by at least the least that its operators hold besides.
        """
        least = int(self.members[key].solver.problem.activation_bytes.min())
        room = min(budget_bytes - self._outside(key), budget_bytes - others_bytes + least)
        found = self._solved_within(key, room)
        if found is None:
            return None
        share = MemberShare(*found, "phase", room)
        load = self.load_seconds({key: share})[key]
        if self.spills or load <= _WORTH * self._seconds({key: share}):
            return share
        smaller = [each for each in self._smaller_rooms(key) if each < room]
        others = [MemberShare(*solved, "phase", each) for each in smaller if (solved := self._solved_within(key, each))]
        return min([share, *others], key=lambda one: self._seconds({key: one}))

    def _smaller_rooms(self, key: str) -> Iterator[int]:
        """In which as much is streamed as can come while a call computes: what is streamed is not waited for before the first.

        They do not depend on the budget, so that with more of it they are looked at too.
        """
        solver = self.members[key].solver
        weights, hidden = self.members[key].weight_bytes, int(solver.problem.compute_seconds * self.machine.link_bandwidth)
        for more in _ABOVE:
            yield solver.minimum.peak_bytes + max(0, weights - hidden) + int(more * weights)

    def _for_a_call(self, key: str, room: int) -> MemberShare | None:
        found = self._passing(key, room)
        return None if found is None else MemberShare(*found, "call", room)

    def _solved_within(self, key: str, room: int) -> tuple[Solver, Schedule] | None:
        """The fastest schedule in some room, whose residents are there when a call begins."""
        if (key, room) not in self._solved:
            tilings = self.members[key].tilings
            fits = room >= tilings.least_bytes(room)
            self._solved[key, room] = tilings.solve(room) if fits else None
        return self._solved[key, room]

    def _passing(self, key: str, room: int) -> tuple[Solver, Schedule] | None:
        """The fastest schedule of a call that finds nothing on the device."""
        member, found = self.members[key], self._solved_within(key, room)
        if found is None:
            return None
        solver, schedule = found
        options = [solver.pass_through(room)] if solver.minimum.peak_bytes <= room else []
        options += [schedule] if not any(p.carried for p in schedule.placements) else []
        if not options:
            solver = member.tilings.minimum
            options = [solver.pass_through(room)]
        return solver, min(options, key=lambda s: self._once(solver, s))

    def _once(self, solver: Solver, schedule: Schedule) -> float:
        """Seconds of a call that finds nothing on the device."""
        load = MemberShare(solver, schedule, "call", 0).loaded_bytes
        return schedule.time.step_seconds + (self.machine.copy_seconds(load) if load else 0.0)

    def _seconds(self, shares: Mapping[str, MemberShare]) -> float:
        return self.time(shares).step_seconds

    def _waiting(self, shares: Mapping[str, MemberShare]) -> float:
        return self.time(shares).stall_seconds

    def _resident_shares(self, keys: Iterable[str], stay: Stay) -> dict[str, MemberShare]:
        """Members with everything on the device."""
        found = {}
        for key in keys:
            solver = self.members[key].solver
            found[key] = MemberShare(solver, solver.resident, stay, solver.resident.peak_bytes)
        return found
