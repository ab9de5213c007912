"""The virtual clock of a call that several programs serve: they share both engines, and more is copied than their bundles."""

from __future__ import annotations

from runtime.devices.virtual_clock import VirtualClock
from runtime.executable import Executable, RunPace


class RunClock:
    """`turn` to a program, whose own clock goes on from there, and to None behind its end. Seconds from the beginning."""

    def __init__(self, pace: RunPace) -> None:
        self._pace = pace
        self.begin()

    def begin(self) -> None:
        """Nothing is under way."""
        self.step_seconds = self.copy_seconds = 0.0
        self._link_free = 0.0
        self._clock: VirtualClock | None = None
        self._clocks: dict[int, tuple[Executable, VirtualClock, float]] = {}  # with when its last turn was over

    def turn(self, program: Executable | None) -> VirtualClock | None:
        """The clock of the program that runs now."""
        self._close()
        if program is None or program.pace is None:
            return None
        _, clock, ended = self._clocks.get(id(program), (program, VirtualClock(program.pace), self.step_seconds))
        clock.begin(self.step_seconds - ended)
        clock.engine_free = self._link_free - self.step_seconds
        self._clocks[id(program)] = program, clock, self.step_seconds
        self._clock = clock
        return clock

    def _close(self) -> None:
        clock, self._clock = self._clock, None
        if clock is None:
            return
        timeline = clock.end()
        self._link_free = self.step_seconds + clock.engine_free
        self.step_seconds += timeline.step_seconds
        self.copy_seconds += timeline.copy_seconds
        key = next(key for key, (_, each, _) in self._clocks.items() if each is clock)
        self._clocks[key] = self._clocks[key][0], clock, self.step_seconds

    def copy(self, nbytes: int, read_bytes: int) -> float:
        """A copy that is no bundle's, while a program runs or before, of which some comes from disk; gives when it is over."""
        seconds = self._pace.load_seconds(nbytes, read_bytes)
        self.copy_seconds += seconds
        if self._clock is not None:
            return self.step_seconds + self._clock.take_link(seconds)
        self._link_free = max(self._link_free, self.step_seconds) + seconds
        return self._link_free

    def wait(self, until: float, bundle: int | None) -> None:
        """Compute waits for such a copy: between two turns, or at the onload of a bundle that came so."""
        if self._clock is None or bundle is None:
            self.step_seconds = max(self.step_seconds, until)
        else:
            self._clock.wait(bundle, until - self.step_seconds)
