"""Pools: free segments of the caching allocator, made before a program runs, that serve all it asks for.

Blocks of different segments never merge. In one segment that is as large as the program needs, they do, so less is reserved
(`passes/cuda_replay.py` says how much, and when two are better). Segments belong to the stream that was current when they were
made, and anybody may have the allocator give them back (`torch.cuda.empty_cache()`, a request at the cap): before each call
both are looked at.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch

log = logging.getLogger("vramplan")


class Cache(Protocol):
    """What pools need of a caching allocator; all in bytes."""

    def empty(self) -> None:
        """Gives every wholly free segment back to the driver."""
        ...

    def allocate(self, nbytes: int) -> object:
        """A block on the current stream, free again when the object dies."""
        ...

    def reserved_bytes(self) -> int: ...

    def released_segments(self) -> int:
        """How many segments were given back so far."""
        ...

    def stream(self) -> int:
        """The current stream."""
        ...


class TorchCache:
    """The caching allocator of PyTorch on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def allocate(self, nbytes: int) -> object:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def released_segments(self) -> int:
        # Nested, for that is asked in every call, and flattening a hundred counters takes longer than reading them.
        return int(torch.cuda.memory_stats_as_nested_dict(self._device).get("num_device_free", 0))

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


class PoolSegments:
    """The pools of one device. `limit_bytes` is the cap on what may be reserved in all; None: there is none."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.limit_bytes: int | None = None
        self.sizes: tuple[int, ...] = ()
        self._made_for: tuple[int, int] | None = None  # stream, segments released until then

    def make(self, *sizes: int) -> None:
        """Makes pools of so many bytes in place of those before. What is cached goes back to the driver."""
        self.sizes = sizes
        self._made_for = None
        self._cache.empty()
        if sizes:
            self._make()

    def release(self) -> None:
        """Gives them back until the next call: what is allocated now, to stay, would be cut out of them."""
        if self.sizes and self._made_for is not None:
            self._made_for = None
            self._cache.empty()

    def renew(self) -> None:
        """Makes them again where a call would find none: they were released, segments were since, or the stream is another."""
        if not self.sizes or self._made_for == (self._cache.stream(), self._cache.released_segments()):
            return
        self._cache.empty()
        self._make()

    def _make(self) -> None:
        """Where there is no room, the program runs without: the cap still holds, and a call that needs the room says so."""
        cache = self._cache
        before, total = cache.reserved_bytes(), sum(self.sizes)
        if self.limit_bytes is not None and before + total > self.limit_bytes:
            log.info("no room for pools of %d bytes: %d of %d are reserved", total, before, self.limit_bytes)
        else:
            held = []
            try:
                for nbytes in self.sizes:
                    before += nbytes
                    while cache.reserved_bytes() < before:  # what a hole serves is no segment of its own
                        held.append(cache.allocate(nbytes))
            except torch.OutOfMemoryError:
                log.info("the device has no room for pools of %d bytes", total)
            held.clear()
        self._made_for = cache.stream(), cache.released_segments()
