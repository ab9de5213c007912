"""Resident weights of a program that come while another one runs."""

from __future__ import annotations

from typing import Any

import torch

from runtime.devices.base import Device
from runtime.executable import Executable
from runtime.store import HostStore

# Behind how many prefetches of the program that runs so many weights follow, in order.
Pieces = tuple[tuple[int, int], ...]


class Arriving:
    """The first resident weights of `program` on their way into memory of their own; `versions` are those of all weights."""

    def __init__(self, device: Device, store: HostStore, program: Executable, pieces: Pieces, versions: object) -> None:
        self.program, self.versions = program, versions
        self._device, self._store = device, store
        self._pieces, self._copied = list(pieces), 0
        self._weights = sum(count for _, count in pieces)
        self._buffer: torch.Tensor | None = None
        self._events: list[Any] = []

    def reach(self, prefetches: int) -> None:
        """The program that runs has made so many prefetches: what is to follow them is issued."""
        while self._pieces and self._pieces[0][0] <= prefetches:
            self._issue(self._pieces.pop(0)[1])

    def _issue(self, count: int) -> None:
        slots = self.program.layout.resident
        if self._buffer is None:
            nbytes = slots[self._weights].offset if self._weights < len(slots) else self.program.layout.resident_bytes
            self._buffer = self._device.allocate(nbytes)
        own = slots[self._copied : self._copied + count]
        runs = self._store.runs([(self.program.weights[slot.weight], slot.offset) for slot in own])
        pairs = [(self._buffer[offset : offset + source.numel()], source) for offset, source in runs]
        # Behind the last owner of this memory (I4).
        self._events.append(self._device.copy(pairs, [self._device.mark()]))
        self._copied += count

    def claim(self) -> torch.Tensor | None:
        """The buffer, in which all of them are for whatever is computed from now on (I3); None where none was under way."""
        if self._buffer is not None:
            while self._pieces:  # a call that was broken off
                self._issue(self._pieces.pop(0)[1])
        for event in self._events:
            self._device.wait(event)
        buffer, self._buffer = self._buffer, None
        self._events.clear()
        return buffer

    def drop(self) -> None:
        """Nobody needs them any more: nothing of them may land in memory that is used otherwise from now on."""
        for event in self._events:
            self._device.settle(event)
        self._pieces.clear()
        self._events.clear()
        self._buffer = None
