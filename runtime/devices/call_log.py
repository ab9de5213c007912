"""The timeline of a call as it is measured by the host's clock, where copies are made by reader threads."""

from __future__ import annotations

import time

from runtime.devices.readers import Arrival
from runtime.timeline import Cause, Copy, Eviction, Stall, Timeline

# Shorter waits are the clock's and the lock's own.
_NOISE_SECONDS = 5e-6


class CallLog:
    """Collects what happens from `started` (`time.perf_counter()`) on; the times of copies are read at the end."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._copies: list[tuple[int, int, Arrival]] = []
        self._stalls: list[Stall] = []
        self._evictions: list[Eviction] = []

    def copy(self, bundle: int, nbytes: int, arrival: Arrival) -> None:
        self._copies.append((bundle, nbytes, arrival))

    def waited(self, bundle: int, began: float, arrival: Arrival) -> None:
        start, stop = began - self._started, self._now()
        if stop - start > _NOISE_SECONDS:
            late = arrival.began is not None and arrival.began - arrival.issued < _NOISE_SECONDS
            cause: Cause = "space" if late else "link"
            self._stalls.append(Stall(bundle, start, stop, cause))

    def evict(self, bundle: int) -> None:
        self._evictions.append(Eviction(bundle, self._now()))

    def timeline(self, seconds: float) -> Timeline:
        """Copies that are still under way (for the next call) end with this one, as far as it knows."""
        copies = []
        for bundle, nbytes, arrival in self._copies:
            start = seconds if arrival.began is None else arrival.began - self._started
            stop = seconds if arrival.ended is None else arrival.ended - self._started
            copies.append(Copy(bundle, nbytes, arrival.issued - self._started, start, max(start, stop)))
        return Timeline(seconds, tuple(copies), tuple(self._stalls), tuple(self._evictions))

    def _now(self) -> float:
        return time.perf_counter() - self._started
