"""One budget over several parts that run one after the other, with Python between them that holds bytes of its own.

A part is *kept* (its arenas stay on the device between calls) or *passes through* (its weights come in every call and go after
it). So are the weights that opaque modules read: kept, or there while the module's Python runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from planner.machine import Machine
from planner.solve.decide import Schedule, Solver
from planner.solve.simulate import StepTime

# Bytes of tensors that Python holds, by the opaque modules whose Python runs then.
Moments = Mapping[frozenset[str], int]
Keys = frozenset[str]
NOTHING: Keys = frozenset()
# How many choices of what is kept are looked at, from nothing to everything.
CHOICES = 13


@dataclass(frozen=True)
class PartInPlace:
    """A part with what is around it. `outside`: what Python holds at its call; `calls`: per call of the whole."""

    solver: Solver
    outside: Moments
    calls: int


@dataclass(frozen=True)
class Share:
    """What one part gets: its schedule, whether its arenas stay, and the budget within which it was scheduled."""

    schedule: Schedule
    kept: bool
    budget_bytes: int


@dataclass(frozen=True)
class Shares:
    """What was decided for all parts, and which opaque modules' weights stay on the device."""

    parts: Mapping[str, Share]
    opaque: Keys


@dataclass(frozen=True)
class SharedBudget:
    """The problem: parts by key, what Python holds between them, and the bytes of the weights that each opaque module reads.

    `keep_all`: nothing may leave the device.
    """

    machine: Machine
    parts: Mapping[str, PartInPlace]
    python: Moments
    opaque_bytes: Mapping[str, int] = field(default_factory=dict)
    keep_all: bool = False

    @cached_property
    def minimum_bytes(self) -> int:
        """The least budget that is feasible: nothing is kept, unless everything must be."""
        if self.keep_all:
            return self._need(Keys(self.parts), Keys(self.opaque_bytes))
        return max([self.python_need(NOTHING) + self.state_bytes, *(self._least(key) for key in self.parts)])

    @cached_property
    def unplanned_bytes(self) -> int:
        """With every weight resident, once, whichever parts read it."""
        weights: dict[str, int] = {}
        for part in self.parts.values():
            problem = part.solver.problem
            weights |= problem.program.bytes_by_name(problem.weight_bytes)
        everything = Keys(self.opaque_bytes)
        needs = [most_bytes(p.outside, {}) + p.solver.problem.most_activation_bytes for p in self.parts.values()]
        opaque = sum(self.opaque_bytes[path] for path in everything)
        return sum(weights.values()) + opaque + max([most_bytes(self.python, {}), *needs])

    def peak_bytes(self, shares: Shares, peaks: Mapping[str, int]) -> int:
        """The most bytes at any time, where part `key` takes `peaks[key]` itself, its arenas and state included."""
        return max(self._peaks(shares, peaks).values())

    def peak_at(self, shares: Shares, peaks: Mapping[str, int]) -> str | None:
        """The part at whose call the peak is; None where Python between parts has it."""
        found = self._peaks(shares, peaks)
        return max(found, key=found.__getitem__)

    def _peaks(self, shares: Shares, peaks: Mapping[str, int]) -> dict[str | None, int]:
        arenas = {k: arena_bytes(self.parts[k].solver, s.schedule) if s.kept else 0 for k, s in shares.parts.items()}
        around = self.state_bytes + sum(arenas.values())
        own = {k: arenas[k] + state_bytes_of(self.parts[k].solver) for k in shares.parts}
        found: dict[str | None, int] = {None: self.python_need(shares.opaque) + around}
        return found | {k: self._outside(k, shares.opaque) + around - own[k] + peaks[k] for k in shares.parts}

    def tightest(self) -> str | None:
        """The part that sets the minimum; None where the Python between parts does."""
        least = {key: self._least(key) for key in self.parts}
        key = max(least, key=least.__getitem__, default=None)
        return key if key is not None and least[key] == self.minimum_bytes else None

    def solve(self, budget_bytes: int) -> Shares:
        """The fastest of a few choices of what is kept; requires `budget_bytes >= minimum_bytes`.

        The choices do not depend on the budget, and each gets only faster with more room: a larger budget is never slower.
        """
        assert budget_bytes >= self.minimum_bytes
        best: Shares | None = None
        for kept, opaque in self._choices():
            if self._need(kept, opaque) > budget_bytes:
                continue
            if best is not None and self._least_seconds(kept, opaque) >= self.time(best).step_seconds:
                continue
            for shares in self._schedules(kept, opaque, budget_bytes):
                if best is None or self.time(shares).step_seconds < self.time(best).step_seconds:
                    best = shares
        assert best is not None
        return best

    def _choices(self) -> list[tuple[Keys, Keys]]:
        """What may be kept, the most first: the first so many parts (by calls, then in their order) and opaque modules."""
        order: list[tuple[bool, str]] = [(True, k) for k in sorted(self.parts, key=lambda k: -self.parts[k].calls)]
        order += [(False, path) for path in self.opaque_bytes]
        if self.keep_all:
            counts = {len(order)}
        else:
            counts = {round(len(order) * i / (CHOICES - 1)) for i in range(CHOICES)}
            counts |= {max(0, len(self.parts) - 1), len(self.parts)}
        choices = []
        for count in sorted(counts, reverse=True):
            kept = order[:count]
            choices.append((Keys(key for part, key in kept if part), Keys(path for part, path in kept if not part)))
        return choices

    def _schedules(self, kept: Keys, opaque: Keys, budget_bytes: int) -> Iterator[Shares]:
        """Schedules of all parts, where these are kept."""
        rest = [key for key in self.parts if key not in kept]
        shares = {}
        for key, part in self.parts.items():
            room = self._room(key, kept, opaque, budget_bytes)
            shares[key] = Share(part.solver.resident if key in kept else part.solver.pass_through(room), key in kept, room)
        yield Shares(shares, opaque)
        if len(rest) == 1:
            streaming = self._keep_streaming(rest[0], kept, opaque, budget_bytes)
            if streaming is not None:
                yield Shares(shares | {rest[0]: streaming}, opaque)

    def _keep_streaming(self, key: str, kept: Keys, opaque: Keys, budget_bytes: int) -> Share | None:
        """The only part that is left may keep its arenas, as far as Python and the others leave room for them in their time.

        Arenas are smaller than the room of a schedule by at least the least that its operators hold besides.
        """
        solver = self.parts[key].solver
        others = [self._peak_of_kept(other, kept, opaque) for other in kept]
        elsewhere = max([self.python_need(opaque) + self._arenas(kept), *others])
        least = int(solver.problem.activation_bytes.min())
        room = min(self._room(key, kept, opaque, budget_bytes), budget_bytes - elsewhere + least)
        return Share(solver.solve(room), True, room) if room >= solver.minimum.peak_bytes else None

    def time(self, shares: Shares) -> StepTime:
        """Seconds of one call of the whole: its parts, simulated, and copies around them; what Python takes is not known."""
        step = stall = copying = 0.0
        for key, share in shares.parts.items():
            part, own = self.parts[key], share.schedule.time
            load = 0.0 if share.kept else self.machine.copy_seconds(self._loaded_bytes(key, share.schedule))
            step += part.calls * (own.step_seconds + load)
            stall += part.calls * (own.stall_seconds + load)
            copying += part.calls * (own.copy_seconds + load)
        passing = sum(self.machine.copy_seconds(n) for path, n in self.opaque_bytes.items() if path not in shares.opaque)
        return StepTime(step + passing, stall + passing, copying + passing)

    def _least_seconds(self, kept: Keys, opaque: Keys) -> float:
        """What no schedule with these kept can beat: arithmetic, and copies of all that passes through."""
        seconds = sum(n / self.machine.link_peak_bandwidth for path, n in self.opaque_bytes.items() if path not in opaque)
        rest = [part for key, part in self.parts.items() if key not in kept]
        for part in self.parts.values():
            problem = part.solver.problem
            weights = problem.total_weight_bytes - state_bytes_of(part.solver)
            # Alone, the last part may keep its arenas and stream less.
            copied = weights / self.machine.link_peak_bandwidth if part in rest and len(rest) > 1 else 0.0
            seconds += part.calls * max(problem.compute_seconds, copied)
        return seconds

    def _loaded_bytes(self, key: str, schedule: Schedule) -> int:
        """What is copied before a part that passes through can begin."""
        problem = self.parts[key].solver.problem
        streamed = {w for placed in schedule.placements for w in placed.span.weights}
        return problem.total_weight_bytes - problem.arena_bytes(streamed) - state_bytes_of(self.parts[key].solver)

    def _need(self, kept: Keys, opaque: Keys) -> int:
        """The least budget with these kept."""
        rest = self.parts.keys() - kept
        passing = [self._taken_around(k, kept, opaque) + self.parts[k].solver.minimum.peak_bytes for k in rest]
        inside = [self._peak_of_kept(key, kept, opaque) for key in kept]
        return max([self.python_need(opaque) + self._arenas(kept), *passing, *inside])

    def _room(self, key: str, kept: Keys, opaque: Keys, budget_bytes: int) -> int:
        """What a part may take itself: the budget without what Python, other arenas and other state take."""
        return budget_bytes - self._taken_around(key, kept, opaque)

    def _taken_around(self, key: str, kept: Keys, opaque: Keys) -> int:
        return self._outside(key, opaque) + self._arenas(kept - {key}) - state_bytes_of(self.parts[key].solver)

    def _peak_of_kept(self, key: str, kept: Keys, opaque: Keys) -> int:
        return self._taken_around(key, kept, opaque) + self.parts[key].solver.resident.peak_bytes

    def _least(self, key: str) -> int:
        return self._taken_around(key, NOTHING, NOTHING) + self.parts[key].solver.minimum.peak_bytes

    def python_need(self, opaque: Keys) -> int:
        """What Python holds at most, weights that it reads included, those of kept ones all the time."""
        return most_bytes(self.python, self._passing(opaque)) + self._kept_weights(opaque)

    def _outside(self, key: str, opaque: Keys) -> int:
        return most_bytes(self.parts[key].outside, self._passing(opaque)) + self._kept_weights(opaque)

    def _passing(self, opaque: Keys) -> dict[str, int]:
        return {path: nbytes for path, nbytes in self.opaque_bytes.items() if path not in opaque}

    def _kept_weights(self, opaque: Keys) -> int:
        return sum(self.opaque_bytes[path] for path in opaque)

    def _arenas(self, kept: Keys) -> int:
        """Bytes on the device between parts: arenas of those that are kept, and state, which is always there."""
        return self.state_bytes + sum(self._resident_arenas[key] for key in kept)

    @cached_property
    def _resident_arenas(self) -> dict[str, int]:
        return {key: arena_bytes(part.solver, part.solver.resident) for key, part in self.parts.items()}

    @cached_property
    def state_bytes(self) -> int:
        """State of all parts, that of several once."""
        state: dict[str, int] = {}
        for part in self.parts.values():
            problem = part.solver.problem
            state |= {w.name: problem.weight_bytes[k] for k, w in problem.program.weights.items() if w.state}
        return sum(state.values())


def most_bytes(moments: Moments, passing: Mapping[str, int]) -> int:
    """The most that Python holds, where each running module brings its weights for as long as it runs."""
    return max((nbytes + sum(passing.get(path, 0) for path in running) for running, nbytes in moments.items()), default=0)


def state_bytes_of(solver: Solver) -> int:
    problem = solver.problem
    return sum(problem.weight_bytes[k] for k, w in problem.program.weights.items() if w.state)


def arena_bytes(solver: Solver, schedule: Schedule) -> int:
    """What stays on the device between calls of a kept part, state aside, as the device's allocator rounds it."""
    memory, problem = solver.problem.memory, solver.problem
    streamed = {w for placed in schedule.placements for w in placed.span.weights}
    resident = problem.total_weight_bytes - problem.arena_bytes(streamed) - state_bytes_of(solver)
    staging = schedule.staging_bytes
    return memory.reserved_alone(resident) + memory.reserved_alone(staging)
