"""What the engines of a device did in one call, or will do: predicted and measured alike. Seconds since the call began."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Why compute waited: its copy had been under way or queued behind others, or memory for it came free too late to begin sooner,
# or it was not read from disk yet.
Cause = Literal["link", "space", "disk"]
Kind = Literal["copy", "arrival", "evict"]
# In place of a bundle: the bands of a loop, for which it has the link to itself.
BANDS = -1


@dataclass(frozen=True)
class Copy:
    """A bundle on its way. `issued`: when the program came to its prefetch; from `start` to `stop` it had the copy engine.

    What is prefetched for the next call may end after this one.
    """

    bundle: int
    nbytes: int
    issued: float
    start: float
    stop: float


@dataclass(frozen=True)
class Stall:
    """Compute waited for a bundle; where that is `BANDS`, for the link."""

    bundle: int
    start: float
    stop: float
    cause: Cause


@dataclass(frozen=True)
class Eviction:
    """A bundle was forgotten: its last reader had run."""

    bundle: int
    at: float


@dataclass(frozen=True)
class DiskRead:
    """Bytes of a bundle were read from disk. What is read for the next call may begin and end before this one, or after it."""

    bundle: int
    nbytes: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """One call. Copies in the order of the copy engine, stalls and evictions in that of the program, reads in the disk's."""

    step_seconds: float
    copies: tuple[Copy, ...]
    stalls: tuple[Stall, ...]
    evictions: tuple[Eviction, ...]
    reads: tuple[DiskRead, ...] = ()

    @property
    def copy_seconds(self) -> float:
        """How long the copy engine was busy."""
        return sum(copy.stop - copy.start for copy in self.copies)

    @property
    def stall_seconds(self) -> float:
        """How long compute waited for copies."""
        return sum(stall.stop - stall.start for stall in self.stalls)

    @property
    def disk_stall_seconds(self) -> float:
        """How long compute waited for copies that waited for the disk."""
        return sum(stall.stop - stall.start for stall in self.stalls if stall.cause == "disk")

    @property
    def hidden_seconds(self) -> float:
        """Copy seconds during which compute ran: what streaming does not cost."""
        return max(0.0, self.copy_seconds - self.stall_seconds)

    def order(self) -> list[tuple[Kind, int]]:
        """What happened to which bundle, in order of time: copies begin, arrive, bundles are evicted."""
        return [(kind, bundle) for _, _, kind, bundle in sorted(self._moments())]

    def _moments(self) -> Iterator[tuple[float, int, Kind, int]]:
        for copy in self.copies:
            yield copy.start, 2, "copy", copy.bundle
            yield copy.stop, 1, "arrival", copy.bundle
        for eviction in self.evictions:
            yield eviction.at, 0, "evict", eviction.bundle
