"""The ring: page-locked slots of equal size through which bytes from disk pass on their way to the device."""

from __future__ import annotations

import mmap

import torch

from runtime.layout import HostLayout


class Ring:
    """The slots of one program. `slots` are for reads, `bounce` for what is loaded before a call and for looked-up rows.

    `buffer` is all of it, exactly sized (uint8, 1-d), for the device to page-lock.
    """

    def __init__(self, host: HostLayout) -> None:
        self._map = mmap.mmap(-1, max(host.ring_bytes, 1))
        self.buffer = (
            torch.frombuffer(self._map, dtype=torch.uint8, count=host.ring_bytes) if host.ring_bytes else torch.empty(0)
        )
        pieces = [self.buffer[i * host.slot_bytes : (i + 1) * host.slot_bytes] for i in range(host.slots)]
        self.slots, self.bounce = pieces[: host.slots - host.bounce], pieces[host.slots - host.bounce :]
