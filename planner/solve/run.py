"""A pipeline's run as the engines of a machine see it: every call in its order, with what is copied before and beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from planner.machine import Machine
from planner.solve.early import Early
from planner.solve.simulate import Beside, Kind, Run, Step, StepTime, call_once
from planner.solve.turns import Turn
from runtime.executable import Pace
from runtime.layout import Slot
from runtime.timeline import Cause


@dataclass(frozen=True, eq=False)
class CallModel:
    """A member's call. `carried`: bundles that it fetches for the next one. `resident`: the weights of its resident arena.

    `resident_read_bytes`: of these, what comes from disk.
    """

    steps: tuple[Step, ...]
    pace: Pace
    carried: tuple[int, ...]
    resident: tuple[Slot, ...]
    resident_bytes: int
    resident_read_bytes: int = 0

    @property
    def prefetches(self) -> int:
        """How many a call makes."""
        return sum(step.kind is Kind.PREFETCH for step in self.steps)

    def span_bytes(self, weights: int) -> int:
        """Of the first so many resident weights in their arena."""
        return self.resident[weights].offset if weights < len(self.resident) else self.resident_bytes

    def copied_bytes(self, start: int, stop: int | None = None) -> int:
        """Of the resident weights from one number to another, with what lies between them."""
        return self.span_bytes(len(self.resident) if stop is None else stop) - self.span_bytes(start)


@dataclass(frozen=True)
class RunTime:
    """`time` of the whole run; `seconds` of all turns of each member, with what they wait for before they begin."""

    time: StepTime
    seconds: Mapping[str, float]


# What comes early during a turn, by its number and by what its call finds on the link.
Choice = Callable[[int, Run], Early | None]


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """The turns of a run on a machine, with a model of each member's call."""

    machine: Machine
    turns: Sequence[Turn]
    members: Mapping[str, CallModel]

    def time(self, early: Sequence[Early]) -> RunTime:
        """Simulated; what the pipeline's own Python takes is not known."""
        known = {(each.during, each.of): each for each in early}
        return self.play(lambda at, start: known.get(self.pair(at)) if self.is_seam(at) else None)

    def play(self, choose: Choice) -> RunTime:
        """As `time`, where `choose` says what comes early."""
        player = _Player(self)
        for at in range(len(self.turns)):
            player.turn(at, choose)
        return RunTime(StepTime(player.now, player.waited, player.copied), player.seconds)

    def is_seam(self, at: int) -> bool:
        """Whether the next turn waits for weights that may come in this one."""
        return self.turns[at].brings

    def pair(self, at: int) -> tuple[str, str]:
        """The members of that turn and of the next one."""
        return self.turns[at].key, self.turns[at + 1].key

    def call(self, at: int, start: Run, early: Early | None) -> Run:
        """That turn's call."""
        turn, member = self.turns[at], self.members[self.turns[at].key]
        skipped = frozenset(member.carried) if turn.last else frozenset[int]()
        beside = Beside(skipped, {} if early is None else self.piece_seconds(early))
        return call_once(member.steps, member.pace, start, beside)

    def piece_seconds(self, early: Early) -> dict[int, float]:
        """Of each copy, by the number of prefetches behind which it is issued."""
        member, start, found = self.members[early.of], 0, dict[int, float]()
        for prefetches, weights in early.pieces:
            found[prefetches] = self.machine.copy_seconds(member.copied_bytes(start, start + weights))
            start += weights
        return found

    def rest_seconds(self, key: str, early: Early | None) -> float:
        """Of the copy of what has not come early, before the member can begin."""
        member = self.members[key]
        return self.machine.load_seconds(member.copied_bytes(0 if early is None else early.weights), member.resident_read_bytes)


@dataclass
class _Player:
    """Where the engines are: `now` compute, `free` the link, in seconds from the beginning of the run.

    `arrival`: when what comes early is there. `under_way`: bundles that the last call has fetched for the next of its member.
    """

    run: PlannedRun
    now: float = 0.0
    free: float = 0.0
    copied: float = 0.0
    waited: float = 0.0
    arrival: float = 0.0
    early: Early | None = None
    under_way: dict[int, tuple[float, Cause]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def turn(self, at: int, choose: Choice) -> None:
        turn, began = self.run.turns[at], self.now
        member = self.run.members[turn.key]
        if turn.loads:
            self._wait(self.arrival if self.early is not None else self.now)
            rest = self.run.rest_seconds(turn.key, self.early)
            if rest:
                self._copy(rest)
                self._wait(self.free)
        if not (turn.again and at and self.run.turns[at - 1].key == turn.key):
            self.under_way.clear()
        for bundle in member.carried:
            if bundle not in self.under_way:
                self._copy(member.pace.copies[bundle][0])
                self.under_way[bundle] = self.free, "link"
        start = Run.start(self.free - self.now, {b: (t - self.now, cause) for b, (t, cause) in self.under_way.items()})
        self.early = choose(at, start)
        done = self.run.call(at, start, self.early)
        self.under_way = {bundle: (self.now + t, cause) for bundle, (t, cause) in done.under_way.items()}
        self.free, self.arrival = self.now + done.engine_free, self.now + done.beside_done
        self.waited += sum(stop - begin for _, begin, stop, _ in done.stalls)
        self.copied += sum(stop - begin for _, _, begin, stop in done.copies)
        self.copied += 0.0 if self.early is None else sum(self.run.piece_seconds(self.early).values())
        self.now += done.seconds
        self.seconds[turn.key] = self.seconds.get(turn.key, 0.0) + self.now - began

    def _copy(self, seconds: float) -> None:
        """A copy is issued now."""
        self.free = max(self.free, self.now) + seconds
        self.copied += seconds

    def _wait(self, until: float) -> None:
        self.waited += max(0.0, until - self.now)
        self.now = max(self.now, until)
