"""The timeline of a call as CUDA events tell it: recorded while the call is issued, read when it is over."""

from __future__ import annotations

from typing import Any

from runtime.timeline import Cause, Copy, Eviction, Stall, Timeline

# Shorter waits are the events' own.
_NOISE_SECONDS = 5e-6


class EventLog:
    """Events by kind, each list in program order.

    `copies`: bundle, bytes, and the events at which the program came to the prefetch and between which the copy was under way;
    `waits`: bundle, and the events before and behind the wait; `evictions`: bundle, event.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, Any, Any, Any]] = []
        self.waits: list[tuple[int, Any, Any]] = []
        self.evictions: list[tuple[int, Any]] = []
        self._read_late: set[int] = set()

    def note_read(self, bundle: int, seconds: float) -> None:
        """The copy of a bundle waited so long for what is read from disk."""
        if seconds > _NOISE_SECONDS:
            self._read_late.add(bundle)

    def timeline(self, begin: Any, seconds: float) -> Timeline:
        """Needs the device to be through with all of it; `begin` is the event at which the call began."""

        def at(event: Any) -> float:
            return float(begin.elapsed_time(event)) / 1e3

        copies = tuple(Copy(b, nbytes, at(issued), at(start), at(stop)) for b, nbytes, issued, start, stop in self.copies)
        started = {copy.bundle: copy for copy in copies}
        stalls = []
        for bundle, before, behind in self.waits:
            if at(behind) - at(before) > _NOISE_SECONDS:
                copy = started.get(bundle)
                at_once = copy is not None and copy.start - copy.issued < _NOISE_SECONDS
                cause: Cause = "disk" if bundle in self._read_late else "space" if at_once else "link"
                stalls.append(Stall(bundle, at(before), at(behind), cause))
        return Timeline(seconds, copies, tuple(stalls), tuple(Eviction(b, at(event)) for b, event in self.evictions))
