"""Which weights of a pipeline's next member come while the last call before it runs: as many as there is room and time for.

What comes early takes the link only where that is idle: a piece follows a prefetch of the call if its copy is over before the
next one's begins. Memory for it is what the budget leaves from some prefetch on: a call that streams holds less towards its
end, and in its last turn nothing for another one of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.memory import MemoryModel
from planner.solve.early import Early
from planner.solve.run import PlannedRun
from planner.solve.simulate import Run

# So many places in a call are tried for the memory of what comes early.
_PLACES = 12
# It has to save more than this share of the copies that the next member would wait for.
_WORTH = 0.01


@dataclass(frozen=True, eq=False)
class SeamBytes:
    """What is on the device around the turns of a run.

    Attributes:
        around: for each turn, beside its call: what Python holds, other arenas, state.
        before: for each turn, from the one before it to this one: the same.
        tails: of each member's call, behind each number of prefetches the most bytes from there on, arenas included, in a turn
            that is its last.
        split_room: how much more each member may take than its peak.
    """

    memory: MemoryModel
    around: Sequence[int]
    before: Sequence[int]
    tails: Mapping[str, Sequence[int]]
    split_room: Mapping[str, int]

    def during(self, run: PlannedRun, at: int, early: Early) -> int:
        """The most bytes in a turn from where early weights come."""
        return self.around[at] + self.tails[early.during][early.begins] + self.taken(run, early)

    def taken(self, run: PlannedRun, early: Early) -> int:
        """By the early weights."""
        return self.memory.reserved_alone(run.members[early.of].span_bytes(early.weights))

    def split(self, run: PlannedRun, early: Early) -> int:
        """How much more a resident arena takes in two parts than in one."""
        member = run.members[early.of]
        rest = member.resident_bytes - member.span_bytes(early.weights)
        return self.taken(run, early) + self.memory.reserved_alone(rest) - self.memory.reserved_alone(member.resident_bytes)

    def peaks(self, run: PlannedRun, early: Sequence[Early]) -> dict[str | None, int]:
        """The most bytes with what comes early: by the member during whose call it comes, and between calls (None)."""
        found: dict[str | None, int] = {}
        known = {(each.during, each.of): each for each in early}
        for at in filter(run.is_seam, range(len(run.turns))):
            each = known.get(run.pair(at))
            if each is not None:
                between = self.before[at + 1] + self.taken(run, each)
                found[each.during] = max(found.get(each.during, 0), self.during(run, at, each))
                found[None] = max(found.get(None, 0), between)
        return found


@dataclass(eq=False)
class SeamSearch:
    """The first time that one member follows another decides for all times."""

    run: PlannedRun
    sizes: SeamBytes
    budget_bytes: int
    _found: dict[tuple[str, str], Early | None] = field(default_factory=dict)

    def decide(self) -> tuple[Early, ...]:
        """All that comes early; nothing where the run were no faster by it."""
        without = self.run.time(()).time.step_seconds
        seconds = self.run.play(self._choose).time.step_seconds
        found = tuple(each for each in self._found.values() if each is not None)
        return found if seconds < without else ()

    def _choose(self, at: int, start: Run) -> Early | None:
        if not self.run.is_seam(at):
            return None
        pair = self.run.pair(at)
        if pair not in self._found:
            self._found[pair] = self._best(at, start)
        return self._found[pair]

    def _best(self, at: int, start: Run) -> Early | None:
        """What lets the next turn begin soonest."""
        best: Early | None = None
        plain = self.run.call(at, start, None)
        least = self._begins(at, plain, None) - _WORTH * self.run.rest_seconds(self.run.turns[at + 1].key, None)
        for early in self._candidates(at, plain):
            seconds = self._begins(at, self.run.call(at, start, early), early)
            if seconds < least:
                best, least = early, seconds
        return best

    def _begins(self, at: int, call: Run, early: Early | None) -> float:
        """When the next turn has all that it waits for, in seconds from the beginning of the call."""
        now, rest = call.seconds, self.run.rest_seconds(self.run.turns[at + 1].key, early)
        return max(now, call.beside_done, max(call.engine_free, now) + rest if rest else 0.0)

    def _candidates(self, at: int, call: Run) -> Iterator[Early]:
        during, of = self.run.pair(at)
        for place in self._places(at, during):
            most = self._fitting(at, place, of)
            pieces = tuple(self._pieces(call, place, of, most))
            if pieces:
                yield Early(during, of, pieces)

    def _places(self, at: int, during: str) -> list[int]:
        """Numbers of prefetches behind which there is more room than before; the first and some of the others."""
        tails = self.sizes.tails[during]
        grows = [place for place in range(1, len(tails)) if tails[place] < tails[place - 1]]
        return [0, *grows[:: -max(1, -(-len(grows) // _PLACES))][::-1]]

    def _fitting(self, at: int, place: int, of: str) -> int:
        """The most weights of the next member that fit, all the time from there on."""
        during, count = self.run.turns[at].key, len(self.run.members[of].resident)

        def early(weights: int) -> Early:
            return Early(during, of, ((place, weights),))

        def excess(weights: int) -> int:
            return max(self.sizes.peaks(self.run, (early(weights),)).values()) - self.budget_bytes

        most = bisect_right(range(1, count + 1), 0, key=excess)
        splits = most and self.sizes.split(self.run, early(most))
        return most if splits <= self.sizes.split_room[of] else 0

    def _pieces(self, call: Run, place: int, of: str, most: int) -> Iterator[tuple[int, int]]:
        """As many weights behind each prefetch as are copied before the next one's, and the rest behind the last."""
        sizes = [self.run.members[of].span_bytes(weights) for weights in range(most + 1)]
        start = 0
        for number in range(place, len(call.links)):
            stop = most
            if number + 1 < len(call.links):
                now, free = call.links[number]
                stop = start + self._within(call.links[number + 1][0] - max(now, free), sizes[start:])
            if stop > start:
                yield number, stop - start
            start = stop

    def _within(self, seconds: float, sizes: Sequence[int]) -> int:
        """How many weights are copied in that time; `sizes` sums up their bytes."""
        return bisect_right(sizes[1:], seconds, key=lambda nbytes: self.run.machine.copy_seconds(nbytes - sizes[0]))
