"""A virtual clock: one compute engine and one first-in-first-out copy engine, at the pace of the machine planned for.
Where weights come from disk there is a third: it reads piece after piece into a ring, whose slots the copy engine empties.

It is driven by what the running program does, and shares no code with the simulator that predicted it.
"""

from __future__ import annotations

from runtime.executable import Pace
from runtime.timeline import BANDS, Cause, Copy, DiskRead, Eviction, Stall, Timeline


class VirtualClock:
    """`begin`, then every `copy`, `wait` and `evict` of a call in program order, then `end`.

    `engine_free`: until when the copy engine is busy, in seconds from the beginning of the call.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._pieces: dict[int, list[int]] = {}  # of a bundle, the numbers of its reads
        for number, read in enumerate(pace.reads):
            self._pieces.setdefault(read.bundle, []).append(number)
        self.reset()

    def reset(self) -> None:
        """As new, after a call that was broken off: the next one finds no copy under way."""
        self._now = self.engine_free = 0.0
        self._step = 0
        self._under_way: dict[int, tuple[float, Cause]] = {}  # arrival, and what its copy had waited for
        self._copies: list[Copy] = []
        self._stalls: list[Stall] = []
        self._evictions: list[Eviction] = []
        self._disk_free = 0.0
        self._emptied: list[float] = []  # when the copy of each read was over, of this call; below of the last
        self._emptied_before: list[float] = []
        self._reads: list[DiskRead] = []

    def begin(self, idle: float = 0.0) -> None:
        """A call begins, so many seconds behind the end of the last one; what that prefetched for it may be on its way."""
        passed = self._now + idle
        self._now, self._step = 0.0, 0
        self.engine_free -= passed
        self._under_way = {bundle: (arrival - passed, cause) for bundle, (arrival, cause) in self._under_way.items()}
        self._copies, self._stalls, self._evictions = [], [], []
        self._disk_free = self._disk_free - passed if self._pace.ahead else 0.0
        self._emptied_before, self._emptied, self._reads = [at - passed for at in self._emptied], [], []

    def copy(self, bundle: int) -> None:
        """The program came to a prefetch."""
        self._compute()
        seconds, nbytes = self._pace.copies[bundle]
        cause: Cause = "space" if self._now > 0 and self._now >= self.engine_free else "link"
        start = max(self.engine_free, self._now)
        self.engine_free = start + seconds
        waits = [self._empty_slot(number) for number in self._pieces.get(bundle, ())]
        if any(waits):
            cause = "disk"
        if waits and not seconds:
            start += waits[0]
        self._under_way[bundle] = self.engine_free, cause
        self._copies.append(Copy(bundle, nbytes, self._now, start, self.engine_free))

    def _empty_slot(self, number: int) -> float:
        """One piece is read and copied; gives how long the copy engine waited for it."""
        read = self._pace.reads[number]
        before = self._emptied_before if read.after < 0 else self._emptied
        begun = max(self._disk_free, before[read.after]) if before else self._disk_free
        self._disk_free = begun + read.disk_seconds
        self._reads.append(DiskRead(read.bundle, read.nbytes, begun, self._disk_free))
        waited = max(0.0, self._disk_free - self.engine_free)
        self.engine_free += waited + read.copy_seconds
        self._emptied.append(self.engine_free)
        return waited

    def take_link(self, seconds: float) -> float:
        """A copy for somebody else is issued where the program is; gives when it is over."""
        self.engine_free = max(self.engine_free, self._now) + seconds
        return self.engine_free

    def skip(self) -> None:
        """The program came to a prefetch that is left out."""
        self._compute()

    def wait(self, bundle: int, until: float = 0.0) -> None:
        """The program came to an onload. What was copied before the first call is there, or will be at `until`."""
        self._compute()
        arrival, cause = self._under_way.pop(bundle, (until, "link"))
        if arrival > self._now:
            self._stalls.append(Stall(bundle, self._now, arrival, cause))
            self._now = arrival

    def begin_bands(self) -> None:
        """The program came to a loop that has the link to itself: what is under way on it comes first."""
        self._compute()
        if self.engine_free > self._now:
            self._stalls.append(Stall(BANDS, self._now, self.engine_free, "link"))
            self._now = self.engine_free

    def end_bands(self) -> None:
        """Its last band has left."""
        self._compute()
        self.engine_free = max(self.engine_free, self._now)

    def forget(self, bundle: int) -> None:
        """What was prefetched for the next call is not used: that has it copied before it begins, as the first call has."""
        self._under_way.pop(bundle, None)

    def evict(self, bundle: int) -> None:
        """The program came to an evict."""
        self._compute()
        self._evictions.append(Eviction(bundle, self._now))

    def end(self) -> Timeline:
        """The call is over."""
        self._compute()
        return Timeline(self._now, tuple(self._copies), tuple(self._stalls), tuple(self._evictions), tuple(self._reads))

    def _compute(self) -> None:
        """The operators since the last step ran."""
        self._now += self._pace.compute[self._step]
        self._step += 1
