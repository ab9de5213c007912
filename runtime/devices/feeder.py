"""The feeder: has threads read what a program streams from disk into the ring, ahead of the copies out of it.

Reads are in the order of the copies, call after call. Each begins as soon as its slot is free, which the layout says by the
copy that it follows (I4), whatever the program is doing then: disk and link overlap each other and compute.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime.devices.readers import Arrival, Readers
from runtime.devices.ring import Ring
from runtime.layout import HostLayout
from runtime.weight_file import FileRange, Source

# What a slot is filled with: offsets in it, and where the bytes are.
Parts = list[tuple[int, Source]]


@dataclass(frozen=True)
class Fed:
    """The bytes of one read, as a source of copies: `take`, copy out, `give_back`, once in every call and in order."""

    feeder: Feeder
    number: int
    nbytes: int

    def numel(self) -> int:
        """As of a byte tensor."""
        return self.nbytes

    def take(self) -> torch.Tensor:
        """The slot's bytes (uint8, 1-d), once they are read.

        Raises:
            PlannerError: they cannot be; names the file.
        """
        return self.feeder.take(self.number)

    def give_back(self, event: Any) -> None:
        """The copy out of the slot is under way, and over when `event` is; None: it is over."""
        self.feeder.give_back(event)


class Feeder:
    """Of one loaded program; `read_from` comes before the first call."""

    def __init__(self, host: HostLayout, ring: Ring) -> None:
        self._host, self._ring = host, ring
        self._readers = Readers()
        self._lock = threading.Lock()
        self._buffers = [ring.slots[read.slot][: read.nbytes] for read in host.reads]
        self._parts: list[list[tuple[torch.Tensor, Source]]] = []
        self._forget()

    def read_from(self, parts: Sequence[Parts]) -> None:
        """What every read fills its slot with, from the next call on; requires that nothing is read ahead."""
        self._parts = [
            [(buffer[offset : offset + source.numel()], source) for offset, source in each]
            for each, buffer in zip(parts, self._buffers, strict=True)
        ]

    def source(self, number: int) -> Fed:
        return Fed(self, number, self._host.reads[number].nbytes)

    def begin(self) -> None:
        """A call begins: its reads do, as far as there is room."""
        with self._lock:
            self._calls += 1
            self._advance()

    def take(self, number: int) -> torch.Tensor:
        with self._lock:
            expected = self._taken % len(self._buffers)
            arrival = self._arrivals.get(self._taken)
        assert number == expected, f"read {number} is asked for, and {expected} is next"
        assert arrival is not None, f"read {number} waits for a copy that comes behind it"
        arrival.wait()
        return self._buffers[number]

    def give_back(self, event: Any) -> None:
        with self._lock:
            self._arrivals.pop(self._taken)
            self._events[self._taken] = event
            self._events.pop(self._taken - len(self._buffers) - 1, None)
            self._taken += 1
            self._advance()

    def reset(self) -> None:
        """Forgets what was read ahead: no thread writes to the ring afterwards, the next call begins with the first read."""
        self._readers.drain()
        with self._lock:
            self._forget()

    def close(self) -> None:
        self._readers.close()

    @property
    def busy_seconds(self) -> float:
        """Time so far in which at least one thread was reading."""
        return self._readers.busy_seconds()

    def _forget(self) -> None:
        # Reads are counted over all calls since: asked of the threads, and taken by copies.
        self._calls = self._asked = self._taken = 0
        self._arrivals: dict[int, Arrival] = {}
        self._events: dict[int, Any] = {}  # of the copies out of slots

    def _advance(self) -> None:
        """Asks for all reads whose slot is free, or will be when a copy that is under way is over."""
        count = len(self._buffers)
        while count and (self._host.ahead or self._asked < self._calls * count):
            number = self._asked % count
            follows = self._asked - number + self._host.reads[number].after
            if follows >= self._taken:
                return
            with _disable_current_modes():  # host memory is none of the device's, whoever counts that
                self._arrivals[self._asked] = self._readers.copy(self._parts[number], self._events.get(follows))
            self._asked += 1


def parts_of(host: HostLayout, runs: dict[int, list[tuple[int, Source]]]) -> list[Parts]:
    """Of every read what it fills its slot with, from what the store says of each bundle's bytes: (offset, source)."""
    found = []
    for read in host.reads:
        parts: Parts = []
        for offset, source in runs[read.bundle]:
            start, stop = max(offset, read.start), min(offset + source.numel(), read.start + read.nbytes)
            if start < stop:
                parts.append((start - read.start, _cut(source, start - offset, stop - offset)))
        found.append(parts)
    return found


def _cut(source: Source, start: int, stop: int) -> Source:
    if isinstance(source, FileRange):
        return FileRange(source.file, source.offset + start, stop - start)
    return source[start:stop]
